"""`LongContextDataModule`: the token-addressed stream in NeMo's place for data; nothing else of a recipe has to change.

recipe.data = run.Config(LongContextDataModule, mix={"sources": [{"path": "my_corpus"}]},
                         curriculum={"stages": [...], "tokens_per_step": 4194304})
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.io.mixin import IOMixin
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from nemo_longctx.adapters.nemo.data.datasets import EvaluationDataset, WindowDataset, collate
from nemo_longctx.adapters.nemo.data.sampler import CurriculumDataSampler, command_with
from nemo_longctx.adapters.nemo.model.config import checkpoint_directory
from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.best_fit import Packing
from nemo_longctx.data.config import DataConfig, InstructDataConfig
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.mixture import MixConfig, mix_dict
from nemo_longctx.data.stream import Stream, report
from nemo_longctx.data.windows import Windows
from nemo_longctx.files import can_be_written


class LongContextDataModule(pl.LightningDataModule, IOMixin):
    """Training on a mix under a curriculum, validation and test on named sets at fixed lengths.

    All arguments are plain values, so that NeMo can write them beside a checkpoint.

    Args:
        mix: fields of `MixConfig`.
        curriculum: fields of `Curriculum`; without `total_tokens` the run is as long as the trainer's `max_steps`.
        validation, test: fields of `EvaluationConfig`, one mapping a set.
        packing: `concatenate` cuts windows from the stream of documents (the paper); `best_fit` cuts no document that fits.
        document_masking: keep documents apart (`cu_seqlens`, positions that restart); off: causal over the window (the paper).
        seed: of all random choices.
        cache_dir: where the order of documents is kept, for all processes; None: `order_cache` beside the first source, or in
            the run's own folder where that cannot be written.
        after: a base run (its directory, or a checkpoint): begin behind the documents that it read, where they are in this mix.
        allow_change: go on from a checkpoint under changes that are refused otherwise. More tokens, other stages, lengths and
            weights, and more sources need it not: the stream goes on with what was not read yet (`nemo_longctx.data.history`).
        num_workers: data loader processes of each rank.
        pin_memory: page-locked batches; None: where there is CUDA.
        persistent_workers: keep the processes of a loader when it is done.
        tokenizer: handed on to the model; the data are tokens already.
        output_log: log consumed tokens, sequence length and global batch.

    Raises:
        ConfigError: settings that contradict each other; data that cannot give what the mix asks (in `setup`).
    """

    def __init__(
        self,
        mix: Mapping[str, Any],
        curriculum: Mapping[str, Any],
        *,
        validation: Sequence[Mapping[str, Any]] = (),
        test: Sequence[Mapping[str, Any]] = (),
        packing: Packing = "concatenate",
        document_masking: bool = False,
        seed: int = 1234,
        cache_dir: str | None = None,
        after: str | None = None,
        allow_change: bool = False,
        num_workers: int = 2,
        pin_memory: bool | None = None,
        persistent_workers: bool = False,
        tokenizer: Any = None,
        output_log: bool = True,
    ):
        super().__init__()
        values: dict[str, Any] = {"mix": mix, "packing": packing, "document_masking": document_masking}
        values |= {"validation": validation, "test": test, "cache_dir": cache_dir, "allow_change": allow_change}
        values["after"] = after
        values |= {"num_workers": num_workers, "pin_memory": pin_memory, "persistent_workers": persistent_workers}
        config = build(DataConfig, {**values, "output_log": output_log}, where="data")
        self.curriculum_values, self.seed, self.tokenizer = dict(curriculum), seed, tokenizer
        self.mix, self.packing, self.document_masking = config.mix, config.packing, config.document_masking
        self.cache_dir, self.after = config.cache_dir, config.after
        self._take_settings(config)
        # Until the trainer tells the length, each stage has at least one step: enough for batch sizes and lengths.
        self.curriculum = self._curriculum(max_steps=None)
        self.data_sampler = CurriculumDataSampler(self.curriculum, document_masking=document_masking, output_log=output_log)
        self.windows: Windows | None = None
        self.stream: Stream | None = None
        self.run_directory: str | None = None  # of the run, where a launcher knows it; else the trainer's root
        self.history: list[dict[str, Any]] = []  # changes of data or config that a user allowed
        self._restored: dict[str, Any] | None = None

    def _take_settings(self, config: DataConfig | InstructDataConfig) -> None:
        """What this module and that of instruction data have in common."""
        if self.seed < 0:
            raise ConfigError("data.seed", self.seed, "a whole number of at least 0")
        self.evaluation = {"validation": list(config.validation), "test": list(config.test)}
        self.allow_change, self.num_workers = config.allow_change, config.num_workers
        self.persistent_workers = config.persistent_workers and config.num_workers > 0
        self.pin_memory = torch.cuda.is_available() if config.pin_memory is None else config.pin_memory

    def io_transform_args(self, init_fn: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """NeMo's hook: what it writes beside a checkpoint. Hydra hands over containers of its own, which NeMo cannot write."""
        captured = super().io_transform_args(init_fn, *args, **kwargs)
        return {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in captured.items()
        }

    # What NeMo reads from a data module

    @property
    def seq_length(self) -> int:
        """The longest sequence of the run, which the model must hold."""
        return max(stage.seq_length for stage in self.curriculum.plan)

    @property
    def micro_batch_size(self) -> int:
        """Of the first stage."""
        return self.curriculum.plan[0].micro_batch_size

    @property
    def global_batch_size(self) -> int:
        """Of the first stage."""
        return self.curriculum.plan[0].global_batch_size

    def setup(self, stage: str = "") -> None:
        """Fix the run's length, open the data, and build or find their order: on a restart once the checkpoint is read."""
        if self.trainer is not None and stage in ("", "fit"):
            self.curriculum = self._curriculum(max_steps=self.trainer.max_steps)
            self._agree_on_length()
            self.data_sampler.curriculum = self.curriculum
            settings: dict[str, Any] = {"packing": self.packing, "document_masking": self.document_masking, "seed": self.seed}
            self.stream = Stream(self.mix, self.curriculum, cache_dir=self._cache_dir(), **settings)
            self.stream.documents.vocab_size = self._vocab_size
            if not getattr(self.trainer, "ckpt_path", None):
                self._begin()
        self._check_restored()

    def _begin(self) -> None:
        """Open the stream of a run that begins, behind its base run if it has one."""
        if self.stream is None:
            raise RuntimeError("setup('fit') comes first: it opens the data")
        checkpoint = None
        if self.after is not None:
            try:
                checkpoint = checkpoint_directory(self.after)
            except ConfigError as error:
                raise ConfigError("data.after", self.after, error.mend) from error
            rank_zero_info(f"data.after: the stream begins behind what {checkpoint} read")
        self.windows = self.stream.begin(self.after, checkpoint)
        self._report(self.windows)

    def _cache_dir(self) -> str:
        """Where the order goes: a folder that can be written."""
        if self.cache_dir:
            return self.cache_dir
        beside = Path(_first_path(self.mix)).parent / "order_cache"
        if can_be_written(beside):
            return str(beside)
        return str(Path(self.run_directory or self.trainer.default_root_dir) / "order_cache")

    def train_dataloader(self) -> WrappedDataLoader:
        """One loader for all stages, from the address where the run stands."""
        stage = self.curriculum.stage_at_token(self.data_sampler.start_token)
        missing = self.data_sampler.missing_sizes(stage)
        if missing:
            what = f"stage {stage.number} begins here and needs other parallel sizes; start it with {command_with(missing)}"
            raise ConfigError("curriculum.stages", stage.config.parallel_sizes, what)
        if self.windows is None:  # a restart from a checkpoint that says nothing of the data
            self._begin()
        self._align_trainer()
        return self._loader(WindowDataset(self.windows), "train")  # type: ignore[arg-type]  # `_begin` opened it

    def val_dataloader(self) -> WrappedDataLoader | list[Any]:
        """All validation sets, one after the other; [] without any."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> WrappedDataLoader | list[Any]:
        """All test sets, one after the other; [] without any."""
        return self._evaluation_loader("test")

    def reconfigure_limit_batches(self) -> None:
        """NeMo's hook: limits count micro batches of each set over all ranks, where Lightning would count those of a loader."""
        trainer, sampler = self.trainer, self.data_sampler
        if trainer.limit_train_batches != 1.0:
            mend = "the curriculum is the length of the run; set trainer.max_steps or curriculum.total_tokens instead"
            raise ConfigError("trainer.limit_train_batches", trainer.limit_train_batches, mend)
        for mode, name in (("validation", "limit_val_batches"), ("test", "limit_test_batches")):
            limit = getattr(trainer, name)
            if isinstance(limit, float) and limit not in (0.0, 1.0):
                raise ConfigError(
                    f"trainer.{name}", limit, "micro batches of each set (a whole number), 1.0 for all, or 0 for none"
                )
            sampler.evaluation_limits[mode] = None if isinstance(limit, float) else limit
            if limit:
                setattr(trainer, name, 1.0)
        trainer.num_sanity_val_steps *= sampler.evaluation_microbatches

    def documents_of(self, samples: Iterable[int]) -> list[str]:
        """`SOURCE:NUMBER` of the documents of some samples of the run."""
        return [] if self.windows is None else self.windows.documents_of(samples)

    # The checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, and of what data and config the stream is made."""
        token = self.trainer.global_step * self.curriculum.tokens_per_step
        return {
            "token_address": token,
            "consumed_samples": self.curriculum.samples_at_token(token),
            "made_of": self.made_of,
            "history": self.history,
            **self._stream_state(),
        }

    def _stream_state(self) -> dict[str, Any]:
        return self.stream.state() if self.stream is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the checkpoint's token address.

        Raises:
            ConfigError: the stream is made of other data or another config, and `allow_change` is not set.
        """
        self._restored = state_dict
        self._check_restored()

    @property
    def made_of(self) -> dict[str, str]:
        """Hashes of all that the stream depends on, each by the name that a user knows it by."""
        if self.windows is None:
            return {}
        order = self.windows.order
        parts = {
            "data": order.documents.fingerprint,
            "data.mix": mix_dict(self.mix),
            "curriculum": self.curriculum.as_dict(),
            "data.seed": self.seed,
            "data.packing": self.packing,
            "data.document_masking": self.document_masking,
            "order": order.digest,
        }
        return {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()}

    def _check_restored(self) -> None:
        """Go on from a loaded state, once data and state are both there."""
        if self._restored is None or not self._is_set_up:
            return
        state, self._restored = self._restored, None
        token = state["token_address"]
        if token % self.curriculum.tokens_per_step:
            mend = f"the checkpoint stands at {token} tokens, which is no whole number of such steps; keep the old value"
            raise ConfigError("curriculum.tokens_per_step", self.curriculum.tokens_per_step, mend)
        if token > self.curriculum.total_tokens:
            mend = f"the run is shorter than what the checkpoint has behind it, {token} tokens; set at least that"
            raise ConfigError("curriculum.total_tokens", self.curriculum.total_tokens, mend)
        self.history = list(state["history"])
        changed, refused = self._go_on(state)
        if changed:
            what = f"{', '.join(changed)} changed since the checkpoint at {token} tokens"
            if refused and not self.allow_change:
                raise ConfigError("data.allow_change", False, f"{what}; restore them, or set it to true to go on from there")
            self.history.append({"token_address": token, "changed": changed, "made_of": self.made_of})
            how = ", as data.allow_change says" if refused else ": what was read stays read, and comes last"
            rank_zero_info(f"{what}; going on at this address of the new stream{how}")
        self.data_sampler.resume_at(token)

    @property
    def _is_set_up(self) -> bool:
        return self.stream is not None

    def _go_on(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Open the stream behind a checkpoint's. Returns what changed since, and what of it needs `allow_change`."""
        if self.stream is None:
            raise RuntimeError("setup('fit') comes first: it opens the data")
        if not state.get("segments"):  # an earlier version's: what it read is not known
            self.windows = self.stream.windows or self.stream.begin()
            return (self._compared(state),) * 2
        found = self.stream.go_on(state, state["token_address"], after=self.after, allow_change=self.allow_change)
        self.mix = self.stream.mix
        for now, was in self.stream.kept_names.items():
            rank_zero_info(f"the source {now} is {was} of the checkpoint, moved: it keeps that name")
        for line in self.stream.lost:
            rank_zero_info(f"{line}; its documents count as unread, as data.allow_change says")
        if self.stream.windows is not None and self.stream.windows is not self.windows:
            self.windows = self.stream.windows
            if state["token_address"] < self.curriculum.total_tokens:  # else nothing of it is read any more
                self._report(self.windows)
        return found

    def _compared(self, state: Mapping[str, Any]) -> list[str]:
        """What of `made_of` is not as the checkpoint says."""
        now = self.made_of
        return sorted(name for name in now if state["made_of"].get(name) != now[name])

    def _curriculum(self, *, max_steps: int | None) -> Curriculum:
        """The curriculum for a trainer that makes `max_steps` (None: not known yet)."""
        values = dict(self.curriculum_values)
        if values.get("total_tokens") is None:
            per_step = values.get("tokens_per_step") or 0
            if max_steps is not None and max_steps < 1:
                raise ConfigError(
                    "curriculum.total_tokens", None, "set it, or trainer.max_steps: the stages are shares of the run"
                )
            values["total_tokens"] = per_step * (max_steps or 1_000_000)
        return build(Curriculum, values, where="curriculum")

    def _agree_on_length(self) -> None:
        """Make trainer and curriculum end at the same step, so that whatever counts steps counts tokens."""
        steps, total = self.trainer.max_steps, self.curriculum.total_steps
        if steps == -1:
            self.trainer.fit_loop.epoch_loop.max_steps = total
        elif steps > total:
            mend = f"the curriculum ends after {total} steps ({self.curriculum.total_tokens} tokens); set it to {total}"
            raise ConfigError("trainer.max_steps", steps, mend)
        elif steps < total:
            rank_zero_info(f"trainer.max_steps={steps} ends this run before its curriculum, which has {total} steps")
        if self.trainer.accumulate_grad_batches != 1:
            mend = "micro batches are accumulated by the host already; set it to 1"
            raise ConfigError("trainer.accumulate_grad_batches", self.trainer.accumulate_grad_batches, mend)

    def _align_trainer(self) -> None:
        """Let the trainer count the batches of a resumed run by its tokens.

        Lightning counts a batch as done only after the hook that saved the checkpoint: every restart would begin one batch
        earlier in its count, and validate and end that much later than a run that was never stopped.
        """
        if self.trainer is not None and self.data_sampler.start_token:
            current = self.trainer.fit_loop.epoch_loop.batch_progress.current
            current.ready = current.completed = self.data_sampler.start_token // self.curriculum.tokens_per_step
            current.started = current.processed = current.completed

    def _report(self, windows: Windows) -> None:
        """What the run will get, by source and stage, before its first step."""
        for line in report(windows):
            rank_zero_info(line)

    @property
    def _vocab_size(self) -> int | None:
        """Of the model that is trained, where it says so."""
        model = getattr(self.trainer, "lightning_module", None)
        return getattr(getattr(model, "config", None), "vocab_size", None)

    def _evaluation_loader(self, mode: str) -> WrappedDataLoader | list[Any]:
        configs = self.evaluation[mode]
        if not configs:
            return []
        dataset = EvaluationDataset(configs, document_masking=self.document_masking)
        for windows in dataset.windows:
            windows.documents.vocab_size = self._vocab_size
        return self._loader(dataset, mode)

    def _loader(self, dataset: Dataset, mode: str) -> WrappedDataLoader:
        return WrappedDataLoader(
            mode=mode,
            dataset=dataset,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            collate_fn=collate,
        )


def _first_path(mix: MixConfig) -> str:
    path = mix.sources[0].path
    return path if isinstance(path, str) else path[0]
