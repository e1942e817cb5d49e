"""Layers that differ: which have a sliding window, and which leave q and k unrotated, as `config.json` says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_longctx.config import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
ALL_SLIDE = ("mistral", "phi3", "starcoder2")  # where there is a window, every layer has it


def windows_of(family: str, found: Mapping[str, Any], values: dict[str, Any], notes: list[str]) -> tuple[int | None, ...]:
    """How far each layer looks back, as transformers 4.57 and 5 read it."""
    layers, longest = values["num_hidden_layers"], values["max_position_embeddings"]
    window: int | None = values["sliding_window"]
    if family not in ("llama", *ALL_SLIDE) and not values.get("use_sliding_window"):
        window = None
    sliding = [family in ALL_SLIDE] * layers
    if family in ("qwen2", "qwen3"):
        first = found.get("max_window_layers")
        if window is None:
            first = layers
        elif isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ConfigError("max_window_layers", first, "must be the number of layers before the first window, 0 or more")
        sliding = [i >= first for i in range(layers)]
    if family == "smollm3":
        sliding = [window is not None and unrotated for unrotated in no_rope_of(family, found, values)]  # as the class has it
    said = found.get("layer_types")
    if said is not None and family != "llama":
        if not isinstance(said, list) or len(said) != layers or set(map(str, said)) - {FULL, SLIDING}:
            raise ConfigError("layer_types", said, f"must be {layers} of {FULL!r} and {SLIDING!r}, one a layer")
        if family in ALL_SLIDE and [kind == SLIDING for kind in said] != sliding and window is not None:
            raise ConfigError("layer_types", said, f"{family}'s layers all have the window; transformers ignores these")
        sliding = [kind == SLIDING for kind in said] if family not in ALL_SLIDE else sliding
        if any(sliding) and window is None and family not in ALL_SLIDE:
            mend = f"layer_types names {SLIDING!r}; set it and use_sliding_window=true, or {FULL!r} everywhere"
            raise ConfigError("sliding_window", found.get("sliding_window") if values["sliding_window"] else None, mend)
    if window is None or family == "llama" or not any(sliding):
        return (None,) * layers
    if window >= longest:
        notes.append(f"sliding_window={window} covers all of max_position_embeddings={longest}: taken as full attention")
        return (None,) * layers
    return tuple(window if slides else None for slides in sliding)


def no_rope_of(family: str, found: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers have no RoPE: SmolLM3's `no_rope_layers` says 1 where there is one."""
    layers = values["num_hidden_layers"]
    if family != "smollm3":
        return (False,) * layers
    said, interval = found.get("no_rope_layers"), found.get("no_rope_layer_interval")
    if said is None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ConfigError("no_rope_layer_interval", interval, "must be a whole number of layers, 1 or more")
        return tuple((i + 1) % interval == 0 for i in range(layers))
    if not isinstance(said, list) or len(said) != layers or any(each not in (0, 1) for each in said):
        raise ConfigError("no_rope_layers", said, f"must be {layers} numbers, 1 for a layer with RoPE and 0 for one without")
    return tuple(not each for each in said)


def _attention_values(family: str, windows: tuple[int | None, ...], no_rope: tuple[bool, ...]) -> dict[str, Any]:
    """The keys that say windows and layers without RoPE to transformers 4, for `windows` as they were resolved."""
    window = next((each for each in windows if each is not None), None)
    if family == "llama":
        return {"sliding_window": None}
    if family in ALL_SLIDE:
        return {"sliding_window": window}
    kinds = [FULL if each is None else SLIDING for each in windows]
    keys: dict[str, Any] = {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": kinds}
    if family == "smollm3":
        keys["no_rope_layers"] = [int(not each) for each in no_rope]
    else:
        keys["max_window_layers"] = 0 if window is not None else len(windows)
    return keys


def attention_values(family: str, windows: tuple[int | None, ...], no_rope: tuple[bool, ...]) -> dict[str, Any]:
    """The keys of a `config.json` that say each layer's window and lack of RoPE.

    Raises:
        ConfigError: a mixture that the family's model in transformers cannot have.
    """
    sizes = sorted({each for each in windows if each is not None})
    if len(sizes) > 1:
        raise ConfigError("window_size", sizes, "transformers has one window for all layers with one")
    if any(no_rope) and family != "smollm3":
        raise ConfigError("no_rope_freq", [int(each) for each in no_rope], f"transformers' {family} has RoPE in every layer")
    if family == "llama" and any(windows):
        raise ConfigError("window_size", windows[0], "transformers' llama has no window; its mistral has")
    if family in ALL_SLIDE and len(set(windows)) > 1:
        raise ConfigError("window_attn_skip_freq", list(windows), f"transformers' {family} has one window in every layer")
    return _attention_values(family, windows, no_rope)
