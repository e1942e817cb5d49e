"""The parts of a run's schema (`nemo_longctx.recipe`) that are no other room's: optimizer, trainer, checkpoints, adapters.

Each checks itself alone; what they say of each other, of the model and of the data is `RunConfig`'s to check.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_longctx.activations import offloaded_layers, recomputed_layers
from nemo_longctx.config import ConfigError, did_you_mean, is_finite
from nemo_longctx.precision import ALIASES, PRECISIONS, check_trainer

# Megatron-Core's linear layers that adapters may stand beside, those of latent attention and of Mamba with them.
LINEAR_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "linear_q", "linear_kv", "linear_q_proj",
                 "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "in_proj", "out_proj",
                 "output_layer")  # fmt: skip
# What transformers calls them.
OTHER_WORDS = {"q_proj": "linear_qkv", "k_proj": "linear_qkv", "v_proj": "linear_qkv", "qkv_proj": "linear_qkv",
               "o_proj": "linear_proj", "gate_proj": "linear_fc1", "up_proj": "linear_fc1", "gate_up_proj": "linear_fc1",
               "down_proj": "linear_fc2", "lm_head": "output_layer"}  # fmt: skip
SCHEDULES = ("cosine", "constant")
BAD_NUMBER_POLICIES = ("stop", "skip", "ignore")


def _positive(where: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where}.{name}", value, "set a whole number of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up, through Megatron-Core's optimizer.

    Attributes:
        lr: peak learning rate. 2e-5 for 7B and 13B, 1e-5 for 34B and 70B (Xiong et al. 2023, section 2.1).
        min_lr: where the schedule ends.
        warmup_tokens: tokens over which the rate climbs from 0 (the paper: 2,000 steps of 4 Mi tokens).
        schedule: "cosine" to the end of the run, or "constant".
        weight_decay: of AdamW, a step times the learning rate (Llama 2's 0.1).
        beta1: of AdamW: what stays of the mean of gradients (Llama 2's 0.9).
        beta2: of AdamW: what stays of the mean of their squares (Llama 2's 0.95).
        epsilon: of AdamW: added to the root of that mean (Llama 2's 1e-5).
        clip_grad: largest norm of the whole gradient; 0 clips nothing.
        distributed: shard optimizer states over data-parallel ranks (Megatron-Core's distributed optimizer).
    """

    lr: float = 2e-5
    min_lr: float = 2e-6
    warmup_tokens: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-5
    clip_grad: float = 1.0
    distributed: bool = False

    def __post_init__(self):
        if not 0 < self.lr < 1:
            raise ConfigError("optimizer.lr", self.lr, "set a peak learning rate between 0 and 1, such as 2e-5")
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError("optimizer.min_lr", self.min_lr, f"set it between 0 and optimizer.lr ({self.lr})")
        if self.schedule not in SCHEDULES:
            raise ConfigError("optimizer.schedule", self.schedule, did_you_mean(str(self.schedule), SCHEDULES))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}", getattr(self, name), "set a decay rate in [0, 1)")
        if self.epsilon >= 1:
            raise ConfigError("optimizer.epsilon", self.epsilon, "set a number far below 1, such as 1e-5")
        for name in ("warmup_tokens", "weight_decay", "clip_grad", "epsilon"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name}", getattr(self, name), "it cannot be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Where the run computes, and how it is split: NeMo's own trainer and Megatron strategy do both.

    Attributes:
        accelerator: "cpu" or "gpu".
        devices: processes on one node.
        num_nodes: nodes of so many processes.
        precision: "32", "bf16-mixed", "bf16-true", "16-mixed", "fp8" (or "fp8-delayed"), "fp8-current"
            (`nemo_longctx.precision`), or "auto": bf16-mixed on a GPU, 32 on a CPU.
        tensor_model_parallel_size: processes that share each layer's matrices (TP).
        pipeline_model_parallel_size: groups of layers on processes of their own (PP).
        virtual_pipeline_model_parallel_size: chunks of layers of each pipeline stage, interleaved; None for one.
        context_parallel_size: processes that share each sequence (CP).
        sequence_parallel: split what lies between the matrices over the processes of tensor parallelism too.
        recompute: activations that are computed again in the backward pass: "none", "selective", "block:N" or "full".
        offload: layers whose activations wait in host memory: "none", "block:N" or "full"; needs a GPU. A stage of the
            curriculum may name others (`nemo_longctx.activations`).
        tp_comm_overlap: overlap tensor parallelism's communication with its products (Transformer Engine's buffers, which hold
            one size of micro batch).
        fsdp: "none", or "megatron": shard weights and gradients too over data-parallel ranks, where the host has it.
        val_every_tokens: tokens between validations; 0 validates only at the end.
        limit_val_batches: micro batches of each validation set, spread over it; the same windows in every layout.
        log_every_n_steps: optimizer steps between two lines of the training log.
    """

    accelerator: str = "gpu"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "auto"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    offload: str = "none"
    tp_comm_overlap: bool = False
    fsdp: str = "none"
    val_every_tokens: int = 0
    limit_val_batches: int = 8
    log_every_n_steps: int = 1

    def __post_init__(self):
        if self.accelerator not in ("cpu", "gpu"):
            raise ConfigError("trainer.accelerator", self.accelerator, "set cpu or gpu")
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16-mixed" if self.accelerator == "gpu" else "32")
        if str(self.precision) not in PRECISIONS:
            meant = ALIASES.get(str(self.precision))
            mend = f"did you mean {meant!r}?" if meant else did_you_mean(str(self.precision), PRECISIONS)
            raise ConfigError("trainer.precision", self.precision, mend)
        object.__setattr__(self, "precision", str(self.precision))
        check_trainer(self)
        _positive("trainer", self, "devices", "num_nodes", "limit_val_batches", "log_every_n_steps")
        _positive("trainer", self, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        if self.virtual_pipeline_model_parallel_size is not None:
            _positive("trainer", self, "virtual_pipeline_model_parallel_size")
            if self.pipeline_model_parallel_size == 1:
                mend = "needs trainer.pipeline_model_parallel_size above 1; leave it out"
                key = "trainer.virtual_pipeline_model_parallel_size"
                raise ConfigError(key, self.virtual_pipeline_model_parallel_size, mend)
        if self.val_every_tokens < 0:
            raise ConfigError("trainer.val_every_tokens", self.val_every_tokens, "set 0 (only at the end) or more")
        if self.world_size % self.model_parallel_size:
            mend = f"the {self.world_size} processes must divide by tensor x pipeline x context = {self.model_parallel_size}"
            raise ConfigError("trainer.devices", self.devices, mend)
        recomputed_layers(self.recompute, 1, key="trainer.recompute")
        offloaded_layers(self.offload, 1, key="trainer.offload")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("trainer.sequence_parallel", True, "needs trainer.tensor_model_parallel_size above 1")

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.devices * self.num_nodes

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that read different windows."""
        return self.world_size // self.model_parallel_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Attributes:
    every_tokens: tokens between two checkpoints that a killed run goes on from; 0 saves only at the end.
    keep: how many of the best by validation loss are kept besides the last.
    keep_last: how many of the newest are kept; above 1 there is one before, should the newest not be readable.
    """

    every_tokens: int = 0
    keep: int = 0
    keep_last: int = 1

    def __post_init__(self):
        if self.every_tokens < 0:
            raise ConfigError("checkpoint.every_tokens", self.every_tokens, "set 0 (only at the end) or more")
        if self.keep < 0:
            raise ConfigError("checkpoint.keep", self.keep, "set 0 or more")
        if self.keep_last < 1:
            raise ConfigError("checkpoint.keep_last", self.keep_last, "set 1 or more: a run goes on from its newest checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """Attributes:
    fallback: where the newest checkpoint cannot be read, go on from the newest before it that can, instead of stopping.
    """

    fallback: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadNumbersConfig:
    """What a run does where its numbers go wrong. Each is "stop" (end, naming step, stage, tokens and documents), "skip" (name
    them, and leave this step's update out) or "ignore" (name them, and train on).

    Attributes:
        not_finite: "stop", "skip" or "ignore" for NaN or infinity in loss or gradient.
        spike: "stop", "skip" or "ignore" for a gradient norm (before clipping) or a loss that jumps.
        spike_factor: a spike is over this many times the median of the window.
        spike_window: steps of the window; nothing is a spike before it is half full.
    """

    not_finite: str = "stop"
    spike: str = "ignore"
    spike_factor: float = 10.0
    spike_window: int = 64

    def __post_init__(self):
        for name in ("not_finite", "spike"):
            if getattr(self, name) not in BAD_NUMBER_POLICIES:
                mend = did_you_mean(str(getattr(self, name)), BAD_NUMBER_POLICIES)
                raise ConfigError(f"bad_numbers.{name}", getattr(self, name), mend)
        if not (is_finite(self.spike_factor) and self.spike_factor > 1):
            raise ConfigError("bad_numbers.spike_factor", self.spike_factor, "set a number above 1, such as 10")
        if self.spike_window < 2:
            raise ConfigError("bad_numbers.spike_window", self.spike_window, "set 2 steps or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters in place of full tuning (Hu et al. 2021), through `llm.peft.LoRA`.

    Attributes:
        dim: rank of the adapters.
        alpha: they are scaled by alpha / dim.
        dropout: on the adapters' input, while training.
        target_modules: Megatron-Core's names of the linear layers that get adapters.
    """

    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

    def __post_init__(self):
        _positive("lora", self, "dim", "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError("lora.dropout", self.dropout, "must be in [0, 1)")
        if not self.target_modules:
            raise ConfigError("lora.target_modules", [], "name at least one layer, such as linear_qkv")
        for name in self.target_modules:
            if "*" not in name and name not in LINEAR_LAYERS:
                meant = OTHER_WORDS.get(name)
                mend = f"did you mean {meant!r}?" if meant else did_you_mean(name, LINEAR_LAYERS)
                what = "is no linear layer of Megatron-Core, nor a pattern with a * (*.layers.0.*.linear_qkv)"
                raise ConfigError("lora.target_modules", name, f"{what}; {mend}")
