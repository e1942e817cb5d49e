"""The one schema of a run. Hydra, nemo_run and Python all fill it and hand it to `adapters.nemo.run`.

YAML only overrides what stands here; an unknown key is an error that suggests the nearest known one. Parts that other rooms own
(`rope`, `data`, `curriculum`, `eval`) are those rooms' own dataclasses, the rest are `recipe_parts`; the fields of `model` are
the host's (`model_fields`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError, build, refuse_missing
from nemo_longctx.cross_checks import check_base_is_another, check_head, check_pipeline, check_validation, check_windowed
from nemo_longctx.data.config import DataConfig, InstructDataConfig
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.eval.config import EvalConfig
from nemo_longctx.loggers import logger_names
from nemo_longctx.model_fields import LARGEST_BASE, check_layout, check_model
from nemo_longctx.planning.models import class_sizes, sizes_of
from nemo_longctx.precision import check_graphs, check_speed
from nemo_longctx.recipe_parts import (
    BadNumbersConfig,
    CheckpointConfig,
    LoRAConfig,
    OptimizerConfig,
    ResumeConfig,
    TrainerConfig,
)
from nemo_longctx.rope.request import RopeRequest, check_layers_differ, parse_request

LONGEST_PART = 255  # bytes of a file's or folder's name on Linux's file systems
_VARIABLE = re.compile(r"(?:^|/)\$\{?([A-Za-z_]\w*)\}?(?=/|$)")  # a whole part of a path
LONGEST_NAME = 200  # what a file system takes, and room for a suffix


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has, whatever it reads.

    Attributes:
        name: the run's name; its results are written to `output_dir/name`.
        output_dir: the folder of all runs.
        seed: of all that is drawn: weights that begin at random, the order of the data, dropout.
        restore_from: a NeMo checkpoint or a run's directory to go on from (continual pretraining); None starts from random
            weights.
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
        check_base_is_another(self.restore_from, self.directory, self.name)
        if not self.restore_from and "config" not in self.model:
            raise ConfigError("model.config", None, "name a config class such as LlamaConfig, or set restore_from")
        if self.rope_variant is not None and self.rope_variant.evaluation_only:
            raise ConfigError("rope.variant", self.rope_variant.variant, "is for evaluation only; train with another variant")
        for key in ("base", "factor", "local_base"):
            value = (self.rope or {}).get(key)
            if isinstance(value, (int, float)) and value > LARGEST_BASE:
                raise ConfigError(f"rope.{key}", value, f"must be at most {LARGEST_BASE:g}: nothing turns beyond it")
        check_model(self.model)
        if not self.restore_from:
            check_head(self.model)
        self._check_rope_layers()
        if not self.restore_from:
            check_windowed(self.model)
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
        check_pipeline(self.model, self.trainer, self.curriculum, evaluates=bool(self.eval and self.eval.tasks))
        check_validation(self.data.validation, self.trainer, self.curriculum)
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
class InstructRecipe(RunConfig):
    """A run of instruction tuning, from an extended checkpoint.

    Attributes:
        lora: adapters; None tunes all weights.
    """

    data: InstructDataConfig
    lora: LoRAConfig | None = None

    def __post_init__(self):
        if not self.restore_from:
            raise ConfigError("restore_from", None, "name the extended checkpoint to tune")
        super().__post_init__()
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
    if not path.isprintable():
        raise ConfigError(key, path, "names no place: a path has no control characters, such as a line's end")
    if "://" in path:
        raise ConfigError(key, path, "is an address, and a path of this machine is needed: mount or download it first")
    if path.startswith("~"):
        raise ConfigError(key, path, "only ~/ at the front is read as your home; write the whole path")
    if variable := _VARIABLE.search(path):
        raise ConfigError(key, path, f"an environment variable is written ${{oc.env:{variable[1]}}} here")
    if longest := next((part for part in path.split("/") if len(part.encode()) > LONGEST_PART), None):
        raise ConfigError(key, path, f"{longest[:20]}... is longer than a file system takes: at most {LONGEST_PART} bytes")


def check_run_name(name: str, *, key: str = "name") -> None:
    """The name is a folder of `output_dir`."""
    if len(name.encode()) > LONGEST_NAME:
        raise ConfigError(key, name, f"is a folder's name: at most {LONGEST_NAME} bytes")
    if not name.strip() or name in (".", "..") or "/" in name or name != name.strip() or not name.isprintable():
        raise ConfigError(key, name, "is a folder's name below output_dir: letters, digits, - and _, without a slash")
