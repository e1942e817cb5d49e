"""The start of every run: a model's RoPE is completed from its checkpoint, its settings are set, and the changes noted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo.collections.llm.gpt.model.base import GPTModel

from nemo_longctx.adapters.nemo.launch.callbacks import RunStart
from nemo_longctx.adapters.nemo.model.config import SettingChange, prepare_model
from nemo_longctx.adapters.nemo.model.rope import variant_of
from nemo_longctx.rope.request import CompletedRope, parse_request

FROM_CHECKPOINT = "checkpoint"


def begin_model(
    model: GPTModel, *, rope: Mapping[str, Any] | None, seq_length: int, source: str, recompute: str | None
) -> list[SettingChange]:
    """Give a model (not built yet) the run's settings, and note them as its `long_context_start`, which the run prints.

    Args:
        model: `nemo.collections.llm.GPTModel`, changed in place.
        rope: what is asked of RoPE; None keeps the model's.
        seq_length: the run's longest window, tokens.
        source: where its settings come from: `FROM_CHECKPOINT`, or the name of a config class, whose weights are random.
        recompute: of the first stage (`nemo_longctx.activations`); None keeps the model's.

    Returns:
        what that changed, or did not.

    Raises:
        ConfigError: a RoPE that cannot be completed or placed.
    """
    completed = complete_rope(model, rope, seq_length=seq_length, source=source)
    variant = None if completed is None else completed.variant
    changes = prepare_model(model, seq_length=seq_length, variant=variant, recompute=recompute)
    notes = () if completed is None else completed.notes
    model.long_context_start = RunStart(changes=changes, source=source, variant=variant or variant_of(model), notes=notes)
    return changes


def complete_rope(model: GPTModel, rope: Mapping[str, Any] | None, *, seq_length: int, source: str) -> CompletedRope | None:
    """`rope` with the numbers of the model's own; None where nothing is asked."""
    if rope is None:
        return None
    named = f"the {source}" if source == FROM_CHECKPOINT else source
    return parse_request(rope).complete(variant_of(model), seq_length=seq_length, trained=model.config.seq_length, source=named)
