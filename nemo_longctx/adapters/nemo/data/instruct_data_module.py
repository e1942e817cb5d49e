"""`LongInstructDataModule`: instruction data in NeMo's place for data, under the same clock as pretraining.

recipe.data = run.Config(LongInstructDataModule, curriculum={"stages": [{"until": 1.0, "seq_length": 16384}], ...},
                         tokenizer="my_model", cache_dir="cache", short=["chat.jsonl"], long=["instances.jsonl"],
                         blend={"short": 0.7, "long": 0.3})
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from nemo_longctx.adapters.nemo.data.data_module import LongContextDataModule
from nemo_longctx.adapters.nemo.data.sampler import CurriculumDataSampler
from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.best_fit import open_windows
from nemo_longctx.data.config import InstructDataConfig
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.mixture import Documents
from nemo_longctx.data.order import Order, open_order
from nemo_longctx.data.sft import InstructionConfig, InstructionWindows
from nemo_longctx.data.sft_instances import Instances, chat_template, open_instances
from nemo_longctx.data.windows import Windows
from nemo_longctx.hf.tokenizer import open_tokenizer


class LongInstructDataModule(LongContextDataModule):
    """Short instances packed, long ones padded, pretraining text as it is: blended by tokens, instances kept apart.

    The model must normalise its loss by tokens over the whole step (`calculate_per_token_loss`): windows hold very different
    numbers of loss tokens, and a mean of means would weigh them wrongly.

    Args:
        curriculum: fields of `Curriculum`, with one stage; its `seq_length` is the window.
        tokenizer: folder or hub name of the model's tokenizer (a fast one of transformers).
        short, long: JSONL files of conversations; `instances.jsonl` of `nemo-longctx instruct generate` is a long one.
        pretraining: fields of `MixConfig`, where the blend has any.
        blend, prompt_loss_weight, on_too_long: as in `InstructionConfig`.
        template: `tokenizer`, `llama2`, or the path of a Jinja file.
        validation, test: fields of `EvaluationConfig`, one mapping a set.
        seed, cache_dir, allow_change, num_workers, pin_memory, persistent_workers, output_log: as in `LongContextDataModule`;
            `cache_dir` is required, tokenized instances are kept there.

    Raises:
        ConfigError: settings that contradict each other; data that do not fit (in `setup`).
    """

    def __init__(
        self,
        curriculum: Mapping[str, Any],
        *,
        tokenizer: str,
        cache_dir: str,
        blend: Mapping[str, float],
        short: Sequence[str] = (),
        long: Sequence[str] = (),
        pretraining: Mapping[str, Any] | None = None,
        prompt_loss_weight: float = 1.0,
        on_too_long: str = "error",
        template: str = "tokenizer",
        validation: Sequence[Mapping[str, Any]] = (),
        test: Sequence[Mapping[str, Any]] = (),
        seed: int = 1234,
        allow_change: bool = False,
        num_workers: int = 2,
        pin_memory: bool | None = None,
        persistent_workers: bool = False,
        output_log: bool = True,
    ):
        pl.LightningDataModule.__init__(self)  # the parent's own would ask for a mix of corpora
        values: dict[str, Any] = {"tokenizer": tokenizer, "template": template, "short": short, "long": long, "blend": blend}
        values |= {"pretraining": pretraining, "prompt_loss_weight": prompt_loss_weight, "on_too_long": on_too_long}
        values |= {"validation": validation, "test": test, "cache_dir": cache_dir, "allow_change": allow_change}
        values |= {"num_workers": num_workers, "pin_memory": pin_memory, "persistent_workers": persistent_workers}
        settings = build(InstructDataConfig, {**values, "output_log": output_log}, where="data")
        self.tokenizer_name, self.template = settings.tokenizer, settings.template
        self.files = {"short": settings.short, "long": settings.long}
        self.mix = settings.pretraining  # type: ignore[assignment]
        self.curriculum_values, self.seed, self.cache_dir, self.document_masking = dict(curriculum), seed, cache_dir, True
        self._take_settings(settings)
        self.tokenizer = None
        self.curriculum = self._curriculum(max_steps=None)
        if len(self.curriculum.plan) != 1:
            mend = "instruction tuning keeps one window length; name one stage"
            raise ConfigError("curriculum.stages", len(self.curriculum.plan), mend)
        self.config = InstructionConfig(
            seq_length=self.seq_length,
            blend=settings.blend,
            prompt_loss_weight=settings.prompt_loss_weight,
            on_too_long=settings.on_too_long,
            seed=seed,
        )
        self.data_sampler = CurriculumDataSampler(self.curriculum, document_masking=True, output_log=output_log)
        self.windows: InstructionWindows | None = None  # type: ignore[assignment]
        self.pretraining_order: Order | None = None
        self.history, self.stream, self._restored = [], None, None

    @cached_property
    def hf_tokenizer(self) -> Any:
        """The tokenizer of transformers that conversations are written with.

        Raises:
            ConfigError: none there, or none with a fast form.
        """
        try:
            tokenizer = open_tokenizer(self.tokenizer_name)
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(
                "data.tokenizer", self.tokenizer_name, f"no tokenizer can be loaded from there ({why})"
            ) from error
        if not tokenizer.is_fast:
            raise ConfigError("data.tokenizer", self.tokenizer_name, "it has no fast form; save one with a tokenizer.json")
        return tokenizer

    @property
    def chat_template(self) -> str:
        """The Jinja text that conversations are written by, for the exported model to carry."""
        return chat_template(self.template, self.hf_tokenizer)

    def setup(self, stage: str = "") -> None:
        """Fix the run's length, tokenize or find the instances, and plan the windows."""
        if self.trainer is not None and stage in ("", "fit"):
            self._check_loss(self.trainer.strategy.lightning_module.config)
            self.curriculum = self._curriculum(max_steps=self.trainer.max_steps)
            self._agree_on_length()
            self.data_sampler.curriculum = self.curriculum
            self.open_windows()
        self._check_restored()

    def open_windows(self) -> InstructionWindows:
        """The run's windows, for as many samples as its curriculum has."""
        tokenizer = self.hf_tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        instances = {name: self._open(name) for name in self.files if name in self.config.blend}
        self.windows = InstructionWindows(
            self.config,
            n_samples=self.curriculum.total_samples,
            pad_id=0 if pad_id is None else pad_id,
            pretraining=self._pretraining if self.mix else None,
            **instances,
        )
        self._report_blend(self.windows)
        return self.windows

    def _open(self, name: str) -> list[Instances]:
        for path in self.files[name]:
            if not Path(path).is_file():
                raise ConfigError(f"data.{name}", path, "no such file")
        settings = {"tokenizer": self.hf_tokenizer, "template": self.chat_template, "cache_dir": self.cache_dir}
        return [open_instances(path, **settings) for path in self.files[name]]

    def _pretraining(self, n_windows: int) -> Windows:
        """So many windows of the pretraining mix."""
        values = {"stages": [{"until": 1.0, "seq_length": self.seq_length}], "tokens_per_step": self.seq_length}
        curriculum = build(Curriculum, values | {"total_tokens": n_windows * self.seq_length}, where="data.pretraining")
        documents = Documents.open(self.mix)
        documents.vocab_size = self._vocab_size
        self.pretraining_order = open_order(self.mix, documents, curriculum, seed=self.seed, cache_dir=str(self.cache_dir))
        return open_windows(self.pretraining_order, curriculum, packing="concatenate", seed=self.seed, document_masking=True)

    def _report_blend(self, windows: InstructionWindows) -> None:
        counts = {name: sum(windows.source(i) == name for i in range(len(windows))) for name in self.config.blend}
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        dropped = f"; {windows.too_long} instances too long for a window were dropped" if windows.too_long else ""
        rank_zero_info(f"{len(windows)} windows of {self.seq_length} tokens: {listed}{dropped}")

    @property
    def _is_set_up(self) -> bool:
        return self.windows is not None

    def _go_on(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        return (self._compared(state),) * 2

    @property
    def made_of(self) -> dict[str, str]:
        """Hashes of all that the stream depends on, each by the name that a user knows it by."""
        if self.windows is None:
            return {}
        parts: dict[str, Any] = {
            **{f"data.{name}": [_sha256(path) for path in paths] for name, paths in self.files.items()},
            **{f"data.{name}": value for name, value in dataclasses.asdict(self.config).items()},
            "data.template": self.chat_template,
            "data.tokenizer": self.hf_tokenizer.backend_tokenizer.to_str(),
            "data.pretraining": self.pretraining_order.digest if self.pretraining_order else None,
            "curriculum": self.curriculum.as_dict(),
        }
        return {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()}

    @staticmethod
    def _check_loss(config: Any) -> None:
        if not config.calculate_per_token_loss:
            mend = "instruction data needs True: else each micro batch counts alike, however few answers it holds"
            raise ConfigError("model.calculate_per_token_loss", False, mend)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
