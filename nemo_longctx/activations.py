"""What a layer keeps for the backward pass, by plain names: recomputation and offload, for a run and for each of its stages.

`recompute` says which activations are thrown away and computed again:

- `none`: all are kept.
- `selective`: each layer's MLP is computed again. It holds about half of a layer's activations, and running it again costs
  none of attention's arithmetic, whose share grows with the length. (Korthikanti et al. 2022 choose the attention core, for
  its scores; no attention of this package keeps any.)
- `block:N`: the first N layers of each model chunk keep their input alone. Those activations would be held longest.
- `full`: every layer keeps its input alone.

`offload` says whose activations wait in host memory: `none`, `block:N` or `full`, by the same layers. With `recompute=full`
it is the inputs of the layers that move. Both change memory and time, and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_longctx.config import ConfigError

_BLOCK = "none, full, or block:N for the first N layers of each model chunk"


def recomputed_layers(recompute: str, layers: int, *, key: str = "recompute") -> int:
    """How many of a chunk's `layers` are run again whole in the backward pass.

    Raises:
        ConfigError: not none, selective, full or block:N.
    """
    if recompute == "selective":
        return 0
    return _named_layers(recompute, layers, key, f"must be selective, {_BLOCK}")


def offloaded_layers(offload: str, layers: int, *, key: str = "offload") -> int:
    """How many of a chunk's `layers` keep their activations in host memory.

    Raises:
        ConfigError: not none, full or block:N.
    """
    return _named_layers(offload, layers, key, f"must be {_BLOCK}")


def _named_layers(name: str, layers: int, key: str, mend: str) -> int:
    if name == "none":
        return 0
    if name == "full":
        return layers
    kind, _, count = str(name).partition(":")
    if kind != "block" or not count.isdecimal() or int(count) < 1:
        raise ConfigError(key, name, mend)
    return min(int(count), layers)


def megatron_fields(recompute: str) -> dict[str, Any]:
    """The fields of Megatron-Core's TransformerConfig that say `recompute`, all of them, so that none is left from before."""
    fields: dict[str, Any] = {
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": [],
    }
    if recompute == "selective":
        return fields | {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    if recompute == "full":
        return fields | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layers = recomputed_layers(recompute, 1 << 30)
    if layers:
        return fields | {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    return fields


def recompute_name(fields: Mapping[str, Any]) -> str:
    """The plain name of what a TransformerConfig's fields say; `selective` with its modules where they are others than ours."""
    granularity = fields.get("recompute_granularity")
    if granularity is None:
        return "none"
    if granularity == "selective":
        modules = fields.get("recompute_modules") or ["core_attn"]  # the host's default
        return "selective" if list(modules) == ["mlp"] else f"selective ({', '.join(modules)})"
    return f"block:{fields['recompute_num_layers']}" if fields.get("recompute_method") == "block" else "full"
