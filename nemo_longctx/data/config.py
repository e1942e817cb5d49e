"""Every key of `data`, for pretraining and for instruction tuning: types, defaults and checks, without the host.

The data modules of the adapters are built through these, and recipes are checked by them at compose time. A setting is added
here and in the signature of its data module; a test compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from nemo_longctx.config import ConfigError
from nemo_longctx.data.best_fit import Packing
from nemo_longctx.data.evaluation import EvaluationConfig
from nemo_longctx.data.mixture import MixConfig
from nemo_longctx.data.sft import InstructionConfig

MOST_WORKERS = 1024  # more processes than a node can start


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DataSettings:
    """What both kinds of data have.

    Attributes:
        validation: held-out sets whose loss is measured while the model trains, each under a name of its own.
        test: held-out sets of Lightning's `Trainer.test`, for scripts of your own; `train` and `sft` read none of them.
        cache_dir: where the order of documents (or tokenized instances) is kept; None: a place that the run chooses.
        allow_change: go on from a checkpoint whose data or config differ, instead of stopping.
        num_workers: data loader processes of each rank.
        pin_memory: page-locked batches; None: where there is CUDA.
        persistent_workers: keep the processes of a loader when it is done.
        output_log: log consumed tokens, sequence length and global batch.
    """

    validation: tuple[EvaluationConfig, ...] = ()
    test: tuple[EvaluationConfig, ...] = ()
    cache_dir: str | None = None
    allow_change: bool = False
    num_workers: int = 2
    pin_memory: bool | None = None
    persistent_workers: bool = False
    output_log: bool = True

    def __post_init__(self):
        for name in ("cache_dir", "tokenizer", "after"):
            value = getattr(self, name, None)
            if value is not None and not value.strip():
                raise ConfigError(f"data.{name}", value, "names nothing; leave it out, or name one")
        for mode in ("validation", "test"):
            names = [each.name for each in getattr(self, mode)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError(f"data.{mode}.name", twice[0], "two sets have this name; give each its own")
        if not 0 <= self.num_workers <= MOST_WORKERS:
            raise ConfigError("data.num_workers", self.num_workers, f"0 (read in the training process) to {MOST_WORKERS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_DataSettings):
    """What a run of pretraining reads.

    Attributes:
        mix: the corpora and their shares.
        packing: `concatenate` cuts windows from the stream of documents (the paper); `best_fit` cuts no document that fits.
        document_masking: keep documents apart (`cu_seqlens`, positions that restart); off: causal over the window (the paper).
        after: a base run (its directory, or a checkpoint): begin behind the documents that it read.
        tokenizer: Hugging Face name or directory, which checkpoints and exports carry; the data are tokens already.
    """

    mix: MixConfig
    packing: Packing = "concatenate"
    document_masking: bool = False
    after: str | None = None
    tokenizer: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructDataConfig(_DataSettings):
    """What a run of instruction tuning reads.

    Attributes:
        tokenizer: folder or hub name of the model's tokenizer (a fast one of transformers).
        template: `tokenizer`, `llama2`, or the path of a Jinja file.
        short: JSONL files of conversations, {"messages": [...]} a line, which are packed into windows.
        long: JSONL files of conversations, each a window of its own, as `instances.jsonl` of `nemo-longctx instruct generate`.
        pretraining: a mix of corpora, where the blend has any.
        blend: share of the run's tokens (padding aside) of each of `short`, `long` and `pretraining`; they add up to 1.
        prompt_loss_weight: of a long instance's prompt tokens, 0 to 1, where an answer's token counts 1 (Xiong et al. 2023: 1).
        on_too_long: what to do with an instance that does not fit a window: `error`, or `drop`, counted.
    """

    tokenizer: str
    template: str = "tokenizer"
    short: tuple[str, ...] = ()
    long: tuple[str, ...] = ()
    pretraining: MixConfig | None = None
    blend: Mapping[str, float]
    prompt_loss_weight: float = 1.0
    on_too_long: Literal["error", "drop"] = "error"

    def __post_init__(self):
        super().__post_init__()
        if not self.blend:
            raise ConfigError("data.blend", dict(self.blend), "missing; set shares such as {short: 0.5, long: 0.5}")
        InstructionConfig(blend=self.blend, prompt_loss_weight=self.prompt_loss_weight, on_too_long=self.on_too_long)
        for name in self.blend:
            if not getattr(self, name):
                share = f"{self.blend[name]:.0%}"
                raise ConfigError(f"data.{name}", None, f"missing; the blend asks for {share} of it: name its files")
