"""The one schema of a run. Hydra, nemo_run and Python all fill it and hand it to `adapters.nemo.run`.

YAML only overrides what stands here; an unknown key is an error that suggests the nearest known one. Parts that other rooms own
(`rope`, `data`, `curriculum`, `eval`) are those rooms' own dataclasses; the fields of `model` are the host's (`model_fields`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.activations import offloaded_layers, recomputed_layers
from nemo_longctx.config import ConfigError, build, did_you_mean, is_finite, refuse_missing
from nemo_longctx.data.config import DataConfig, InstructDataConfig
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.eval.config import EvalConfig
from nemo_longctx.loggers import logger_names
from nemo_longctx.model_fields import LARGEST_BASE, check_layout, check_model
from nemo_longctx.planning.models import class_sizes, sizes_of
from nemo_longctx.precision import ALIASES, PRECISIONS, check_graphs, check_speed, check_trainer
from nemo_longctx.rope.request import RopeRequest, check_layers_differ, parse_request

SCHEDULES = ("cosine", "constant")
BAD_NUMBER_POLICIES = ("stop", "skip", "ignore")
LONGEST_PART = 255  # bytes of a file's or folder's name on Linux's file systems
LONGEST_NAME = 200  # what a file system takes, and room for a suffix


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
        beta1, beta2, epsilon: of AdamW (Llama 2's 0.9, 0.95, 1e-5).
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
        not_finite: for NaN or infinity in loss or gradient.
        spike: for a gradient norm (before clipping) or a loss that jumps.
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
class RunConfig:
    """What every run has, whatever it reads.

    Attributes:
        name: the run's name; its results are written to `output_dir/name`.
        restore_from: a NeMo checkpoint to go on from (continual pretraining); None starts from random weights.
        model: `config`, a class of `nemo.collections.llm` such as `Llama2Config7B`, and any of its fields. With
            `restore_from` the checkpoint says what the model is: what is named here is compared with its shape, and a
            difference is an error.
        rope: `variant` and its fields (`nemo_longctx.rope.variants`); None keeps what the checkpoint or the config has. Base,
            trained length and factor that are not set are the checkpoint's (`nemo_longctx.rope.request`). `layers`:
            "full_attention" leaves layers with a sliding window plain RoPE, of `local_base` or the base that they have.
        data: what is read.
        eval: what is measured while the model trains; None measures nothing.
        logger: where figures and pictures go besides the run's own files: "none", "tensorboard", "wandb", "mlflow", "csv", or
            a list of several (`nemo_longctx.loggers`).
        curriculum: `stages`, `tokens_per_step`, `total_tokens` (`nemo_longctx.data.curriculum`).
    """

    name: str
    output_dir: str = "runs"
    restore_from: str | None = None
    seed: int = 1234
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope: Mapping[str, Any] | None = None
    data: DataConfig | InstructDataConfig
    curriculum: Curriculum
    eval: EvalConfig | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    resume: ResumeConfig = dataclasses.field(default_factory=ResumeConfig)
    bad_numbers: BadNumbersConfig = dataclasses.field(default_factory=BadNumbersConfig)
    logger: str | tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "logger", logger_names(self.logger))
        if not 1 <= self.seed < 2**32:
            raise ConfigError("seed", self.seed, "set a whole number of at least 1, below 2^32")
        check_run_name(self.name)
        for key, value in (("output_dir", self.output_dir), ("restore_from", self.restore_from)):
            if value is not None:
                _check_place(key, value)
        if not self.restore_from and "config" not in self.model:
            raise ConfigError("model.config", None, "name a config class such as LlamaConfig, or set restore_from")
        if self.rope_variant is not None and self.rope_variant.evaluation_only:
            raise ConfigError("rope.variant", self.rope_variant.variant, "is for evaluation only; train with another variant")
        for key in ("base", "factor"):
            value = (self.rope or {}).get(key)
            if isinstance(value, (int, float)) and value > LARGEST_BASE:
                raise ConfigError(f"rope.{key}", value, f"must be at most {LARGEST_BASE:g}: nothing turns beyond it")
        check_model(self.model)
        self._check_rope_layers()
        check_layout(class_sizes(self.model) | dict(self.model), self.trainer, self.curriculum)
        self._check_activations()
        measured: dict[str, Any] = {"validation": self.data.validation, "evaluates": bool(self.eval and self.eval.tasks)}
        check_speed(self.trainer, self.curriculum, sharded_optimizer=self.optimizer.distributed, **measured)
        # Instances of instruction data are kept apart always.
        check_graphs(self.model, self.curriculum.plan, document_masking=getattr(self.data, "document_masking", True))
        activations = {"recompute": self.trainer.recompute, "offload": self.trainer.offload}
        object.__setattr__(self, "curriculum", self.curriculum.with_activations(**activations))
        for stage in self.curriculum.plan:
            stage.num_microbatches(self.trainer.data_parallel_size)
        for key, tokens in (("trainer.val_every_tokens", self.trainer.val_every_tokens),
                            ("checkpoint.every_tokens", self.checkpoint.every_tokens),
                            ("optimizer.warmup_tokens", self.optimizer.warmup_tokens)):  # fmt: skip
            self.steps(key, tokens)
        if self.checkpoint.keep and not self.data.validation:
            mend = "the best are those of the lowest validation loss, and data.validation names no set; name one, or set 0"
            raise ConfigError("checkpoint.keep", self.checkpoint.keep, mend)
        warmup, total = self.optimizer.warmup_tokens, self.curriculum.total_tokens
        if warmup >= total:
            mend = f"the run has {total} tokens, so its learning rate would never reach optimizer.lr; set less than that, or 0"
            raise ConfigError("optimizer.warmup_tokens", warmup, mend)

    def _check_rope_layers(self) -> None:
        """RoPE by layer type needs layers of two types; what a checkpoint has is looked at where it is opened."""
        asked = self.rope_variant
        if asked is None or not asked.by_layer or self.restore_from:
            return
        sizes = sizes_of(class_sizes(self.model) | dict(self.model))
        sliding = sizes.get("sliding_window") is not None
        full = self.model.get("window_attn_skip_freq") is not None and sizes.get("full_layers") != 0
        check_layers_differ([sliding, sliding and not full])

    def _check_activations(self) -> None:
        named: dict[str, str | None] = {"trainer.offload": self.trainer.offload}
        named |= {f"curriculum.stages[{i}].offload": stage.offload for i, stage in enumerate(self.curriculum.stages)}
        for key, value in named.items():
            if self.trainer.accelerator == "cpu" and value not in (None, "none"):
                mend = "needs a GPU: on the CPU activations lie in host memory already; set none, and recompute to save memory"
                raise ConfigError(key, value, mend)

    @property
    def directory(self) -> Path:
        """Where checkpoints, logs and results of the run are: `output_dir/name`."""
        return Path(self.output_dir).absolute() / self.name

    @property
    def rope_variant(self) -> RopeRequest | None:
        """The position encoding asked for, or None where the checkpoint's or the config's own stays."""
        return None if self.rope is None else parse_request(self.rope)

    @property
    def seq_length(self) -> int:
        """The longest window of the run, tokens."""
        return max(stage.seq_length for stage in self.curriculum.stages)

    def steps(self, key: str, tokens: int) -> int:
        """`tokens` as optimizer steps: the same number of tokens in each, whatever the sequence length.

        Raises:
            ConfigError: `tokens` is no multiple of the tokens in a step.
        """
        steps, rest = divmod(tokens, self.curriculum.tokens_per_step)
        if rest:
            near = max(1, round(tokens / self.curriculum.tokens_per_step)) * self.curriculum.tokens_per_step
            mend = f"set a multiple of curriculum.tokens_per_step ({self.curriculum.tokens_per_step}); the nearest is {near}"
            raise ConfigError(key, tokens, mend)
        return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig(RunConfig):
    """A run of pretraining, from random weights or from a checkpoint."""

    data: DataConfig


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructRecipe(RunConfig):
    """A run of instruction tuning, from an extended checkpoint.

    Attributes:
        lora: adapters; None tunes all weights.
    """

    data: InstructDataConfig
    lora: LoRAConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.restore_from:
            raise ConfigError("restore_from", None, "name the extended checkpoint to tune")
        if len(self.curriculum.stages) != 1:
            mend = "instruction tuning keeps one window length; name one stage"
            raise ConfigError("curriculum.stages", len(self.curriculum.stages), mend)


def load_recipe(values: Mapping[str, Any]) -> RecipeConfig:
    """The recipe that a composed mapping describes.

    Raises:
        ConfigError: an unknown key or a bad value, by its dotted name.
    """
    refuse_missing(values)
    return build(RecipeConfig, values)


def load_instruct_recipe(values: Mapping[str, Any]) -> InstructRecipe:
    """The recipe of instruction tuning that a composed mapping (conf/sft.yaml) describes.

    Raises:
        ConfigError: an unknown key or a bad value, by its dotted name.
    """
    refuse_missing(values)
    return build(InstructRecipe, values)


def _check_place(key: str, path: str) -> None:
    if not path.strip():
        raise ConfigError(key, path, "names no place; leave it out, or name one")
    if longest := next((part for part in path.split("/") if len(part.encode()) > LONGEST_PART), None):
        raise ConfigError(key, path, f"{longest[:20]}... is longer than a file system takes: at most {LONGEST_PART} bytes")


def check_run_name(name: str, *, key: str = "name") -> None:
    """The name is a folder of `output_dir`."""
    if len(name.encode()) > LONGEST_NAME:
        raise ConfigError(key, name, f"is a folder's name: at most {LONGEST_NAME} bytes")
    if not name or name in (".", "..") or "/" in name:
        raise ConfigError(key, name, "is a folder's name below output_dir: letters, digits, - and _, without a slash")
