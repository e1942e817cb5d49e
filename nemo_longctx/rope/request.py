"""What a run asks of RoPE, before the checkpoint is at hand, and what becomes of it with the checkpoint's own numbers.

A YAML file says what makes the variant. Base, trained length and factor (new length / trained length) come from the checkpoint
where they are not set.

A checkpoint whose RoPE is stretched already (Llama 3.1's scaling, YaRN, PI) was trained with its plain frequencies at the
shorter length that its scaling begins from. Another variant takes the scaling's place, it is not laid over it: so it begins
from that length too, and its factor covers the whole way. The same variant goes on: its other numbers stay, its factor grows.

Layers with a sliding window need no stretch: `layers: full_attention` leaves them plain RoPE (OLMo 3), of a base of their own
where `local_base` says one (Gemma 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_longctx.config import ConfigError, belongs_to, build, did_you_mean
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import VARIANTS, Rope, YarnRope, to_dict

FACTOR, TRAINED = "factor", "original_max_position_embeddings"
_LISTS = ("short_factor", "long_factor")  # LongRoPE's, which only its own checkpoint has
LOCAL, LAYERS = "local_base", "layers"
EVERYWHERE, BY_LAYER = "all", "full_attention"  # what `rope.layers` may be
# RoPE by layer type as the configs of Gemma 3, OLMo 3 and ModernBERT say it.
_OTHER_WORDS = frozenset(
    ("layer_types", "full_attention", "sliding_attention", "rope_local_base_freq", "local_rope_theta", "global_rope_theta")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeRequest:
    """A variant, and those of its fields that the user set.

    Attributes:
        variant: a name of `VARIANTS`; None: the checkpoint's, with another base.
        values: fields that are set, checked.
        layers: the layers that have it: "full_attention" leaves those with a window plain RoPE of `local_base` (or of the base
            that the checkpoint has there), "all" takes theirs away; None keeps what the checkpoint has there.
    """

    variant: str | None
    values: Mapping[str, Any]
    layers: str | None = None

    @property
    def by_layer(self) -> bool:
        """Whether layers with a window are asked to have another RoPE than the rest."""
        return self.layers == BY_LAYER or LOCAL in self.values

    @property
    def evaluation_only(self) -> bool:
        """Whether no fixed model can be trained with it."""
        return self.variant is not None and VARIANTS[self.variant].evaluation_only

    @property
    def base(self) -> float | None:
        """The base asked for, or the variant's own where that is what makes it (ABF); None: the checkpoint's."""
        return self.values.get("base", _own_base(self.variant))

    def complete(self, under: RopeVariant, *, seq_length: int, trained: int, source: str = "the checkpoint") -> CompletedRope:
        """The variant with the numbers of what lies under it.

        Args:
            under: the position encoding that the checkpoint has.
            seq_length: the run's longest window, tokens.
            trained: the longest window of the checkpoint, tokens.
            source: what to call it; a config class, where the weights are random.

        Raises:
            ConfigError: a number that neither the user nor the checkpoint gives.
        """
        local, said = self._local(under, source)
        if self.variant is None:
            return _effective(dataclasses.replace(under, **{**self.values, LOCAL: local}), said)
        names = {field.name for field in dataclasses.fields(VARIANTS[self.variant])}
        made = {**_carried(self.variant, under), **self.values, LOCAL: local}
        notes = list(said)
        if self.base is None:
            made["base"] = under.base
            notes.append(f"rope.base={under.base:g}: that of {source}")
        begin = trained_length(under, trained)
        stretched = FACTOR in names
        if stretched and FACTOR not in self.values:
            made[FACTOR], note = self._factor(under, seq_length, trained, source)
            notes.append(note)
        if TRAINED in names and TRAINED not in made:
            made[TRAINED] = begin
            notes.append(f"rope.{TRAINED}={begin:,}: the length that {source} was trained at")
        if under.variant != self.variant and hasattr(under, FACTOR):
            notes.append(f"rope.variant={self.variant} takes the place of {describe(under)} of {source}")
        for name in _LISTS:
            if name in names and name not in made:
                mend = "missing: LongRoPE's divisors are searched for each model; set a list, one number a pair of dimensions"
                raise ConfigError(f"rope.{name}", None, mend)
        return _effective(build(VARIANTS[self.variant], made, where="rope"), tuple(notes))

    def _local(self, under: RopeVariant, source: str) -> tuple[float | None, tuple[str, ...]]:
        """The base of layers with a window (None: they have what all have), and a sentence where nobody set it."""
        if LOCAL in self.values:
            return self.values[LOCAL], ()
        if self.layers == EVERYWHERE:
            return None, ()
        if under.local_base is not None:
            said = f"rope.{LOCAL}={under.local_base:g}: layers with a window keep the plain RoPE that they have in {source}"
            return under.local_base, (said,)
        if self.layers == BY_LAYER:
            return under.base, (f"rope.{LOCAL}={under.base:g}: layers with a window have plain RoPE of the base of {source}",)
        return None, ()

    def _factor(self, under: RopeVariant, seq_length: int, trained: int, source: str) -> tuple[float, str]:
        begin = self.values.get(TRAINED)
        if under.variant == self.variant and begin is None:
            was, told = float(getattr(under, FACTOR)), "trained tokens"
            if isinstance(under, YarnRope) and was * under.original_max_position_embeddings > trained:
                # Qwen's way: the model's own length stays in the config beside a YaRN that goes further.
                trained, told = round(was * under.original_max_position_embeddings), "tokens that its YaRN reaches"
            factor = was * max(1.0, seq_length / trained)
            return factor, f"rope.factor={factor:g}: {was:g} of {source} x {seq_length:,} / {trained:,} {told}"
        begin = begin or trained_length(under, trained)
        if seq_length <= begin:
            return 1.0, f"rope.factor=1: windows of {seq_length:,} tokens are within the trained {begin:,}: none is stretched"
        return seq_length / begin, f"rope.factor={seq_length / begin:g}: {seq_length:,} / {begin:,} trained tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletedRope:
    """A variant whose numbers are all known, and a sentence on each that was not set."""

    variant: RopeVariant
    notes: tuple[str, ...]


def _effective(variant: RopeVariant, notes: tuple[str, ...]) -> CompletedRope:
    """`variant`, unless it asks for two RoPEs that are one."""
    if (
        variant.local is not None
        and type(variant) in (VARIANTS["rope"], VARIANTS["abf"])
        and variant.base == variant.local_base
    ):
        mend = (
            f"has no effect: all layers would have plain RoPE of base {variant.base:g}; set rope.variant, rope.base or "
            f"rope.{LOCAL}, or leave it out"
        )
        raise ConfigError(f"rope.{LAYERS}", BY_LAYER, mend)
    return CompletedRope(variant=variant, notes=notes)


def _own_base(variant: str | None) -> float | None:
    """ABF is its base; every other variant takes the one it finds."""
    return float(VARIANTS["abf"].base) if variant == "abf" else None


def _carried(variant: str | None, under: RopeVariant) -> dict[str, Any]:
    """The numbers of the checkpoint's RoPE where it is the same variant."""
    if variant != under.variant:
        return {}
    kept = to_dict(under)
    return {name: value for name, value in kept.items() if name not in ("variant", "base", FACTOR, LOCAL)}


def trained_length(under: RopeVariant, seq_length: int) -> int:
    """The length that a checkpoint's plain frequencies were trained at.

    Args:
        under: its position encoding.
        seq_length: its longest window, tokens.
    """
    original = getattr(under, TRAINED, None)
    if original is not None:
        return int(original)
    return max(1, round(seq_length / getattr(under, FACTOR, 1.0)))


def describe(variant: RopeVariant) -> str:
    """`llama3 (factor 8 from 8,192 tokens)`."""
    factor, trained = getattr(variant, FACTOR, None), getattr(variant, TRAINED, None)
    said = [f"factor {factor:g}"] if factor is not None else []
    said += [f"from {trained:,} tokens"] if trained is not None else []
    return f"{variant.variant} ({' '.join(said)})" if said else variant.variant


def parse_request(values: Mapping[str, Any], *, where: str = "rope") -> RopeRequest:
    """What `values` asks for, e.g. `{"variant": "pi"}`; fields that a checkpoint can say may be missing or null.

    Raises:
        ConfigError: no mapping, no or an unknown `variant`, an unknown field, or a bad value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(where, values, "must be a mapping: variant, and that variant's own keys")
    fields = {key: value for key, value in values.items() if value is not None}
    for key in _OTHER_WORDS & fields.keys():
        mend = f"say {where}.{LAYERS}={BY_LAYER}, and the base of layers with a window as {where}.{LOCAL}"
        raise ConfigError(f"{where}.{key}", fields[key], mend)
    name, layers = fields.pop("variant", None), fields.pop(LAYERS, None)
    if layers is not None and layers not in (EVERYWHERE, BY_LAYER):
        mend = f"{BY_LAYER} leaves layers with a window plain RoPE of {where}.{LOCAL}; {EVERYWHERE} gives it to all layers"
        raise ConfigError(f"{where}.{LAYERS}", layers, mend)
    if layers == EVERYWHERE and LOCAL in fields:
        raise ConfigError(f"{where}.{LOCAL}", fields[LOCAL], f"has no effect with {where}.{LAYERS}={EVERYWHERE}; leave one out")
    if name is None and (fields or layers) and fields.keys() <= {"base", LOCAL}:
        plain = build(Rope, fields, where=where)
        return RopeRequest(variant=None, values={key: getattr(plain, key) for key in fields}, layers=layers)
    if name is None and fields:
        raise ConfigError(
            f"{where}.variant", None, f"name it beside {', '.join(map(str, fields))}; known: {', '.join(VARIANTS)}"
        )
    if not isinstance(name, str) or name not in VARIANTS:
        raise ConfigError(f"{where}.variant", name, f"no such variant, {did_you_mean(str(name), VARIANTS)}")
    cls = VARIANTS[name]
    known = {field.name for field in dataclasses.fields(cls)}
    for key in fields.keys() - known:
        there = belongs_to(str(key))
        meant = f"did you mean {there}?" if there else did_you_mean(str(key), [*known, LAYERS])
        raise ConfigError(f"{where}.{key}", fields[key], f"unknown key, {meant}")
    stand_ins = {FACTOR: 1.0, TRAINED: 2, **dict.fromkeys(_LISTS, (1.0,))}
    if "attention_factor" in fields:
        for key in ("mscale", "mscale_all_dim"):
            if key in fields:
                mend = f"has no effect beside {where}.attention_factor, which says the same outright; leave one out"
                raise ConfigError(f"{where}.{key}", fields[key], mend)
    made = build(cls, {**{key: value for key, value in stand_ins.items() if key in known}, **fields}, where=where)
    short, long = (getattr(made, key) if key in fields else None for key in _LISTS)
    if short is not None and long is not None and len(short) != len(long):
        mend = f"must have as many numbers as {where}.short_factor, {len(short)}: one a pair of dimensions"
        raise ConfigError(f"{where}.long_factor", f"{len(long)} numbers", mend)
    return RopeRequest(variant=name, values={key: getattr(made, key) for key in fields}, layers=layers)


def check_layers_differ(windows: Sequence[bool], *, key: str = f"rope.{LAYERS}") -> None:
    """Refuse RoPE by layer type on a model whose layers are all of one type, where it would have no effect.

    Args:
        windows: whether each layer has a sliding window.

    Raises:
        ConfigError: no layer has one, or all have.
    """
    if not any(windows):
        mend = (
            "no layer of the model has a window, so that none would keep plain RoPE; set model.window_size and "
            "model.window_attn_skip_freq, or leave it out"
        )
        raise ConfigError(key, BY_LAYER, mend)
    if all(windows):
        mend = (
            "every layer of the model has the window; say in model.window_attn_skip_freq which see all tokens, or leave it out"
        )
        raise ConfigError(key, BY_LAYER, mend)
