"""The sizes of a dense decoder that decide its arithmetic and memory: from a name, a Hugging Face config.json, or numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nemo_longctx.checkpoints import checkpoints
from nemo_longctx.config import ConfigError, build, did_you_mean
from nemo_longctx.hf.families import DEFAULTS, reason
from nemo_longctx.nemo_files import embedding_rows


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only transformer with RMSNorm and without mixture of experts.

    Attributes:
        num_layers: transformer layers (l).
        hidden_size: width of the residual stream (h).
        ffn_hidden_size: inner width of the MLP.
        num_attention_heads: query heads (a).
        num_query_groups: key/value heads; None means one for each query head.
        kv_channels: width of a head (d); None means hidden_size / num_attention_heads.
        vocab_size: rows of the embedding, before padding.
        gated_linear_unit: three MLP matrices (SwiGLU) rather than two.
        share_embeddings_and_output_weights: the LM head is the embedding.
        add_qkv_bias: biases on the query, key and value projections (Qwen2.5).
        seq_length: the length that the published checkpoint was trained on, in tokens; the planner's default.
        sliding_window: tokens that a query looks back on at most, itself included; None for all of them.
        full_layers: layers that look back on all tokens where the others have the window; None for none of them.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    num_query_groups: int | None = None
    kv_channels: int | None = None
    gated_linear_unit: bool = True
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    seq_length: int = 4096
    sliding_window: int | None = None
    full_layers: int | None = None

    def __post_init__(self):
        optional = [key for key in ("num_query_groups", "kv_channels", "sliding_window") if getattr(self, key) is not None]
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size", "seq_length")
        for key in (*sizes, *optional):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"model.{key}", value, "must be a whole number of 1 or more")
        if self.full_layers is not None and not 0 <= self.full_layers <= self.num_layers:
            raise ConfigError("model.full_layers", self.full_layers, f"must be a number of the {self.num_layers} layers")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "model.num_attention_heads",
                self.num_attention_heads,
                f"does not divide hidden_size={self.hidden_size}; set kv_channels or change one of the two",
            )
        if self.num_attention_heads % self.query_groups:
            raise ConfigError(
                "model.num_query_groups", self.num_query_groups, f"must divide num_attention_heads={self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head (d)."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def windowed_layers(self) -> int:
        """Layers that have the sliding window."""
        return 0 if self.sliding_window is None else self.num_layers - (self.full_layers or 0)

    @property
    def query_groups(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Query heads x head width: h in most models."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Key/value heads x head width."""
        return self.query_groups * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Matrix parameters of one layer's attention: query, key, value and output projections."""
        return self.hidden_size * (2 * self.query_width + 2 * self.kv_width)

    @property
    def mlp_weights(self) -> int:
        """Matrix parameters of one layer's MLP."""
        return self.hidden_size * self.ffn_hidden_size * (3 if self.gated_linear_unit else 2)

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer: matrices, biases, two norms."""
        bias = self.query_width + 2 * self.kv_width if self.add_qkv_bias else 0
        return self.attention_weights + self.mlp_weights + bias + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding table, which are also those of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters of the model; a shared embedding counts once."""
        tables = 1 if self.share_embeddings_and_output_weights else 2
        return self.num_layers * self.layer_parameters + tables * self.embedding_parameters + self.hidden_size


# Sizes: the config.json that each checkpoint is published with. Llama 2 and Code Llama: Touvron et al. 2023, Roziere et al.
# 2023; Llama 3: Grattafiori et al. 2024, Table 3; Qwen2.5: Qwen team 2024, Table 1; Mistral 7B: Jiang et al. 2023, Table 1
# (v0.3: a vocabulary of 32,768). The paper's own 34B was never published: Code Llama 34B has its sizes.
MODELS: dict[str, ModelShape] = {
    "llama2_7b": ModelShape(
        num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=32000, seq_length=4096
    ),
    "llama2_13b": ModelShape(
        num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40, vocab_size=32000, seq_length=4096
    ),
    "codellama_34b": ModelShape(
        num_layers=48,
        hidden_size=8192,
        ffn_hidden_size=22016,
        num_attention_heads=64,
        num_query_groups=8,
        vocab_size=32000,
        seq_length=4096,
    ),
    "llama2_70b": ModelShape(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        vocab_size=32000,
        seq_length=4096,
    ),
    "llama3_8b": ModelShape(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=128256,
        seq_length=8192,
    ),
    "llama3_70b": ModelShape(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        vocab_size=128256,
        seq_length=8192,
    ),
    "qwen25_7b": ModelShape(
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152064,
        add_qkv_bias=True,
        seq_length=32768,
    ),
    "mistral_7b": ModelShape(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32768,
        seq_length=32768,
    ),
}

# Classes of nemo.collections.llm whose sizes the planner knows by name.
CLASSES = {
    "Llama2Config7B": "llama2_7b",
    "Llama2Config13B": "llama2_13b",
    "CodeLlamaConfig34B": "codellama_34b",
    "Llama2Config70B": "llama2_70b",
    "Llama3Config8B": "llama3_8b",
    "Llama3Config70B": "llama3_70b",
    "Qwen25Config7B": "qwen25_7b",
    "MistralConfig7B": "mistral_7b",
}

# Of a Hugging Face config.json, once `hf.config` has checked it and filled in what transformers takes where it says nothing.
_HF_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "num_key_value_heads": "num_query_groups",
    "max_position_embeddings": "seq_length",
}
_HF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def model_by_name(name: str) -> ModelShape:
    """The published model called `name`.

    Raises:
        ConfigError: the name is not known.
    """
    if name not in MODELS:
        raise ConfigError("model", name, f"not a model that the planner knows by name, {did_you_mean(name, MODELS)}")
    return MODELS[name]


def class_sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the config class that a recipe's `model` names; empty where it names none, or one that is not known here."""
    name = CLASSES.get(str(model.get("config")))
    return {} if name is None else {key: value for key, value in asdict(MODELS[name]).items() if value is not None}


def model_from_hf(path: Path) -> ModelShape:
    """Read the sizes out of a Hugging Face `config.json` (Llama, Mistral, Qwen2 and models of their form).

    Raises:
        ConfigError: the file is of an architecture whose arithmetic this planner does not know, or lacks a size.
        OSError: the file cannot be read.
    """
    config = json_mapping(path, key="model")
    where = str(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        mend = f"model_type={kind!r} is not planned for ({reason(kind, config)}); known: {', '.join(DEFAULTS)}"
        raise ConfigError("model", where, mend)
    experts = [key for key in _HF_EXPERTS if config.get(key)]
    if experts:
        raise ConfigError("model", where, f"{experts[0]}={config[experts[0]]!r}: FLOPs of experts are not counted")
    from nemo_longctx.hf.config import read_config  # a plan by name needs no NumPy

    try:
        found = read_config(config)  # what an import refuses is no model to plan for
    except ConfigError as error:
        raise ConfigError(f"model.{error.key}", error.value, f"{error.mend}, in {where}") from error
    values, windows, head_dim = found.values, found.windows, found.rotary_dim
    window = next((each for each in windows if each is not None), None)
    return ModelShape(
        **{ours: values[theirs] for theirs, ours in _HF_SIZES.items()},
        kv_channels=None if head_dim * values["num_attention_heads"] == values["hidden_size"] else head_dim,
        share_embeddings_and_output_weights=values["tie_word_embeddings"],
        # Qwen2 always has these biases, and its config.json does not say so; StarCoder2's others are too small to count.
        gated_linear_unit=kind != "starcoder2",
        add_qkv_bias=kind in ("qwen2", "starcoder2"),
        sliding_window=window,
        full_layers=windows.count(None) if window and None in windows else None,
    )


def json_mapping(path: Path, *, key: str) -> dict[str, Any]:
    """What a JSON file holds, which must be a mapping; `key` is the setting that named the file.

    Raises:
        ConfigError: it is not JSON, or another thing than a mapping.
        OSError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise ConfigError(key, str(path), f"is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(key, str(path), f"holds a {type(values).__name__}, where a mapping of settings was looked for")
    return values


def model_from_nemo(path: Path) -> ModelShape:
    """Read the sizes out of a NeMo 2 checkpoint's `context/model.yaml`.

    Raises:
        ConfigError: the file lacks a size, or is of a model whose arithmetic this planner does not know.
        OSError: the file cannot be read.
    """
    import yaml  # a plan by name needs none

    where = str(path)
    try:
        context = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("model", where, f"is not YAML: {' '.join(str(error).split())}") from error
    config = context.get("config") if isinstance(context, dict) else None
    if not isinstance(config, dict):
        raise ConfigError("model", where, "has no config, which a NeMo checkpoint's context/model.yaml has")
    if config.get("num_moe_experts"):
        raise ConfigError("model", where, f"num_moe_experts={config['num_moe_experts']}: FLOPs of experts are not counted")
    if config.get("vocab_size") is None:  # left to the tokenizer, NeMo's default: the weights know
        config = {**config, "vocab_size": embedding_rows(path.parent.parent)}
    missing = [f.name for f in fields(ModelShape) if f.default is MISSING and config.get(f.name) is None]
    if missing:
        raise ConfigError("model", where, f"its config lacks {', '.join(missing)}")
    return build(ModelShape, sizes_of(config), where="model")


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelShape that the fields of a NeMo model config say."""
    known = {f.name for f in fields(ModelShape)}
    sizes = {key: value for key, value in config.items() if key in known}
    window = config.get("window_size")  # Megatron-Core's: tokens before the query and after it; -1 for all
    if isinstance(window, (list, tuple)) and window and isinstance(window[0], int) and window[0] >= 0:
        sizes["sliding_window"] = window[0] + 1
        skip, layers = config.get("window_attn_skip_freq"), config.get("num_layers")
        if isinstance(skip, (list, tuple)):  # 1 for a layer with the window
            sizes["full_layers"] = sum(not each for each in skip)
        elif isinstance(skip, int) and skip > 0 and isinstance(layers, int):
            sizes["full_layers"] = layers // skip
    return sizes


def nemo_context(path: Path) -> Path | None:
    """The `context/model.yaml` of a NeMo checkpoint, or of the newest one in a run's directory; None where there is none."""
    found = [folder / "context" / "model.yaml" for folder in (path, *(each.path for each in checkpoints(path)))]
    return next((file for file in found if file.is_file()), None)


def parse_model(text: str) -> tuple[str, ModelShape]:
    """A model from the command line: a name, a config.json or its folder, a NeMo checkpoint, or `num_layers=...,...`.

    Returns:
        what to call the model, and its sizes.

    Raises:
        ConfigError: none of the four.
    """
    if "=" in text and not Path(text).exists():  # NeMo's own checkpoints are called step=100-last
        pairs: dict[str, Any] = {}
        for item in text.split(","):
            key, _, value = item.partition("=")
            pairs[key.strip()] = _number_or_flag(key.strip(), value.strip())
        return "given sizes", build(ModelShape, pairs, where="model")
    path = Path(text)
    if path.is_dir():
        context = nemo_context(path)
        if context is not None:
            return path.name, model_from_nemo(context)
        if not (path / "config.json").is_file():
            from nemo_longctx.hf.other_formats import no_config

            error = no_config(path)
            raise ConfigError("model", error.value, error.mend)
        path = path / "config.json"
    if path.suffix == ".json":
        return path.parent.name or path.name, model_from_hf(path)
    return text, model_by_name(text)


def _number_or_flag(key: str, value: str) -> int | bool:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"model.{key}", value, "must be a whole number, true or false") from error
