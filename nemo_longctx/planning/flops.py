"""Floating-point operations of training, under conventions that have names, because published ones differ by 2x.

Three questions separate the conventions: which attention pairs are counted (all s x s, the causal half, or only pairs within
one document), how large a layer is taken to be (the 12 h^2 of Narayanan et al. 2021 or its exact matrices), and whether the
LM head counts. A fourth, recomputation, separates the model's arithmetic (MFU) from the hardware's (HFU).
A multiply-add is two operations; the backward pass costs twice the forward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from nemo_longctx.config import ConfigError, did_you_mean, size_of_text
from nemo_longctx.data.curriculum import Curriculum, Stage, StageConfig
from nemo_longctx.planning.models import ModelShape

if TYPE_CHECKING:
    import numpy as np

ATTENTION = ("full", "causal", "document")
LAYERS = ("12h2", "exact")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class FlopsConvention:
    """What is counted.

    Attributes:
        name: what to call it in reports.
        attention: `full` counts all s^2 query-key pairs; `causal` half of them; `document` half of the pairs that lie in the
            same document, which is what a document mask leaves.
        layers: `12h2` takes every layer as 12 h^2 weights (4 h wide MLP of two matrices, h wide keys and values), as
            Narayanan et al. 2021 do; `exact` takes the model's own matrices (gated MLP, grouped queries).
        vocabulary: count the LM head's product.
        recompute: `none` is the model's arithmetic; `selective` adds a second forward of every MLP, `full` one of every layer
            (activation recomputation executes them, by the names of `nemo_longctx.activations`; no MFU credits them).
    """

    name: str
    attention: str
    layers: str
    vocabulary: bool
    recompute: str = "none"

    def __post_init__(self):
        for key, known in (("attention", ATTENTION), ("layers", LAYERS), ("recompute", RECOMPUTE)):
            if getattr(self, key) not in known:
                raise ConfigError(f"flops.{key}", getattr(self, key), did_you_mean(str(getattr(self, key)), known))


CONVENTIONS = {
    convention.name: convention
    for convention in (
        # Narayanan et al. 2021, section 5.1 (here without recomputation and without the vocabulary term):
        # F = 72 T l h^2 (1 + s/(6h)). Reproduces Xiong et al. 2023, Table 10 to all its digits.
        FlopsConvention(name="full", attention="full", layers="12h2", vocabulary=False),
        # 6 N + 12 l h s a token: Chowdhery et al. 2022 (PaLM), appendix B; torchtitan's MFU; NVIDIA's published tables of
        # NeMo (docs/source/performance/performance_summary.md: Llama 2 7B, 16,847 tokens/s = 776 TFLOP/s).
        FlopsConvention(name="full_exact", attention="full", layers="exact", vocabulary=True),
        # The arithmetic that a causal kernel cannot avoid; NeMo 2.7.3's nemo/utils/flops_formulas.py.
        FlopsConvention(name="causal", attention="causal", layers="exact", vocabulary=True),
        FlopsConvention(name="document", attention="document", layers="exact", vocabulary=True),
    )
}


def convention_by_name(name: str, *, vocabulary: bool | None = None, recompute: str = "none") -> FlopsConvention:
    """The convention called `name`; `vocabulary` and `recompute` change it, and its name says so.

    Raises:
        ConfigError: an unknown name or recomputation.
    """
    if name not in CONVENTIONS:
        raise ConfigError("flops", name, f"not a known convention, {did_you_mean(name, CONVENTIONS)}")
    convention = CONVENTIONS[name]
    if vocabulary is not None and vocabulary != convention.vocabulary:
        sign = "+" if vocabulary else "-"
        convention = replace(convention, vocabulary=vocabulary, name=f"{convention.name}{sign}vocabulary")
    if recompute != "none":
        convention = replace(convention, recompute=recompute, name=f"{convention.name}+recompute:{recompute}")
    return convention


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Operations of training on one token, in parts that add up.

    Attributes:
        linear: layers' matrix products, forward and backward, with recomputation where it was asked for.
        attention: query-key and attention-value products, likewise.
        vocabulary: the LM head, 0 where the convention leaves it out.
    """

    linear: float
    attention: float
    vocabulary: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.linear + self.attention + self.vocabulary


def token_flops(
    model: ModelShape, seq_length: int, convention: FlopsConvention, *, document_lengths_D: np.ndarray | None = None
) -> TokenFlops:
    """Operations of training on one token of a sequence of `seq_length` tokens, averaged over the sequence.

    Args:
        model: sizes.
        seq_length: s, tokens.
        convention: what is counted.
        document_lengths_D: tokens of each document, (D,) integers; needed by (and only by) `attention="document"`.

    Raises:
        ConfigError: `document` without lengths, or a length under 1.
    """
    if seq_length < 1:
        raise ConfigError("seq_length", seq_length, "must be 1 or more")
    # Under 12h2 a head's products are h wide; exactly, they are (query heads x head width) wide.
    width = model.hidden_size if convention.layers == "12h2" else model.query_width
    mlp = 8 * model.hidden_size**2 if convention.layers == "12h2" else model.mlp_weights
    weights = mlp + (4 * model.hidden_size**2 if convention.layers == "12h2" else model.attention_weights)
    windowed = model.windowed_layers
    spans = (model.num_layers - windowed) * _attention_span(seq_length, convention, document_lengths_D)
    if windowed:
        spans += windowed * _attention_span(seq_length, convention, document_lengths_D, model.sliding_window)
    again = {"none": 0, "selective": mlp, "full": weights}[convention.recompute]
    attention_passes = 4 if convention.recompute == "full" else 3
    return TokenFlops(
        linear=2.0 * (3 * weights + again) * model.num_layers,
        attention=4.0 * attention_passes * width * spans,
        vocabulary=6.0 * model.embedding_parameters if convention.vocabulary else 0.0,
    )


def _attention_span(
    seq_length: int, convention: FlopsConvention, document_lengths_D: np.ndarray | None, window: int | None = None
) -> float:
    """Mean number of keys that count for a query, which looks back on `window` tokens at most.

    A window of w leaves w s - w^2 / 2 of the s^2 / 2 causal pairs; `full` counts twice as many, as it does without one.
    """
    w = seq_length if window is None else min(window, seq_length)
    band = w - w * w / (2 * seq_length)
    if convention.attention == "full":
        return 2 * band
    if convention.attention == "causal":
        return band
    if document_lengths_D is None:
        raise ConfigError("flops", convention.name, "needs the lengths of the documents; give them with --documents")
    return mean_square_piece(document_lengths_D, seq_length, window) / 2


def mean_square_piece(document_lengths_D: np.ndarray, seq_length: int, window: int | None = None) -> float:
    """Mean number of tokens in the piece of a document that a token shares its window with.

    Documents lie end to end and windows of `seq_length` cut them at positions that know nothing of the documents. Two tokens
    at distance d of one document then share a window with probability max(0, 1 - d/s), so the expected sum of squared piece
    lengths of a document of L tokens is L + 2 sum_{d=1}^{min(L,s)-1} (L - d)(1 - d/s), which has a closed form.

    Args:
        document_lengths_D: (D,) integers, tokens.
        seq_length: window, tokens.
        window: a sliding window of attention: tokens further apart do not count.

    Returns:
        expected sum of squared pieces over the number of tokens; seq_length in the limit of endless documents.

    Raises:
        ConfigError: no documents, or a length under 1.
    """
    import numpy as np  # only documents need it, and it takes longer to import than a plan to make

    L = np.asarray(document_lengths_D, dtype=np.float64)
    if L.size == 0 or L.min() < 1:
        raise ConfigError("documents", f"{L.size} lengths", "every document must have one token or more, and there must be one")
    s = float(seq_length)
    n = np.minimum(L, s if window is None else min(s, window)) - 1  # largest distance that counts
    sum_d, sum_dd = n * (n + 1) / 2, n * (n + 1) * (2 * n + 1) / 6
    squares = L + 2 * (n * L - (1 + L / s) * sum_d + sum_dd / s)
    return float(squares.sum() / L.sum())


def crossover_length(model: ModelShape, convention: FlopsConvention) -> float:
    """Sequence length at which attention costs as much as the layers' matrices: 6h under `full`, 12h under its causal half.

    Raises:
        ConfigError: the convention's attention does not grow with the sequence alone (`document`).
    """
    if convention.attention == "document":
        raise ConfigError("flops", convention.name, "has no crossover length: its cost depends on the documents")
    one = token_flops(model, 1, convention)
    return one.linear / one.attention


def parse_curriculum(text: str, *, tokens_per_step: int, steps: int, micro_batch_size: int = 1) -> Curriculum:
    """`4096@0.2,32768`: 4,096 tokens until 20 % of all tokens are consumed, then 32,768 to the end.

    Raises:
        ConfigError: not of that form, or stages that overlap or do not fill the run.
    """
    stages = []
    items = [item.strip() for item in text.split(",")]
    for i, item in enumerate(items):
        length, at, until = item.partition("@")
        if not at and i < len(items) - 1:
            raise ConfigError(
                "curriculum", text, f"stage {item!r} needs the share of tokens at which it ends, such as {item}@0.2"
            )
        seq_length = size_of_text(length)
        share: float | None = 1.0
        if at:
            try:
                share = float(until)
            except ValueError:
                share = None
        if seq_length is None or share is None:
            raise ConfigError("curriculum", text, "must look like 4096@0.2,32768, or 4Ki@0.2,32Ki")
        stages.append(StageConfig(seq_length=seq_length, until=share, micro_batch_size=micro_batch_size))
    if steps < 1:
        raise ConfigError("steps", steps, "must be 1 or more")
    return Curriculum(stages=tuple(stages), tokens_per_step=tokens_per_step, total_tokens=steps * tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage costs.

    Attributes:
        seq_length: tokens a sequence.
        tokens: tokens consumed in the stage.
        steps: optimizer steps.
        global_batch_size: sequences in one optimizer step.
        flops: operations of the stage, `token_flops * tokens`.
        token_flops: operations a token, by part.
        attention_share: attention / (attention + layers); the LM head is in neither.
        relative_speed: tokens/s at equal FLOP/s, against the first stage.
    """

    seq_length: int
    tokens: int
    steps: int
    global_batch_size: int
    flops: float
    token_flops: TokenFlops
    attention_share: float
    relative_speed: float


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What a curriculum costs under one convention.

    Attributes:
        convention: what was counted.
        tokens: of the whole run.
        steps: optimizer steps of the whole run.
        tokens_per_step: constant through the run (Xiong et al. 2023, section 4.4).
        stages: one cost a stage.
        total_flops: sum over the stages.
        long_from_start_flops: the same tokens, all at the longest length.
        saving: 1 - total / long_from_start.
        crossover_6h: 6 x hidden size (Xiong et al. 2023, section 2.1).
        crossover_tokens: where attention overtakes the layers' matrices in this convention; None for `document`.
    """

    convention: FlopsConvention
    tokens: int
    steps: int
    tokens_per_step: int
    stages: tuple[StageCost, ...]
    total_flops: float
    long_from_start_flops: float
    saving: float
    crossover_6h: int
    crossover_tokens: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def training_cost(
    model: ModelShape, curriculum: Curriculum, convention: FlopsConvention, *, document_lengths_D: np.ndarray | None = None
) -> TrainingCost:
    """FLOPs of training under a curriculum.

    Raises:
        ConfigError: `document` attention without lengths.
    """

    def per_token(seq_length: int) -> TokenFlops:
        return token_flops(model, seq_length, convention, document_lengths_D=document_lengths_D)

    first = per_token(curriculum.plan[0].seq_length)
    costs = tuple(_stage_cost(stage, per_token(stage.seq_length), first) for stage in curriculum.plan)
    total = sum(cost.flops for cost in costs)
    longest = max(stage.seq_length for stage in curriculum.plan)
    long_from_start = per_token(longest).total * curriculum.total_tokens
    return TrainingCost(
        convention=convention,
        tokens=curriculum.total_tokens,
        steps=curriculum.total_steps,
        tokens_per_step=curriculum.tokens_per_step,
        stages=costs,
        total_flops=total,
        long_from_start_flops=long_from_start,
        saving=1 - total / long_from_start,
        crossover_6h=6 * model.hidden_size,
        crossover_tokens=None if convention.attention == "document" else crossover_length(model, convention),
    )


def _stage_cost(stage: Stage, per_token: TokenFlops, first: TokenFlops) -> StageCost:
    tokens = stage.end_token - stage.first_token
    return StageCost(
        seq_length=stage.seq_length,
        tokens=tokens,
        steps=stage.end_step - stage.first_step,
        global_batch_size=stage.global_batch_size,
        flops=per_token.total * tokens,
        token_flops=per_token,
        attention_share=per_token.attention / (per_token.attention + per_token.linear),
        relative_speed=first.total / per_token.total,
    )


def slow_down(model: ModelShape, short: int, long: int, convention: FlopsConvention) -> float:
    """Share of the tokens/s that is lost at equal FLOP/s when the length goes from `short` to `long` tokens."""
    return 1 - token_flops(model, short, convention).total / token_flops(model, long, convention).total
