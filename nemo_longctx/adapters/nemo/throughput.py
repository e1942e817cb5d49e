"""tokens/s, TFLOP/s and MFU of a run, in a named convention, right when the sequence length changes in mid-run.

NeMo's own callback reads sequence length and batch size once, at the start. Here the operations of every optimizer step follow
from the stage that the step belongs to, so that a window of steps that straddles a switch counts each at its own length.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.planning.flops import convention_by_name, token_flops, training_cost
from nemo_longctx.planning.gpus import GPUS
from nemo_longctx.planning.models import ModelShape


class ThroughputCallback(Callback):
    """Logs `tokens_per_second`, `tflops_per_gpu` and, where the peak is known, `mfu`; keeps them per stage in a JSON.

    Times are those of training: validation is left out, and so is the first step, which warms up kernels and allocator. The
    file is what `nemo-longctx plan --mfu-from` reads; it also holds what the plan says, for comparison.

    Args:
        curriculum: tokens and sequence length of each step.
        path: where the JSON is written, by the first rank.
        convention: what counts as an operation (`nemo_longctx.planning.flops.CONVENTIONS`).
        peak_tflops: dense bf16 peak of one device, TFLOP/s; None looks the device up, and leaves out MFU where it is not known.
        document_lengths: tokens of each document, for the `document` convention.
        every: optimizer steps between two reports.

    Raises:
        ConfigError: an unknown convention, or a number out of range.
    """

    def __init__(
        self,
        *,
        curriculum: Curriculum,
        path: str,
        convention: str = "causal",
        peak_tflops: float | None = None,
        document_lengths: Sequence[int] | None = None,
        every: int = 10,
    ):
        if every < 1:
            raise ConfigError("throughput.every", every, "must be 1 or more optimizer steps")
        if peak_tflops is not None and peak_tflops <= 0:
            raise ConfigError("throughput.peak_tflops", peak_tflops, "must be over 0, or left out")
        self.curriculum, self.path, self.every = curriculum, Path(path), every
        self.convention = convention_by_name(convention)
        self.peak_tflops = peak_tflops
        self.lengths_D = None if document_lengths is None else np.asarray(document_lengths)
        self.stages: dict[int, dict[str, float]] = {}
        self._model: ModelShape | None = None
        self._token_flops: dict[int, float] = {}
        self._window: tuple[int, float] | None = None  # step and time at which the open window began
        self._paused = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._model = shape_of(pl_module.config)
        self._token_flops = {
            stage.seq_length: token_flops(
                self._model, stage.seq_length, self.convention, document_lengths_D=self.lengths_D
            ).total
            for stage in self.curriculum.plan
        }
        if self.peak_tflops is None:
            self.peak_tflops = device_peak_tflops()
        self._window = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._window is None:
            self._window = (step, _now())
            return
        begin, began = self._window
        if step == begin or (step % self.every and step != self.curriculum.total_steps):
            return
        now = _now()
        metrics = self._account(begin, step, now - began, trainer.world_size)
        for name, value in metrics.items():
            pl_module.log(name, value, batch_size=1, prog_bar=True)
        if trainer.is_global_zero:
            self._write(trainer.world_size)
        self._window = (step, now)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._paused = _now()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._window is not None:
            step, began = self._window
            self._window = (step, began + _now() - self._paused)

    def _account(self, begin: int, end: int, seconds: float, devices: int) -> dict[str, float]:
        """Count steps `begin`..`end` - 1, which took `seconds` together, to their stages; the metrics of the window.

        Time is split over the stages of a straddling window by their operations, since the steps were not timed one by one.
        """
        assert self._model is not None
        tokens = self.curriculum.tokens_per_step
        stages = [self.curriculum.stage_at_step(step) for step in range(begin, end)]
        flops = [self._token_flops[stage.seq_length] * tokens for stage in stages]
        for stage, work in zip(stages, flops, strict=True):
            kept = self.stages.setdefault(
                stage.number, {"seq_length": stage.seq_length, "steps": 0, "flops": 0.0, "seconds": 0.0}
            )
            kept["steps"] += 1
            kept["flops"] += work
            kept["seconds"] += seconds * work / sum(flops)
        return self._metrics(sum(flops), len(flops) * tokens, seconds, devices)

    def _metrics(self, flops: float, tokens: float, seconds: float, devices: int) -> dict[str, float]:
        tflops = flops / seconds / devices / 1e12
        metrics = {"tokens_per_second": tokens / seconds, "tflops_per_gpu": tflops}
        if self.peak_tflops is not None:
            metrics["mfu"] = tflops / self.peak_tflops
        return metrics

    def _write(self, devices: int) -> None:
        """Replace the JSON in one move, so that a kill leaves the old one or the new one."""
        assert self._model is not None
        tokens = self.curriculum.tokens_per_step
        total = {key: sum(stage[key] for stage in self.stages.values()) for key in ("steps", "flops", "seconds")}
        plan = training_cost(self._model, self.curriculum, self.convention, document_lengths_D=self.lengths_D)
        record = {
            "convention": self.convention.name,
            "devices": devices,
            "peak_tflops": self.peak_tflops,
            **self._metrics(total["flops"], total["steps"] * tokens, total["seconds"], devices),
            "measured_steps": total["steps"],
            "planned_total_flops": plan.total_flops,
            "stages": [
                {**stage, **self._metrics(stage["flops"], stage["steps"] * tokens, stage["seconds"], devices)}
                for _, stage in sorted(self.stages.items())
            ],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(record, indent=1))
        os.replace(beside, self.path)


def shape_of(config: Any) -> ModelShape:
    """The sizes of a host config (`GPTConfig`), for the planner.

    Raises:
        ConfigError: a mixture of experts, or no vocabulary size.
    """
    if getattr(config, "num_moe_experts", None):
        raise ConfigError(
            "model.num_moe_experts", config.num_moe_experts, "FLOPs of experts are not counted; leave this callback out"
        )
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        vocab_size=config.vocab_size,
        gated_linear_unit=config.gated_linear_unit,
        share_embeddings_and_output_weights=bool(config.share_embeddings_and_output_weights),
        add_qkv_bias=config.add_qkv_bias,
        seq_length=config.seq_length,
    )


def device_peak_tflops() -> float | None:
    """Dense bf16 peak of this process's GPU by its name; None on a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    known = sorted((gpu for gpu in GPUS.values() if gpu.name in name), key=lambda gpu: -len(gpu.name))
    return known[0].bf16_tflops if known else None


def _now() -> float:
    """Wall time at which all work handed to the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
