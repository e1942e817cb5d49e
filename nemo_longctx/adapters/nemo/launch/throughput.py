"""tokens/s, TFLOP/s and MFU of a run, in a named convention, right when the sequence length changes in mid-run.

NeMo's own callback reads sequence length and batch size once, at the start. Here the operations of every optimizer step follow
from the stage that the step belongs to, so that a window of steps that straddles a switch counts each at its own length.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from nemo_longctx.activations import recompute_name
from nemo_longctx.adapters.megatron.attention import layer_window, transformer_engine_installed
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, Stage
from nemo_longctx.files import read_mapping, write_text
from nemo_longctx.planning.flops import convention_by_name, token_flops, training_cost
from nemo_longctx.planning.gpus import GIB, GPUS, Gpu
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import ModelShape
from nemo_longctx.planning.timing import step_time


class ThroughputCallback(Callback):
    """Logs `tokens_per_second`, `tflops_per_gpu` and, where the peak is known, `mfu`; keeps them per stage in a JSON.

    Times are those of training: validation and evaluation are left out, and so is the first step of a start, which warms up
    kernels and allocator. A run that goes on keeps what its earlier starts measured on as many devices. The file is what
    `nemo-longctx plan --mfu-from` reads; beside what was measured it holds what the plan says of the same layout,
    and at the end of the run both are printed.

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
        self._planned: dict[int, dict[str, Any]] = {}
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
        gpu = device_gpu()
        if self.peak_tflops is None and gpu is not None:
            self.peak_tflops = gpu.bf16_tflops
        self._planned = planned_stages(trainer, pl_module, self._model, self.curriculum, gpu)
        self._window = None
        self.stages = self._earlier(trainer.world_size) if trainer.global_step else {}

    def leave_out(self, *, seconds: float, **_: float) -> None:
        """So much time of the open window was no training's."""
        if self._window is not None:
            self._window = (self._window[0], self._window[1] + seconds)

    def _earlier(self, devices: int) -> dict[int, dict[str, float]]:
        """What earlier starts of this run left in the file, of the stages that are still those of the curriculum."""
        record = read_mapping(self.path)
        if (record.get("convention"), record.get("devices")) != (self.convention.name, devices):
            return {}
        lengths = {stage.number: stage.seq_length for stage in self.curriculum.plan}
        return {
            each["number"]: {key: each[key] for key in ("seq_length", "steps", "flops", "seconds")}
            for each in record.get("stages", ())
            if "number" in each and lengths.get(each["number"]) == each["seq_length"]
        }

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

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and self.stages:
            print(throughput_table(json.loads(self.path.read_text())), flush=True)

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
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
            "stages": [
                {
                    "number": number,
                    **stage,
                    **self._metrics(stage["flops"], stage["steps"] * tokens, stage["seconds"], devices),
                    "planned": self._planned[number],
                }
                for number, stage in sorted(self.stages.items())
            ],
        }
        write_text(self.path, json.dumps(record, indent=1))


def shape_of(config: Any) -> ModelShape:
    """The sizes of a host config (`GPTConfig`), for the planner.

    Raises:
        ConfigError: a mixture of experts, or no vocabulary size.
    """
    if getattr(config, "num_moe_experts", None):
        raise ConfigError(
            "model.num_moe_experts", config.num_moe_experts, "FLOPs of experts are not counted; leave this callback out"
        )
    windows = [layer_window(config, layer + 1) for layer in range(config.num_layers)]
    window = next((each for each in windows if each is not None), None)
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
        sliding_window=window,
        full_layers=windows.count(None) if window and None in windows else None,
    )


def device_gpu() -> Gpu | None:
    """This process's GPU as the planner knows it, by its name; None on a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    known = sorted((gpu for gpu in GPUS.values() if gpu.name in name), key=lambda gpu: -len(gpu.name))
    return known[0] if known else None


def run_layout(trainer: Any, module: Any, stage: Stage) -> Layout:
    """How a stage of a run under NeMo's Megatron strategy is spread, in the planner's words.

    Raises:
        ConfigError: the planner has no word for its recomputation.
    """
    strategy, config = trainer.strategy, module.config
    on_gpu = torch.cuda.is_available()
    return Layout(
        gpus=trainer.world_size,
        tensor_model_parallel_size=strategy.tensor_model_parallel_size,
        pipeline_model_parallel_size=strategy.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=strategy.virtual_pipeline_model_parallel_size,
        context_parallel_size=strategy.context_parallel_size,
        sequence_parallel=strategy.sequence_parallel,
        micro_batch_size=stage.micro_batch_size,
        recompute=stage.config.recompute or recompute_name(vars(config)),
        offload=stage.config.offload or "none",
        sharding="optimizer" if module.optim.config.use_distributed_optimizer else "none",
        precision="bf16" if config.bf16 or config.fp16 else "fp32",
        loss="chunked",
        unfused=not (on_gpu and transformer_engine_installed()),
    )


def planned_stages(
    trainer: Any, module: Any, model: ModelShape, curriculum: Curriculum, gpu: Gpu | None
) -> dict[int, dict[str, Any]]:
    """What the plan says of each stage of this very run: GiB of tensors a device and, on a known GPU, seconds and tokens/s.

    A run that the planner has no words for (another strategy, another recomputation) is trained all the same; the reason stands
    in its place.
    """
    if not hasattr(trainer.strategy, "tensor_model_parallel_size"):
        why = f"the planner knows NeMo's Megatron strategy, not {type(trainer.strategy).__name__}"
        return {stage.number: {"unknown": why} for stage in curriculum.plan}
    planned: dict[int, dict[str, Any]] = {}
    for stage in curriculum.plan:
        length, batch = stage.seq_length, stage.global_batch_size
        try:
            layout = run_layout(trainer, module, stage)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            memory = memory_plan(model, layout, seq_length=length, global_batch_size=batch, device=device, framework_bytes=0)
            planned[stage.number] = {"memory_gib": memory.total / GIB}
            if gpu is not None:
                time = step_time(model, layout, gpu, seq_length=length, global_batch_size=batch).total
                planned[stage.number] |= {"seconds_per_step": time, "tokens_per_second": curriculum.tokens_per_step / time}
        except ConfigError as error:
            planned[stage.number] = {"unknown": str(error)}
    return planned


def throughput_table(record: Mapping[str, Any]) -> str:
    """What the run reached beside what the plan says, a line a stage, from the record that `throughput.json` holds."""
    lines = [
        f"throughput in convention {record['convention']}; plan of the same layout beside it",
        f"{'length':>9} {'steps':>7} {'tokens/s':>11} {'planned':>11} {'TFLOP/s':>8} {'MFU':>6} {'planned GiB':>11}",
    ]
    for stage in record["stages"]:
        plan, mfu = stage["planned"], stage.get("mfu")
        lines.append(
            f"{stage['seq_length']:9,} {stage['steps']:7,} {stage['tokens_per_second']:11,.0f} "
            f"{_or_dash(plan.get('tokens_per_second'), '11,.0f')} {stage['tflops_per_gpu']:8,.2f} {_or_dash(mfu, '6.1%')} "
            f"{_or_dash(plan.get('memory_gib'), '11.2f')}" + (f"  {plan['unknown']}" if "unknown" in plan else "")
        )
    if record["peak_allocated_gib"] is not None:
        lines.append(f"peak of tensors on this GPU: {record['peak_allocated_gib']:.2f} GiB")
    return "\n".join(lines)


def _or_dash(value: float | None, form: str) -> str:
    width = int("".join(itertools.takewhile(str.isdigit, form)))
    return "-".rjust(width) if value is None else format(value, form)


def _now() -> float:
    """Wall time at which all work handed to the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
