"""What `trainer.precision` may be: what NeMo's plugin is told, what the planner calls it, what a checkpoint then holds.

| value | weights and activations | gradients | optimizer |
| --- | --- | --- | --- |
| `32` | float32 | float32 | float32 |
| `bf16-mixed` | bfloat16 | float32, over all micro batches and ranks | main weights and moments in float32 |
| `bf16-true` | bfloat16 | bfloat16: half their memory and traffic, with its rounding | as above: Megatron-Core has no other |
| `16-mixed` | float16, with a loss scale | float32 | as above |
| `fp8`, `fp8-delayed` | bfloat16; products of layers in fp8 (hybrid: e4m3 forward, e5m2 backward), scales of earlier steps | as `bf16-mixed` | as above |
| `fp8-current` | the same with scales of each tensor's own, the first and last layer in bfloat16 | as `bf16-mixed` | as above |
"""  # noqa: E501  a table

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_longctx.config import ConfigError, did_you_mean

# What Lightning, torch and people call them.
ALIASES = {"bf16": "bf16-mixed", "bfloat16": "bf16-mixed", "16": "16-mixed", "fp16": "16-mixed", "float16": "16-mixed",
           "32-true": "32", "fp32": "32", "float32": "32", "tf32": "32"}  # fmt: skip

# Tokens of a micro batch on one rank that fp8 products take: Transformer Engine wants multiples of it.
FP8_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Attributes:
    host: what NeMo's `MegatronMixedPrecision` calls it.
    dtype: torch's name of that of weights, and of what passes between layers and stages.
    planned: a key of `planning.layout.PRECISIONS`.
    grad_reduce_in_fp32: whether gradients are kept and reduced in float32.
    plugin: more arguments of the plugin.
    checkpoint_bytes: of a parameter: weights in half precision are kept beside the main ones.
    """

    host: str
    dtype: str
    planned: str
    grad_reduce_in_fp32: bool = True
    plugin: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_bytes: int = 14

    @property
    def fp8(self) -> bool:
        """Whether it needs Transformer Engine and a GPU with fp8."""
        return "fp8" in self.plugin


_DELAYED = {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
_CURRENT = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}  # fmt: skip

PRECISIONS = {
    "32": Precision(host="32", dtype="float32", planned="fp32", checkpoint_bytes=12),
    "bf16-mixed": Precision(host="bf16-mixed", dtype="bfloat16", planned="bf16"),
    "bf16-true": Precision(host="bf16-mixed", dtype="bfloat16", planned="bf16", grad_reduce_in_fp32=False),
    "16-mixed": Precision(host="16-mixed", dtype="float16", planned="bf16"),
    "fp8": Precision(host="bf16-mixed", dtype="bfloat16", planned="fp8", plugin=_DELAYED),
    "fp8-delayed": Precision(host="bf16-mixed", dtype="bfloat16", planned="fp8", plugin=_DELAYED),
    "fp8-current": Precision(host="bf16-mixed", dtype="bfloat16", planned="fp8", plugin=_CURRENT),
}


def check_trainer(trainer: Any) -> None:
    """Refuse settings of a `TrainerConfig` that need a GPU, or a layout that is not there."""
    if trainer.fsdp not in ("none", "megatron"):
        raise ConfigError("trainer.fsdp", trainer.fsdp, did_you_mean(str(trainer.fsdp), ("none", "megatron")))
    for key, value, asked in (
        ("precision", trainer.precision, PRECISIONS[trainer.precision].fp8),
        ("tp_comm_overlap", True, trainer.tp_comm_overlap),
        ("fsdp", trainer.fsdp, trainer.fsdp != "none"),
    ):
        if asked and trainer.accelerator == "cpu":
            raise ConfigError(f"trainer.{key}", value, "needs a GPU; leave it out on the CPU")
    if trainer.tp_comm_overlap and (trainer.tensor_model_parallel_size == 1 or not trainer.sequence_parallel):
        mend = "needs trainer.tensor_model_parallel_size above 1 and trainer.sequence_parallel=true"
        raise ConfigError("trainer.tp_comm_overlap", True, mend)
    if trainer.fsdp != "none" and trainer.pipeline_model_parallel_size > 1:
        raise ConfigError("trainer.fsdp", trainer.fsdp, "needs trainer.pipeline_model_parallel_size=1")


CUDA_GRAPHS = ("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl")


def check_graphs(model: Mapping[str, Any], stages: Sequence[Any], *, document_masking: bool) -> None:
    """Refuse fields of a model that ask for CUDA graphs, which replay one shape, where a run has several."""
    sizes = {stage.seq_length * stage.micro_batch_size for stage in stages}
    for name in CUDA_GRAPHS:
        value = model.get(name)
        if value not in (None, False, "none") and (len(sizes) > 1 or document_masking):
            mend = "a CUDA graph replays one shape, and this run has several (its stages, or documents in a window); set it off"
            raise ConfigError(f"model.{name}", value, mend)


def check_speed(
    trainer: Any, curriculum: Any, *, sharded_optimizer: bool, validation: Sequence[Any] = (), evaluates: bool = False
) -> None:
    """Refuse settings of a `TrainerConfig` that the stages, the optimizer or what is measured in between contradict.

    Args:
        validation: the sets, with `seq_length` and `micro_batch_size`.
        evaluates: whether there are tasks of `eval`.
    """
    sizes = {stage.seq_length * stage.micro_batch_size for stage in curriculum.plan}
    if trainer.tp_comm_overlap and len(sizes) > 1:
        mend = "its buffers hold one size of micro batch, and the stages have several; set it false, or one stage"
        raise ConfigError("trainer.tp_comm_overlap", True, mend)
    validated = {each.seq_length * each.micro_batch_size for each in validation}
    if trainer.tp_comm_overlap and validated - sizes:
        mend = (
            f"its buffers hold {sizes.pop():,} tokens, and data.validation has micro batches of others; set it false, or those"
        )
        raise ConfigError("trainer.tp_comm_overlap", True, mend)
    shares = trainer.context_parallel_size * (trainer.tensor_model_parallel_size if trainer.sequence_parallel else 1)
    if PRECISIONS[trainer.precision].fp8 and any(size % (FP8_TOKENS * shares) for size in sizes | validated):
        mend = (
            f"needs micro batches of a multiple of {FP8_TOKENS * shares} tokens in all stages and validation, or set bf16-mixed"
        )
        raise ConfigError("trainer.precision", trainer.precision, mend)
    if trainer.fsdp != "none" and not sharded_optimizer:
        raise ConfigError(
            "trainer.fsdp", trainer.fsdp, "needs optimizer.distributed=true: what it shards, the optimizer shards too"
        )
    if trainer.fsdp != "none" and evaluates:  # a rank that has read its own would leave the others waiting
        why = "gathers each layer's weights on all ranks at once, where eval.tasks lets each read documents of its own"
        raise ConfigError("trainer.fsdp", trainer.fsdp, f"{why}; set none, or leave eval out and measure the checkpoints")
