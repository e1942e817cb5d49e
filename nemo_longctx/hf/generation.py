"""`generation_config.json`: what transformers can save again, and which of its numbers are lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_longctx.config import ConfigError, is_finite
from nemo_longctx.hf.config import TOKENS, token_numbers

FILE = "generation_config.json"
# Only used where tokens are sampled; the value at which transformers holds them unset.
SAMPLING: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
_COUNTS = ("max_length", "max_new_tokens", "num_beams", "num_return_sequences", "min_length", "min_new_tokens")
_NUMBERS = (*SAMPLING, "repetition_penalty", "length_penalty")
_FLAGS = ("do_sample", "use_cache", "renormalize_logits")
_AT_LEAST = {"min_length": 0, "min_new_tokens": 0, "top_k": 0}
_SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # transformers refuses others when it generates


def read_generation_config(raw: Mapping[str, Any], vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The fields that stock transformers generates by, and a sentence for each that was changed.

    Sampling fields without `do_sample` are ignored by transformers, which then refuses to save the file; servers (vLLM) use
    them. They are kept, with `do_sample` true, as the publishers of such files mended them later; and left out where
    the file says itself that nothing is sampled.

    Raises:
        ConfigError: a value of another kind than the field's, or a token beyond the vocabulary.
    """
    notes: list[str] = []
    kept: dict[str, Any] = {}
    for key in TOKENS:
        number = token_numbers(raw, key, vocab_size, notes, file=FILE)
        kept |= {} if number is None else {key: number}
    for key in _COUNTS:
        kept |= _checked(raw, key, whole=True)
    for key in _NUMBERS:
        kept |= _checked(raw, key, whole=key == "top_k")
    for key in _FLAGS:
        if raw.get(key) is not None:
            if not isinstance(raw[key], bool):
                raise ConfigError(key, raw[key], f"must be true or false, in {FILE}")
            kept[key] = raw[key]
    samples = [key for key, unset in SAMPLING.items() if kept.get(key, unset) != unset]
    greedy = kept.get("temperature") == 0  # transformers samples at temperatures above 0 alone, and servers take 0 for greedy
    if samples and (greedy or kept.get("do_sample") is False):
        for key in samples:
            del kept[key]
        kept["do_sample"] = False
        why = "temperature=0" if greedy else "do_sample=false"
        notes.append(f"{FILE} says {why}, by which {', '.join(samples)} have no effect: left out, since it would not be saved")
    elif samples and not kept.get("do_sample"):
        kept["do_sample"] = True
        notes.append(f"{FILE} sets {', '.join(samples)} without do_sample; do_sample=True is written, since they say sampling")
    if kept.get("num_beams", 1) == 1:
        kept.pop("length_penalty", None)
        if kept.get("num_return_sequences", 1) != 1 and not kept.get("do_sample"):
            notes.append(f"{FILE}: num_return_sequences={kept.pop('num_return_sequences')} needs sampling or beams; dropped")
    elif kept.get("num_return_sequences", 1) > kept["num_beams"]:
        notes.append(f"{FILE}: num_return_sequences={kept.pop('num_return_sequences')} is more than num_beams; dropped")
    dropped = sorted(
        key for key in raw if key not in (*TOKENS, *_COUNTS, *_NUMBERS, *_FLAGS) and not _says_nothing(key, raw[key])
    )
    if dropped:
        notes.append(f"{FILE}: {', '.join(dropped)} not carried; set them again after the export")
    return kept, notes


def _says_nothing(key: str, value: Any) -> bool:
    return key.startswith("_") or key in ("transformers_version", "cache_implementation") or value in (None, False, [], {})


def _checked(raw: Mapping[str, Any], key: str, *, whole: bool) -> dict[str, Any]:
    value = raw.get(key)
    if value is None:
        return {}
    if isinstance(value, float) and is_finite(value) and value.is_integer() and whole:
        value = int(value)
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not is_finite(value):
        raise ConfigError(key, value, f"must be a {'whole ' if whole else ''}number, in {FILE}")
    least = _AT_LEAST.get(key, 1 if whole else 0)
    if value < least and key != "length_penalty":
        raise ConfigError(key, value, f"must be {least} or more, in {FILE}")
    if key in _SHARES and value > 1:
        raise ConfigError(key, value, f"must be a share of 0 to 1, in {FILE}")
    if key == "repetition_penalty" and not value:
        raise ConfigError(key, value, f"must be above 0, in {FILE}; 1.0 is none")
    return {key: value}


def with_length(kept: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """`kept` for a model whose longest input is `longest` tokens: a limit that was the old model's goes with it."""
    return {**kept, **({"max_length": longest} if "max_length" in kept else {})}
