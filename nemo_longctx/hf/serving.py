"""What transformers and vLLM read from a written directory: its longest input and its attention factor, and where they differ.

vLLM's rules are written down here as they are understood, not run against a release (see `_get_and_verify_max_len` and
`rotary_embedding` in its source; they may change): it multiplies `max_position_embeddings` by the factor of linear and dynamic
scaling, YaRN's trained length by YaRN's, takes no factor of llama3 and longrope, and cuts the result at the tokenizer's
`model_max_length`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_longctx.hf.tokenizer import NO_LIMIT
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import DynamicNtkRope, LongRope, YarnRope


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one reader makes of a directory: its longest input, tokens, and what it multiplies q and k by."""

    reader: str
    longest: int
    attention_factor: float


def vllm_length(config: Mapping[str, Any], model_max_length: int | None) -> int:
    """The longest input that vLLM takes when it is told none, tokens."""
    scaling = config.get("rope_scaling") or {}
    longest, kind = config["max_position_embeddings"], scaling.get("rope_type", "default")
    if kind not in ("su", "longrope", "llama3"):
        longest = scaling.get("original_max_position_embeddings", longest) if kind == "yarn" else longest
        longest *= scaling.get("factor", 1.0)
    return int(min(longest, model_max_length or NO_LIMIT))


def vllm_attention_factor(variant: RopeVariant, longest: int) -> float:
    """What vLLM multiplies q and k by: it knows no `attention_factor`, `mscale` or `mscale_all_dim`."""
    if isinstance(variant, YarnRope):
        return 0.1 * math.log(variant.factor) + 1.0
    if isinstance(variant, LongRope):
        stretch = longest / variant.original_max_position_embeddings
        return math.sqrt(1 + math.log(stretch) / math.log(variant.original_max_position_embeddings)) if stretch > 1 else 1.0
    return 1.0


def readings(config: Mapping[str, Any], variant: RopeVariant, model_max_length: int | None) -> tuple[Reading, Reading]:
    """What transformers and vLLM read.

    Args:
        config: the written `config.json`, transformers 4's keys.
        variant: the RoPE that it says.
        model_max_length: the written tokenizer's; None where there is none.
    """
    longest = config["max_position_embeddings"]
    return (
        Reading(reader="transformers", longest=longest, attention_factor=variant.attention_scaling),
        Reading(
            reader="vLLM",
            longest=vllm_length(config, model_max_length),
            attention_factor=vllm_attention_factor(variant, longest),
        ),
    )


def reading_lines(config: Mapping[str, Any], variant: RopeVariant, model_max_length: int | None) -> list[str]:
    """A line for each reader, and one for each thing in which they differ."""
    both = readings(config, variant, model_max_length)
    lines = [f"{each.reader} reads: {each.longest:,} tokens, attention factor {each.attention_factor:.6g}" for each in both]
    theirs, served = both
    if served.longest > theirs.longest and not isinstance(variant, DynamicNtkRope):
        lines.append(f"differs: vLLM takes inputs of {served.longest:,} tokens; give it --max-model-len {theirs.longest}")
    if served.longest < theirs.longest:
        lines.append(f"differs: vLLM stops at {served.longest:,} tokens; give it --max-model-len {theirs.longest}")
    if not math.isclose(served.attention_factor, theirs.attention_factor, rel_tol=1e-6):
        ours = theirs.attention_factor / served.attention_factor
        more = f"; attn_factor={ours:.6g} in rope_scaling makes it the same" if isinstance(variant, YarnRope) else ""
        lines.append(
            f"differs: vLLM multiplies q and k by {served.attention_factor:.6g}, not {theirs.attention_factor:.6g}{more}"
        )
    if isinstance(variant, YarnRope):
        reach = round(variant.factor * variant.original_max_position_embeddings)
        if reach != theirs.longest:
            ratio = theirs.longest / variant.original_max_position_embeddings
            lines.append(
                "differs: older releases of transformers (4.51 and 4.53 do, 4.57 does not) take the ratio of the lengths, "
                f"{ratio:g}, for the factor {variant.factor:g}; export with --max-position-embeddings {reach} for them"
            )
    if isinstance(variant, DynamicNtkRope):
        lines.append("differs: vLLM stretches for its longest input at every length; transformers for each input's own")
    if isinstance(variant, LongRope):
        lines.append("differs: vLLM takes the long factors for all inputs once its limit is above the trained length")
    return lines
