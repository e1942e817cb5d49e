"""A stock NeMo GPT model with long-context settings: from a config class or a checkpoint, the differences in the open.

Only the host's own fields are set (`seq_length`, `rotary_base`, `transformer_layer_spec`, `forward_step_fn`, ...), so that
checkpoints, exporters and tools of the host see what the run did.
"""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from nemo.lightning import io

from nemo_longctx.activations import megatron_fields, recompute_name
from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.attention import long_context_layer_spec
from nemo_longctx.adapters.megatron.rope_module import check_supported, check_windows
from nemo_longctx.adapters.megatron.steps import longctx_data_step, longctx_forward_step
from nemo_longctx.adapters.nemo.model.rope import place_rope, set_config_field, variant_of
from nemo_longctx.adapters.nemo.model.rope import settings as rope_settings
from nemo_longctx.checkpoints import checkpoints, fault_of, is_checkpoint, is_unfinished, read_manifest
from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.data.tokenization import check_hub_name
from nemo_longctx.hf.other_formats import no_nemo_checkpoint
from nemo_longctx.hf.tokenizer import in_other_words, open_tokenizer, other_things
from nemo_longctx.model_fields import UNEVEN, no_rope_layers
from nemo_longctx.nemo_files import check_context, check_whole, embedding_rows
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.trust import check_checkpoint

# A checkpoint's weights fix these: another value in the recipe cannot be loaded into them.
SHAPE_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size",
    "share_embeddings_and_output_weights", "normalization", "gated_linear_unit", "add_bias_linear", "add_qkv_bias",
    "qk_layernorm", "num_moe_experts",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingChange:
    """One line of the table that a run prints before it begins: what the checkpoint (or class) has, what the run uses."""

    setting: str
    before: Any
    run: Any

    @property
    def changed(self) -> bool:
        return self.before != self.run


def fresh_model(model: Mapping[str, Any], *, tokenizer: Any = None) -> GPTModel:
    """A model with random weights from a config class of `nemo.collections.llm`.

    Args:
        model: `config`, the class's name (`Llama2Config7B`), and overrides of its fields.
        tokenizer: what checkpoints and exports of the model carry.

    Raises:
        ConfigError: no such class, no such field, or values that the class itself refuses.
    """
    fields = {key: _in_the_hosts_words(key, value) for key, value in model.items() if key != "config"}
    config_class = _config_class(model["config"])
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"model.{key}", value, f"{config_class.__name__} has no such field, {did_you_mean(key, known)}")
    with cpu.stock_configs():
        try:
            config = config_class(**fields)
        except Exception as error:  # whatever the class trips over, it is what these fields hold
            said = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError("model", dict(model), f"{config_class.__name__} refuses these values: {said}") from error
    _check_config(config)
    return model_class(config_class)(config, tokenizer=tokenizer)


def checkpoint_model(path: str | Path, overrides: Mapping[str, Any], *, adapters: bool = False) -> GPTModel:
    """The model that a NeMo checkpoint describes (config and tokenizer; weights are loaded by the strategy).

    Args:
        path: a NeMo 2 distributed checkpoint: a directory with `weights/` and `context/`.
        overrides: fields of its config to change; one that the weights fix must agree with them. `config` names a class that
            the checkpoint must have the shape of.
        adapters: take a checkpoint of LoRA adapters too; a run that is to begin from one would find no weights in it.

    Raises:
        ConfigError: no checkpoint there, one without context, a field unknown or contradicting the weights.
    """
    directory = checkpoint_directory(path)
    if not adapters:
        check_whole(directory)
    check_checkpoint(directory)
    check_context(directory)
    with cpu.stock_configs():
        model = io.load_context(directory / "context", subpath="model")
    if model.config.vocab_size is None:  # NeMo's default: the tokenizer's, padded
        rows = embedding_rows(directory)
        if rows is not None:
            set_config_field(model, "vocab_size", rows)
    _forget_stages(model)
    check_supported(model.config)
    fields = dict(overrides)
    if "config" in fields:
        named = fresh_model(fields).config
        fields = {name: getattr(named, name) for name in SHAPE_FIELDS if hasattr(named, name)} | fields
        del fields["config"]
    known = {field.name for field in dataclasses.fields(model.config)}
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"model.{key}", value, f"no such field in the checkpoint's config, {did_you_mean(key, known)}")
        was = getattr(model.config, key)
        if key in SHAPE_FIELDS and was != value:
            mend = f"the checkpoint {directory} has {was!r}, and its weights have that shape; take that or another checkpoint"
            raise ConfigError(f"model.{key}", value, mend)
        if key == "no_rope_freq":  # the host expands it where a config is made
            value = no_rope_layers(value, model.config.num_layers)
        set_config_field(model, key, _in_the_hosts_words(key, value))
    return model


def _forget_stages(model: GPTModel) -> None:
    """Take from a checkpoint's config how its run laid layers on pipeline stages: on others, or none, some would be missing."""
    for field in dataclasses.fields(model.config):
        if field.name in UNEVEN and getattr(model.config, field.name) != field.default:
            set_config_field(model, field.name, field.default)


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer that checkpoints and exports carry, by Hugging Face's name or directory; training reads tokens without it.

    Raises:
        ConfigError: none can be loaded from there.
    """
    if name is None:
        return None
    from nemo.collections.common.tokenizers.huggingface import AutoTokenizer

    check_hub_name("data.tokenizer", str(name))
    try:
        return AutoTokenizer(pretrained_model_name=str(_its_files(Path(name)) if _apart(Path(name)) else name))
    except (OSError, ValueError) as error:
        raise ConfigError("data.tokenizer", name, f"no Hugging Face tokenizer can be loaded from there: {error}") from error


def _apart(directory: Path) -> bool:
    """Whether NeMo cannot take a tokenizer from where it lies: other things are there, or it is in transformers 5's words."""
    return directory.is_dir() and (bool(other_things(directory)) or in_other_words(directory))


def _its_files(directory: Path) -> Path:
    """The tokenizer of a model's directory in a folder of its own, for as long as the process lives.

    NeMo copies all of a tokenizer's directory into each checkpoint, the weights beside it too, and cannot copy folders.
    """
    place = Path(tempfile.mkdtemp(prefix="nemo_longctx_tokenizer_"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = place / directory.resolve().name
    open_tokenizer(directory).save_pretrained(folder, save_jinja_files=False)  # templates in one file
    return folder


def checkpoint_directory(path: str | Path) -> Path:
    """The checkpoint at `path`, or the newest finished one in a run's directory (its `checkpoints/`).

    Raises:
        ConfigError: nothing there, or no finished NeMo checkpoint.
    """
    path = Path(path)
    if is_checkpoint(path):
        if is_unfinished(path):
            raise ConfigError("restore_from", str(path), "this checkpoint was not written to its end; give another one")
        if read_manifest(path) is not None and (why := fault_of(path)) is not None:
            raise ConfigError("restore_from", str(path), f"this checkpoint cannot be read: {why}; give another one")
        return path
    finished = [found.path for found in checkpoints(path) if found.path.name.endswith("-last")]
    if not finished:
        raise ConfigError("restore_from", str(path), no_nemo_checkpoint(path))
    return checkpoint_directory(finished[0])


def prepare_model(
    model: GPTModel, *, seq_length: int, variant: RopeVariant | None = None, recompute: str | None = None
) -> list[SettingChange]:
    """Give a model (not built yet) the long-context settings of a run, in place, and say what changed.

    What describes the model (`seq_length`, RoPE) goes into the context that its checkpoints carry. What only says how this
    run computes (layer spec, step functions) does not: checkpoints load where this package is not installed.

    Args:
        model: `nemo.collections.llm.GPTModel`.
        seq_length: the run's longest window, tokens.
        variant: position encoding; None keeps the model's.
        recompute: what is computed again in the backward pass (`nemo_longctx.activations`); None keeps the model's.

    Returns:
        one entry for each long-context setting, changed or not.
    """
    if not hasattr(model.config, "__io__") and hasattr(model, "__io__"):
        # NeMo captures a config by itself, but for a subclass only until the first instance of its parent in this process; the
        # precision of a run would then not reach the context, and its checkpoints be read in another.
        model.config.__io__ = model.__io__.config
    before = long_context_settings(model)
    set_config_field(model, "seq_length", seq_length)
    if hasattr(model.config, "max_position_embeddings"):  # Qwen3's, which its exporter writes
        set_config_field(model, "max_position_embeddings", seq_length)
    if variant is not None:
        place_rope(model, variant)
    check_windows(model.config, variant_of(model))  # a checkpoint's RoPE by layer type, whose windows this run took away
    for name, value in cpu.machine_fields(model.config).items():
        set_config_field(model, name, value)
    for name, value in ({} if recompute is None else megatron_fields(recompute)).items():
        setattr(model.config, name, value)
    _check_layers(model.config)
    model.config.transformer_layer_spec = long_context_layer_spec
    model.config.forward_step_fn = longctx_forward_step
    model.config.data_step_fn = longctx_data_step
    # One mean over all tokens of a step: otherwise each rank divides by its own count, which masks make unequal.
    model.config.calculate_per_token_loss = True
    run = long_context_settings(model)
    names = list(dict.fromkeys([*run, *before]))
    return [SettingChange(setting=name, before=before.get(name), run=run.get(name)) for name in names]


def long_context_settings(model: GPTModel) -> dict[str, Any]:
    """What says how far and how a model sees: the config's fields, and the RoPE variant that they (or a transform) make."""
    names = ("seq_length", "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_percent",
             "rotary_interleaved", "seq_len_interpolation_factor", "window_size", "attention_backend")  # fmt: skip
    fields = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
    layers = {name: getattr(model.config, name, None) for name in ("window_attn_skip_freq", "no_rope_freq")}
    fields |= {name: value for name, value in layers.items() if value is not None}
    return {**fields, "recompute": recompute_name(vars(model.config)), **rope_settings(variant_of(model))}


def settings_table(changes: list[SettingChange], *, source: str, resumed: Mapping[str, Any] | None = None) -> str:
    """The table of settings as text: `source` -> run, and between them the checkpoint that a run goes on from.

    A line is marked where the run is not what it was made from.
    """
    rows = [("setting", source, *(() if resumed is None else ("resumed",)), "run")]
    for change in changes:
        between = () if resumed is None else (_show(resumed.get(change.setting, "?")),)
        rows.append((change.setting + (" *" if change.changed else ""), _show(change.before), *between, _show(change.run)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def shape_of(config: GPTConfig) -> dict[str, Any]:
    """What the weights of a config's model fix (`SHAPE_FIELDS`), those that are plain values."""
    values = {name: getattr(config, name, None) for name in SHAPE_FIELDS}
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}


def fields_of(config: GPTConfig) -> dict[str, Any]:
    """The fields of a config that are plain values: what a run's record keeps, to tell one that only a later start names."""
    values = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    plain = (bool, int, float, str, list, tuple, type(None))
    found = {name: value for name, value in values.items() if isinstance(value, plain)}
    kept: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return kept


def live_of(config: GPTConfig, changes: list[SettingChange]) -> dict[str, Any]:
    """What a model has that a run's record is compared with: its fields, long-context settings and shape."""
    return fields_of(config) | {change.setting: change.run for change in changes} | shape_of(config)


def mcore_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The Megatron-Core GPT models under NeMo's, DDP's and precision's wrappers, one a pipeline chunk of this rank."""
    from megatron.core.models.gpt.gpt_model import GPTModel as MCoreGPTModel

    return [module for module in model.modules() if isinstance(module, MCoreGPTModel)]


def model_class(config_class: type) -> type[GPTModel]:
    """NeMo's model class for a config class: the one in the same module whose constructor takes that config."""
    for base in config_class.__mro__:
        module = inspect.getmodule(base)
        for candidate in vars(module).values() if module else ():
            if inspect.isclass(candidate) and issubclass(candidate, GPTModel) and candidate.__module__ == base.__module__:
                return candidate
    raise ConfigError("model.config", config_class.__name__, "no model class of nemo.collections.llm takes this config")


def _config_class(name: str) -> type[GPTConfig]:
    found = getattr(llm, str(name), None)
    if not (inspect.isclass(found) and issubclass(found, GPTConfig)):
        known = [key for key, value in vars(llm).items() if inspect.isclass(value) and issubclass(value, GPTConfig)]
        raise ConfigError(
            "model.config", name, f"no GPT config class of nemo.collections.llm, {did_you_mean(str(name), known)}"
        )
    return found


def _check_config(config: GPTConfig) -> None:
    if config.position_embedding_type not in ("rope", "yarn"):
        raise ConfigError("model.position_embedding_type", config.position_embedding_type, "only RoPE models can be extended")
    check_supported(config)
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size", None, "set it, so that no tokenizer changes the model's shape in silence")
    heads, groups = config.num_attention_heads, config.num_query_groups
    if groups and heads % groups:
        mend = f"must divide the {heads} of model.num_attention_heads; a class's own value stays where only one of them is set"
        raise ConfigError("model.num_query_groups", groups, mend)


def _check_layers(config: GPTConfig) -> None:
    """Refuse layers that the run's own would replace by others in silence, and a host that would replace the run's.

    Gemma 2's, whose softcapping is refused where they are built, are told by that.
    """
    made_by = config.transformer_layer_spec
    where = getattr(made_by, "__module__", "")
    own = where.startswith("nemo.collections.") and where != GPTConfig.__module__
    if own and getattr(config, "attn_logit_softcapping", None) is None:
        mend = f"has layers of its own ({made_by.__name__}), which the run's would take the place of; not supported"
        raise ConfigError("model.config", type(config).__name__, mend)
    if getattr(config, "attention_backend", None) is AttnBackend.local:
        mend = (
            "puts the host's attention, with a score for each two tokens, in the place of the run's; set auto, or leave it out"
        )
        raise ConfigError("model.attention_backend", "local", mend)


def _in_the_hosts_words(key: str, value: Any) -> Any:
    """A field's value as a config takes it: the host compares `attention_backend` with its own names, and passes over texts."""
    if key != "attention_backend" or not isinstance(value, str):
        return value
    if value not in AttnBackend.__members__:
        raise ConfigError("model.attention_backend", value, did_you_mean(value, AttnBackend.__members__))
    return AttnBackend[value]


def _show(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(getattr(value, "name", value))
