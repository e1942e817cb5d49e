"""Time of an optimizer step: from an MFU, or from two rates and what communication leaves uncovered."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_longctx.activations import recomputed_layers
from nemo_longctx.config import ConfigError
from nemo_longctx.planning.flops import convention_by_name, token_flops
from nemo_longctx.planning.gpus import Gpu
from nemo_longctx.planning.layout import PRECISIONS, Layout
from nemo_longctx.planning.memory import offloaded_bytes
from nemo_longctx.planning.models import ModelShape

# Of a link's peak, what collectives reach (NCCL's bus bandwidth on 8 H100s is about 0.7-0.8 of the 450 GB/s of one direction).
LINK_EFFICIENCY = 0.7
# Share of the tensor-parallel traffic that stays uncovered within a node (Transformer Engine's overlap hides the rest).
TP_UNCOVERED = 0.3
# What `step_time` was found to be off by, at worst, on the published rows that it was not calibrated on: with the rates of the
# same stack (NVIDIA's NeMo, any length and layout), and with an MFU measured at the same or the next context-parallel size.
STATED_ERROR = 0.10
# Another stack's context parallelism may be slower than its own attention on one GPU: torchtitan's at CP 4 and 8 runs 1.39 and
# 1.50 times slower than its rows at CP 1 and 2 let expect, which no layout explains (benchmarks/plan_published.py).
STATED_ERROR_ACROSS_CP = 0.50


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one GPU reaches, in model FLOP/s of the `causal` convention.

    Attributes:
        linear_tflops: layers' matrices and the LM head.
        attention_tflops: the attention core, counting the causal half only.
        source: where the two come from.
        stated_error: share by which a step's predicted time may be off; None where nothing measured stands behind the rates.
    """

    linear_tflops: float
    attention_tflops: float
    source: str
    stated_error: float | None = None


# NVIDIA/NeMo docs/source/performance/performance_long_sequence.md gives model TFLOP/s a GPU (full_exact convention) by length.
# Two of its rows, the shortest and the longest, fix the two rates; the other rows are predicted (benchmarks/plan_published.py).
_NEMO_H100 = "NeMo 24.03.01 on DGX-H100, Llama 2 7B fp8 at 4k (768) and 1024k (536 TFLOP/s, full S^2)"
_NEMO_B200 = "NeMo 25.04 on DGX-B200, Llama 3 8B fp8 at 8k (1671) and 1024k (1608 TFLOP/s, full S^2)"
CALIBRATED = {
    ("h100", "fp8"): Rates(linear_tflops=827.0, attention_tflops=267.0, source=_NEMO_H100, stated_error=STATED_ERROR),
    ("b200", "fp8"): Rates(linear_tflops=1689.0, attention_tflops=805.0, source=_NEMO_B200, stated_error=STATED_ERROR),
}
# Where nothing published was found: shares of the bf16 peak, from the same tables (attention runs in bf16 in those fp8 runs).
ASSUMED_LINEAR_SHARE = {"bf16": 0.55, "fp8": 0.80, "fsdp_bf16": 0.50, "fp32": 0.05}
ASSUMED_ATTENTION_SHARE = 0.28


def rates_for(gpu: Gpu, precision: str) -> Rates:
    """Calibrated rates of `gpu` in `precision`, or assumed shares of its peak, whose source says so.

    Raises:
        ConfigError: the GPU has no fp8.
    """
    if precision == "fp8" and gpu.fp8_tflops is None:
        raise ConfigError("layout.precision", precision, f"{gpu.name} has no fp8; use bf16")
    calibrated = CALIBRATED.get((gpu.name, precision))
    if calibrated is not None:
        return calibrated
    return Rates(
        linear_tflops=ASSUMED_LINEAR_SHARE[precision] * gpu.bf16_tflops,
        attention_tflops=ASSUMED_ATTENTION_SHARE * gpu.bf16_tflops,
        source=f"assumed: {ASSUMED_LINEAR_SHARE[precision]:.0%} and {ASSUMED_ATTENTION_SHARE:.0%} of {gpu.name}'s bf16 peak",
    )


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, in parts that add up.

    Attributes:
        compute: arithmetic, recomputation included.
        tensor_parallel, context_parallel, data_parallel: communication that nothing covers.
        bubble: pipeline stages that wait.
        offload: activations on their way to host memory and back, on the stream that computes.
        tokens_per_second_per_gpu: of the whole.
    """

    compute: float
    tensor_parallel: float
    context_parallel: float
    data_parallel: float
    bubble: float
    offload: float
    tokens_per_second_per_gpu: float

    @property
    def total(self) -> float:
        """All parts."""
        parts = self.compute + self.tensor_parallel + self.context_parallel + self.data_parallel
        return parts + self.bubble + self.offload


def step_time(
    model: ModelShape, layout: Layout, gpu: Gpu, *, seq_length: int, global_batch_size: int, rates: Rates | None = None
) -> StepTime:
    """Seconds of an optimizer step of a layout.

    Pipeline bubble (p - 1)/(v m): Narayanan et al. 2021, section 2.2. Tensor parallel traffic: four all-gathers or
    reduce-scatters of the residual a layer in each direction (Korthikanti et al. 2022, section 4.2). The context-parallel ring
    passes keys and values behind the attention of the chunk before; only what outlasts it counts. Gradients are reduced
    behind the last microbatch's backward.
    """
    rates = rates or rates_for(gpu, layout.precision)
    microbatches = layout.num_microbatches(global_batch_size)
    linear, attention = _microbatch_compute(model, layout, seq_length, rates)
    tensor = _tensor_parallel_seconds(model, layout, gpu, seq_length)
    ring = max(0.0, _ring_seconds(model, layout, gpu, seq_length) - attention)
    pipeline = layout.pipeline_model_parallel_size
    away = 2 * offloaded_bytes(model, layout, seq_length) / (gpu.host_gb_s * 1e9 * LINK_EFFICIENCY)
    busy = microbatches * (linear + attention + tensor + ring + away)
    bubble = busy * (pipeline - 1) / (layout.model_chunks * microbatches)
    gradients = max(0.0, _data_parallel_seconds(model, layout, gpu, microbatches) - 0.5 * (linear + attention))
    total = busy + bubble + gradients
    return StepTime(
        compute=microbatches * (linear + attention),
        tensor_parallel=microbatches * tensor,
        context_parallel=microbatches * ring,
        data_parallel=gradients,
        bubble=bubble,
        offload=microbatches * away,
        tokens_per_second_per_gpu=global_batch_size * seq_length / total / layout.gpus,
    )


def check_mfu(mfu: float, *, key: str = "mfu") -> None:
    """Refuse what is no MFU.

    Raises:
        ConfigError: a number outside (0, 2]; over 1 is possible in the full conventions, which credit pairs that no causal
            kernel computes, and with fp8 products.
    """
    if isinstance(mfu, bool) or not isinstance(mfu, (int, float)) or not 0 < mfu <= 2:
        raise ConfigError(key, mfu, "must be a share of the bf16 peak, such as 0.4")


def seconds_at_mfu(flops: float, gpu: Gpu, *, gpus: int, mfu: float) -> float:
    """Seconds that `flops` model FLOPs take on `gpus` GPUs at `mfu` of the bf16 peak, both in one convention.

    Raises:
        ConfigError: not an MFU.
    """
    check_mfu(mfu)
    return flops / (gpus * gpu.bf16_tflops * 1e12 * mfu)


def _microbatch_compute(model: ModelShape, layout: Layout, seq_length: int, rates: Rates) -> tuple[float, float]:
    """Seconds of matrices and of attention that one pipeline stage spends on one microbatch, forward and backward."""
    flops = token_flops(model, seq_length, convention_by_name("causal"))
    tokens = layout.micro_batch_size * seq_length
    chunk_layers = max(1, model.num_layers // (layout.pipeline_model_parallel_size * layout.model_chunks))
    again = recomputed_layers(layout.recompute, chunk_layers) / chunk_layers
    linear_again = core_again = again
    if layout.recompute == "selective":
        scores = layout.attention_kernel == "scores"
        core_again = float(scores)
        linear_again = 0.0 if scores else model.mlp_weights / (model.mlp_weights + model.attention_weights)
    share = tokens / layout.model_parallel_size
    linear = (flops.linear * (1 + linear_again / 3) + flops.vocabulary) * share / (rates.linear_tflops * 1e12)
    attention = flops.attention * (1 + core_again / 3) * share / (rates.attention_tflops * 1e12)
    return linear, attention


def _link(gpu: Gpu, ranks: int) -> float:
    """Bytes/s a GPU between neighbours of a group of `ranks` GPUs that are numbered without gaps."""
    fast = ranks <= gpu.gpus_per_node
    return (gpu.nvlink_gb_s if fast else gpu.network_gb_s) * 1e9 * LINK_EFFICIENCY


def _tensor_parallel_seconds(model: ModelShape, layout: Layout, gpu: Gpu, seq_length: int) -> float:
    tp = layout.tensor_model_parallel_size
    if tp == 1:
        return 0.0
    tokens = layout.micro_batch_size * seq_length / layout.context_parallel_size
    layers = model.num_layers / layout.pipeline_model_parallel_size
    volume = 8 * layers * tokens * model.hidden_size * PRECISIONS[layout.precision].activation * (tp - 1) / tp
    uncovered = TP_UNCOVERED if tp <= gpu.gpus_per_node else 1.0
    return volume / _link(gpu, tp) * uncovered


def _ring_seconds(model: ModelShape, layout: Layout, gpu: Gpu, seq_length: int) -> float:
    cp, tp = layout.context_parallel_size, layout.tensor_model_parallel_size
    if cp == 1:
        return 0.0
    tokens = layout.micro_batch_size * seq_length / cp
    layers = model.num_layers / layout.pipeline_model_parallel_size
    # Forward passes keys and values, backward passes them again with their gradients: three times the volume.
    volume = 3 * layers * (cp - 1) * tokens * 2 * model.kv_width / tp * PRECISIONS[layout.precision].activation
    return volume / _link(gpu, tp * cp)


def _data_parallel_seconds(model: ModelShape, layout: Layout, gpu: Gpu, microbatches: int) -> float:
    replicas = layout.data_parallel_size * layout.context_parallel_size
    if replicas == 1:
        return 0.0
    held = model.parameters / (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    volume = held * (layout.gradient_bytes + 2) * (replicas - 1) / replicas
    if layout.sharding == "full":  # weights are gathered for each microbatch's forward and backward
        volume += held * 2 * 2 * (microbatches - 1)
    return volume / _link(gpu, layout.gpus)
