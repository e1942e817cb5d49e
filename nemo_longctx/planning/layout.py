"""How a model is spread over GPUs: parallel sizes, micro batch, recomputation, precision. Names are Megatron-Core's."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_longctx.activations import offloaded_layers, recomputed_layers
from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.planning.models import ModelShape

SHARDING = ("none", "optimizer", "full")
LOSS = ("vocab_parallel", "eager", "chunked")
ATTENTION_KERNELS = ("flash", "scores")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes that one number takes.

    Attributes:
        name: how the planner calls it.
        weight: bytes of a parameter as the forward pass reads it, with its cached copies.
        gradient: bytes of the gradient buffer that all microbatches add to.
        optimizer: bytes of optimizer state a parameter (main copy where the weight is narrower, two moments of Adam).
        activation: bytes of an activation.
    """

    name: str
    weight: float
    gradient: float
    optimizer: float
    activation: float


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp32", weight=4, gradient=4, optimizer=8, activation=4),
        # Megatron's bf16 mixed precision with fp32 gradient reduction, NeMo's default (grad_reduce_in_fp32=True).
        Precision(name="bf16", weight=2, gradient=4, optimizer=12, activation=2),
        # Transformer Engine keeps the bf16 weight and caches its fp8 cast and the cast's transpose.
        Precision(name="fp8", weight=4, gradient=4, optimizer=12, activation=2),
        # FSDP2 in mixed precision (torchtitan): fp32 parameters and gradients are sharded, bf16 copies live a layer at a time.
        Precision(name="fsdp_bf16", weight=4, gradient=4, optimizer=8, activation=2),
    )
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to spread a training run over GPUs.

    Attributes:
        gpus: all GPUs of the run.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: TP, PP, CP; the rest is data parallel.
        virtual_pipeline_model_parallel_size: model chunks a pipeline stage (VP); None for the plain 1F1B schedule.
        sequence_parallel: shard norms and residuals over TP too (SP).
        micro_batch_size: sequences in one forward pass of a data-parallel rank.
        recompute, offload: what is computed again and what waits in host memory, by the names of `nemo_longctx.activations`.
            For a kernel that keeps scores, `selective` is the attention core, which holds them.
        sharding: what data parallelism splits: `none`, `optimizer` (Megatron's distributed optimizer) or `full` (FSDP).
        precision: a key of PRECISIONS.
        grad_reduce_in_fp32: keep and reduce gradients in fp32 (NeMo's default); False halves them in bf16 and fp8 runs.
        loss: `vocab_parallel` (Megatron-Core's unfused cross entropy), `eager` (torch.nn.functional.cross_entropy on float
            logits) or `chunked` (`nemo_longctx.attention.loss`).
        attention_kernel: `flash` keeps no scores; `scores` keeps s x s of them a head (Megatron-Core's local core attention).
        unfused: the layers run as separate torch operations (no Transformer Engine), which keep more tensors for backward.
    """

    gpus: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = True
    micro_batch_size: int = 1
    recompute: str = "none"
    offload: str = "none"
    sharding: str = "optimizer"
    precision: str = "bf16"
    grad_reduce_in_fp32: bool = True
    loss: str = "vocab_parallel"
    attention_kernel: str = "flash"
    unfused: bool = False

    def __post_init__(self):
        for key in (
            "gpus",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "micro_batch_size",
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"layout.{key}", value, "must be a whole number of 1 or more")
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
            mend = "must be a whole number of 1 or more model chunks a pipeline stage"
            raise ConfigError("layout.virtual_pipeline_model_parallel_size", chunks, mend)
        for key, known in (
            ("sharding", SHARDING),
            ("loss", LOSS),
            ("attention_kernel", ATTENTION_KERNELS),
            ("precision", tuple(PRECISIONS)),
        ):
            if getattr(self, key) not in known:
                raise ConfigError(f"layout.{key}", getattr(self, key), did_you_mean(str(getattr(self, key)), known))
        if self.gpus % self.model_parallel_size:
            raise ConfigError(
                "layout.gpus", self.gpus, f"must be a multiple of TP x PP x CP = {self.model_parallel_size}; change one of them"
            )
        recomputed_layers(self.recompute, 1, key="layout.recompute")
        offloaded_layers(self.offload, 1, key="layout.offload")

    @property
    def model_parallel_size(self) -> int:
        """GPUs that hold one replica: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas: DP."""
        return self.gpus // self.model_parallel_size

    @property
    def gradient_bytes(self) -> float:
        """Bytes of a parameter's gradient in the buffer that all microbatches add to."""
        precision = PRECISIONS[self.precision]
        return precision.gradient if self.grad_reduce_in_fp32 else precision.activation

    @property
    def model_chunks(self) -> int:
        """Model chunks a pipeline stage."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def residual_shards(self) -> int:
        """Ranks that share the residual stream: TP under sequence parallelism, else one."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    def num_microbatches(self, global_batch_size: int) -> int:
        """Microbatches of one rank in an optimizer step.

        Raises:
            ConfigError: they do not come out whole.
        """
        together = self.micro_batch_size * self.data_parallel_size
        if global_batch_size % together:
            raise ConfigError(
                "layout.micro_batch_size",
                self.micro_batch_size,
                f"micro batch x DP = {together} must divide the global batch of {global_batch_size} sequences",
            )
        return global_batch_size // together

    def short_name(self) -> str:
        """`TP4 CP2 PP1 DP8 mb1 full`: for tables."""
        vp = f" VP{self.model_chunks}" if self.model_chunks > 1 else ""
        return (
            f"TP{self.tensor_model_parallel_size} CP{self.context_parallel_size} PP{self.pipeline_model_parallel_size}{vp} "
            f"DP{self.data_parallel_size} mb{self.micro_batch_size} {self.recompute}"
            + (f" offload {self.offload}" if self.offload != "none" else "")
        )


def layout_faults(model: ModelShape, layout: Layout, seq_length: int, global_batch_size: int) -> list[str]:
    """Why Megatron-Core would refuse this layout, one sentence each; empty where it would not."""
    tp, pp, cp, vp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
        layout.model_chunks,
    )
    faults = []
    if model.query_groups % tp:
        faults.append(f"TP {tp} does not divide the {model.query_groups} key/value heads")
    if model.num_attention_heads % tp:
        faults.append(f"TP {tp} does not divide the {model.num_attention_heads} heads")
    if model.ffn_hidden_size % tp:
        faults.append(f"TP {tp} does not divide the MLP's {model.ffn_hidden_size}")
    if model.num_layers % (pp * vp):
        faults.append(f"PP {pp} x VP {vp} does not divide the {model.num_layers} layers")
    else:
        layers = model.num_layers // (pp * vp)
        for key, name in (("recompute", layout.recompute), ("offload", layout.offload)):
            _, _, named = name.partition(":")
            if named and int(named) > layers:
                faults.append(f"{key} {name} names more than the {layers} layers of a model chunk")
    if vp > 1 and pp == 1:
        faults.append("VP needs PP over 1")
    if cp > 1 and seq_length % (2 * cp):
        faults.append(f"2 x CP = {2 * cp} does not divide the {seq_length} tokens")
    elif layout.residual_shards > 1 and (seq_length // cp) % layout.residual_shards:
        faults.append(f"sequence parallel: TP {tp} does not divide the {seq_length // cp} tokens of a rank")
    together = layout.micro_batch_size * layout.data_parallel_size
    if global_batch_size % together:
        faults.append(f"micro batch x DP = {together} does not divide the global batch of {global_batch_size}")
    elif vp > 1 and (global_batch_size // together) % pp:
        faults.append(f"VP needs the {global_batch_size // together} microbatches to be a multiple of PP {pp}")
    return faults
