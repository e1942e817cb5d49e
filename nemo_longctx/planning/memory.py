"""Memory per GPU, by part, before the run. The parts and their formulas; what was measured is in benchmarks/plan_memory.py.

The account follows Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), redone for a
layer without biases and dropout, with a gated MLP, grouped queries and a flash kernel. Within a step the peak lies either at
the loss (all kept activations and the logits) or in a layer's backward (all kept activations and that layer's working set).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_longctx.activations import offloaded_layers, recomputed_layers
from nemo_longctx.planning.gpus import GIB
from nemo_longctx.planning.layout import PRECISIONS, Layout
from nemo_longctx.planning.models import ModelShape

# What a process holds beside tensors on a GPU: CUDA context, NCCL's buffers, cuBLAS workspaces. An allowance, not a formula.
FRAMEWORK_BYTES = 2.0 * GIB
# Tokens of a chunk of the chunked loss and bytes of its fp32 logits, whichever is less:
# nemo_longctx.attention.loss.CHUNK_LIMITS, with which a test compares it (that module imports torch, this must not).
LOSS_CHUNK_LIMITS = {"cpu": (512, 64 * 2**20), "cuda": (4096, 2 * 2**30)}
# What predictions were found to be off by, at worst (benchmarks/plan_memory.py, benchmarks/plan_published.py).
STATED_ERROR = 0.10


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Peak bytes of one GPU of one pipeline stage.

    Attributes:
        pipeline_stage: 0 holds the embedding, the last one the head and the loss.
        weights, gradients, optimizer: the static parts.
        activations: kept for the backward pass, over all microbatches in flight.
        logits: what the loss needs at its peak.
        workspace: what one layer's backward needs beside what is kept, its recomputed activations included.
        communication: buffers of gathers, of the context-parallel ring and of FSDP's unsharded layers.
        framework: CUDA context and libraries.
        kv_cache: of an evaluation inside the run, when the activations are not there.
        offloaded: activations in host memory, on no GPU; not in the total.
    """

    pipeline_stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float
    communication: float
    framework: float
    kv_cache: float
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """Peak bytes: logits and workspace are never there together, nor are activations and the evaluation's cache."""
        static = self.weights + self.gradients + self.optimizer + self.communication + self.framework
        return static + max(self.activations + max(self.logits, self.workspace), self.kv_cache)

    def as_gib(self) -> dict[str, float]:
        """Every part on the GPU and the total in GiB, by name."""
        parts = {f.name: getattr(self, f.name) / GIB for f in fields(self) if f.name not in ("pipeline_stage", "offloaded")}
        return {**parts, "total": self.total / GIB}


def memory_plan(
    model: ModelShape,
    layout: Layout,
    *,
    seq_length: int,
    global_batch_size: int,
    eval_length: int = 0,
    device: str = "cuda",
    framework_bytes: float | None = None,
) -> MemoryPlan:
    """The fullest GPU (or CPU process) of a layout.

    Args:
        model: sizes.
        layout: must be one that `layout_faults` finds nothing against.
        seq_length: tokens of a training sequence.
        global_batch_size: sequences of an optimizer step.
        eval_length: longest context that an evaluation inside the run holds in a KV cache, tokens; 0 for none.
        device: "cuda" or "cpu", whose chunked losses have chunks of their own size.
        framework_bytes: allowance for what no tensor holds; None takes FRAMEWORK_BYTES on a GPU and 0 on a CPU.
    """
    if framework_bytes is None:
        framework_bytes = FRAMEWORK_BYTES if device == "cuda" else 0.0
    stages = sorted({0, layout.pipeline_model_parallel_size - 1})
    plans = [
        _stage_plan(model, layout, stage, seq_length, global_batch_size, eval_length, device, framework_bytes)
        for stage in stages
    ]
    return max(plans, key=lambda plan: plan.total)


def _stage_plan(
    model: ModelShape,
    layout: Layout,
    stage: int,
    seq_length: int,
    global_batch_size: int,
    eval_length: int,
    device: str,
    framework_bytes: float,
) -> MemoryPlan:
    precision = PRECISIONS[layout.precision]
    last = stage == layout.pipeline_model_parallel_size - 1
    parameters = stage_parameters(model, layout, stage)
    replicas = layout.data_parallel_size * layout.context_parallel_size
    held = parameters / (replicas if layout.sharding == "full" else 1)
    tokens = layout.micro_batch_size * seq_length / layout.context_parallel_size
    layer = _layer_activations(model, layout, seq_length)
    kept, offloaded = _kept_elements(model, layout, stage, layer, global_batch_size)
    return MemoryPlan(
        pipeline_stage=stage,
        weights=held * precision.weight,
        gradients=held * layout.gradient_bytes,
        optimizer=parameters * precision.optimizer / (1 if layout.sharding == "none" else replicas),
        activations=tokens * precision.activation * kept,
        logits=_loss_bytes(model, layout, tokens, LOSS_CHUNK_LIMITS[device]) if last else 0.0,
        workspace=_workspace_bytes(model, layout, tokens, layer),
        communication=_communication_bytes(model, layout, tokens),
        framework=framework_bytes,
        kv_cache=_kv_cache_bytes(model, layout, eval_length),
        offloaded=tokens * precision.activation * offloaded,
    )


def stage_parameters(model: ModelShape, layout: Layout, stage: int) -> float:
    """Parameters that one GPU of pipeline stage `stage` works with, before any sharding over data parallel ranks."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    norms = 2 * model.hidden_size
    layer = (model.layer_parameters - norms) / tp + norms
    tables = int(stage == 0) + int(stage == pp - 1)
    if pp == 1 and model.share_embeddings_and_output_weights:
        tables = 1
    final_norm = model.hidden_size if stage == pp - 1 else 0
    return model.num_layers / pp * layer + tables * model.embedding_parameters / tp + final_norm


@dataclass(frozen=True, kw_only=True)
class _LayerActivations:
    """Elements a token that one layer keeps: all of them, of which attention scores, what attention saves itself, those that
    selective recomputation drops, and the layer's input."""

    all: float
    scores: float
    attention: float
    selective: float
    input: float


def _layer_activations(model: ModelShape, layout: Layout, seq_length: int) -> _LayerActivations:
    """What autograd keeps of one layer, in elements a token of this rank.

    Fused: inputs and outputs of two norms (4h, sharded under SP); rotated query and key, value, attention output (2q + 2kv);
    the MLP's first product (2f gated) and its activation's result (f). Run as separate torch operations, RMSNorm keeps its
    normalised input too (2h), the rotation leaves the unrotated projections alive (value is a view of them), and a gated
    activation keeps its silu and the linear half plus `glu_linear_offset` (2f).
    """
    tp = layout.tensor_model_parallel_size
    f_tensors = 3 if model.gated_linear_unit else 2
    residual = 4 * model.hidden_size
    heads = 2 * model.query_width + 2 * model.kv_width
    mlp = f_tensors * model.ffn_hidden_size
    if layout.unfused:
        residual += 2 * model.hidden_size
        heads += model.query_width + 2 * model.kv_width
        mlp += 2 * model.ffn_hidden_size if model.gated_linear_unit else 0
    scores = 0.0
    if layout.attention_kernel == "scores":
        keys = seq_length  # a local core attention has no context parallelism, so a rank holds all keys
        scores = model.num_attention_heads / tp * keys
    return _LayerActivations(
        all=residual / layout.residual_shards + (heads + mlp) / tp + scores,
        scores=scores,
        attention=(2 * model.query_width + 2 * model.kv_width) / tp,
        selective=scores or mlp / tp,
        input=model.hidden_size / layout.residual_shards,
    )


def _kept_elements(
    model: ModelShape, layout: Layout, stage: int, layer: _LayerActivations, global_batch_size: int
) -> tuple[float, float]:
    """Elements a token kept on a stage's GPU, and in host memory, over the layers and the microbatches in flight."""
    pp, vp = layout.pipeline_model_parallel_size, layout.model_chunks
    on_gpu, on_host = _chunk_elements(model, layout, layer)
    microbatches = layout.num_microbatches(global_batch_size)
    if vp == 1:
        in_flight = min(pp - stage, microbatches)
    else:
        # Megatron's interleaved schedule: chunks of forward passes before the first backward (Narayanan et al. 2021, 2.2).
        in_flight = min((pp - stage - 1) * 2 + (vp - 1) * pp + 1, microbatches * vp)
    ends = model.hidden_size / layout.residual_shards * (int(stage == 0) + 2 * int(stage == pp - 1))
    return on_gpu * in_flight + ends, on_host * in_flight


def _chunk_elements(model: ModelShape, layout: Layout, layer: _LayerActivations) -> tuple[float, float]:
    """Elements a token that one model chunk keeps for one microbatch, on the GPU and in host memory."""
    layers = model.num_layers / (layout.pipeline_model_parallel_size * layout.model_chunks)
    again = recomputed_layers(layout.recompute, int(layers))
    away = offloaded_layers(layout.offload, int(layers))
    whole = layer.all - layer.selective if layout.recompute == "selective" else layer.all
    # Under context parallelism attention keeps to itself what it saves, and gathers keys and values anew in the backward.
    stays = layer.attention if layout.context_parallel_size > 1 else 0.0
    on_host = min(again, away) * layer.input + max(away - again, 0) * (whole - stays)
    return again * layer.input + (layers - again) * whole - on_host, on_host


def offloaded_bytes(model: ModelShape, layout: Layout, seq_length: int) -> float:
    """Bytes that one GPU moves to host memory in one microbatch's forward pass, and back in its backward."""
    _, on_host = _chunk_elements(model, layout, _layer_activations(model, layout, seq_length))
    tokens = layout.micro_batch_size * seq_length / layout.context_parallel_size
    return tokens * PRECISIONS[layout.precision].activation * on_host * layout.model_chunks


def _loss_bytes(model: ModelShape, layout: Layout, tokens: float, chunk_limits: tuple[int, int]) -> float:
    """What the cross entropy and the head's backward need at their peak.

    `vocab_parallel`: the logits and, where they are narrower than fp32, their fp32 copy, in whose place softmax and gradient
    are made (Megatron-Core 0.15, tensor_parallel/cross_entropy.py). `eager`: the logits, and in fp32 the log-softmax, its
    gradient and the gradient of the logits. Then the head's gradient, made before it is added to the buffer, and that of
    its input. `chunked` (nemo_longctx.attention.loss): one chunk's logits, and both gradients, the head's in fp32.
    """
    vocabulary = model.vocab_size / layout.tensor_model_parallel_size
    width = PRECISIONS[layout.precision].activation
    narrow = width if width < 4 else 0
    hidden_gradient = tokens * model.hidden_size * width
    head_gradient = vocabulary * model.hidden_size * width
    if layout.loss == "chunked":
        chunk = min(chunk_limits[0] * vocabulary * 4, chunk_limits[1], tokens * vocabulary * 4)
        return chunk * (1 + narrow / 4) + hidden_gradient + head_gradient * 4 / width
    a_logit = narrow + (3 * 4 if layout.loss == "eager" else 4)
    return tokens * vocabulary * a_logit + hidden_gradient + head_gradient


def _workspace_bytes(model: ModelShape, layout: Layout, tokens: float, layer: _LayerActivations) -> float:
    """One layer's backward: gradients of its widest tensors, and its own activations where they are computed again.

    Also the gradient of the largest matrix, made before it is added to the buffer.
    """
    tp = layout.tensor_model_parallel_size
    precision = PRECISIONS[layout.precision]
    f_tensors = 3 if model.gated_linear_unit else 2
    gradients = f_tensors * model.ffn_hidden_size / tp + model.hidden_size
    if layout.attention_kernel == "scores":
        gradients = max(gradients, 2 * layer.scores)
    chunk_layers = model.num_layers // (layout.pipeline_model_parallel_size * layout.model_chunks)
    if chunk_layers and recomputed_layers(layout.recompute, chunk_layers) == chunk_layers:
        # Where a chunk also has layers that were kept, theirs are free before the first layer is computed again.
        gradients += layer.all
    elif layout.recompute == "selective":
        gradients += layer.selective
    return tokens * precision.activation * gradients + model.embedding_parameters / tp * precision.activation


def _communication_bytes(model: ModelShape, layout: Layout, tokens: float) -> float:
    """Buffers that exist only because there are several GPUs."""
    precision = PRECISIONS[layout.precision]
    tp = layout.tensor_model_parallel_size
    total = 0.0
    if layout.residual_shards > 1:  # the gathered input of a product, and of its gradient
        total += 2 * tokens * model.hidden_size * precision.activation
    if layout.context_parallel_size > 1:  # keys and values on their way in, and in backward their gradients in and out
        total += 3 * tokens * 2 * model.kv_width / tp * precision.activation
    if layout.sharding == "full" and layout.data_parallel_size * layout.context_parallel_size > 1:
        # The layer at work and the one fetched ahead, with their unsharded gradients, and the embedding or head.
        total += (4 * model.layer_parameters + model.embedding_parameters) / tp * precision.activation
    return total


def _kv_cache_bytes(model: ModelShape, layout: Layout, eval_length: int) -> float:
    layers = model.num_layers / layout.pipeline_model_parallel_size
    width = 2 * model.kv_width / layout.tensor_model_parallel_size
    return eval_length * layers * width * PRECISIONS[layout.precision].activation
