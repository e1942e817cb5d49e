"""Into and out of Hugging Face: weights, RoPE of any variant, tokenizer, generation config, maximum length.

What either direction wrote is loaded again and compared with its source before it is called done: logits on random tokens, and
the frequencies and attention factor that transformers makes at every length that matters (`hf_verify`).
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import Llama31Config  # the base class, which nemo.collections.llm does not give out
from nemo.lightning import io
from nemo.lightning.pytorch.callbacks import ModelTransform

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.rope_module import rotary_dim_of
from nemo_longctx.adapters.nemo.checkpoint.hf_verify import (
    VERIFY_TOKENS,
    as_installed,
    source_model,
    verify_export,
    verify_same,
)
from nemo_longctx.adapters.nemo.checkpoint.hf_weights import (
    Weights,
    family_of_hf,
    family_of_nemo,
    hf_fields,
    nemo_config,
    to_hugging_face,
    to_megatron,
)
from nemo_longctx.adapters.nemo.checkpoint.load import load_model
from nemo_longctx.adapters.nemo.model.config import checkpoint_directory, checkpoint_model
from nemo_longctx.adapters.nemo.model.rope import place_rope, variant_of
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import DynamicNtkRope, Llama3Rope


def import_hf(source: str | Path, target: str | Path, *, verify: bool = True, verify_tokens: int | None = None) -> RopeVariant:
    """A Hugging Face directory -> a NeMo checkpoint, on the CPU.

    Args:
        source: directory with `config.json` and weights (Llama, Mistral, Qwen2, Qwen3), and a tokenizer if there is one.
        target: checkpoint directory to make; nothing is left there unless the import succeeds.
        verify: load the result and compare it with the model that transformers makes of `source`.
        verify_tokens: length of the random input whose logits are compared; None takes `VERIFY_TOKENS`.

    Returns:
        the RoPE variant that came along.

    Raises:
        ConfigError: `target` exists, another architecture, a setting that would be lost, weights that are damaged, missing or
            left over, or the comparison fails.
    """
    from transformers import AutoConfig

    source, target = Path(source), Path(target).absolute()
    if not (source / "config.json").is_file():
        raise ConfigError("HF_DIR", str(source), "no config.json there; give a Hugging Face model directory")
    _check_free(target)
    tokens = _checked_tokens(verify, verify_tokens)
    config = AutoConfig.from_pretrained(source)
    family, variant = family_of_hf(config), RopeVariant.from_hf(config.to_dict())
    # Llama 3.1's scaling has a config class of its own, which stock tools then recognise.
    is_llama31 = family.model_type == "llama" and isinstance(variant, Llama3Rope)
    cpu.install()
    with cpu.stock_configs():
        nemo = nemo_config(config, family, Llama31Config if is_llama31 else family.config_class, _generation_config(source))
    config = as_installed(config, variant)
    weights = source_model(source, config, dtype="auto").state_dict()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="nemo_longctx_tokenizer_") as folder,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside,
    ):
        model = family.model_class(nemo, tokenizer=_nemo_tokenizer(source, Path(folder)))
        place_rope(model, variant)
        made = Path(beside) / target.name
        _save_nemo(model, weights, made)
        if verify:
            del model, weights
            gc.collect()  # the trainer holds the model in a cycle, and two more are loaded now
            module, nemo, _ = load_model(made)
            theirs = source_model(source, config, dtype=torch.float32)
            longest = config.max_position_embeddings
            verify_same(module, theirs, variant, rotary_dim=rotary_dim_of(nemo), tokens=tokens, longest=longest)
        made.rename(target)
    return variant


def export_hf(
    checkpoint: str | Path,
    target: str | Path,
    *,
    verify: bool = True,
    verify_tokens: int | None = None,
    max_position_embeddings: int | None = None,
    tokenizer: str | Path | None = None,
) -> RopeVariant:
    """A NeMo checkpoint -> a Hugging Face directory that transformers loads; LoRA adapters are merged into the weights.

    Args:
        checkpoint: a NeMo checkpoint, or a run's directory (its newest finished checkpoint).
        target: directory to make; nothing is left there unless the export succeeds.
        verify: load the result with transformers and compare it with the NeMo model.
        verify_tokens: length of the random input whose logits are compared; None takes `VERIFY_TOKENS`.
        max_position_embeddings: longest input, tokens; None takes the checkpoint's `seq_length`.
        tokenizer: a Hugging Face tokenizer directory, where the checkpoint carries none.

    Returns:
        the RoPE variant that was written.

    Raises:
        ConfigError: transformers cannot say this variant or architecture, `target` exists, or the comparison fails.
    """
    target = Path(target).absolute()
    _check_free(target)
    tokens = _checked_tokens(verify, verify_tokens)
    if max_position_embeddings is not None and max_position_embeddings < 1:
        raise ConfigError("max_position_embeddings", max_position_embeddings, "the longest input in tokens, 1 or more")
    cpu.install()
    described = checkpoint_model(checkpoint_directory(checkpoint), {}, adapters=True)
    variant = variant_of(described)
    longest = described.config.seq_length if max_position_embeddings is None else max_position_embeddings
    if max_position_embeddings is not None and isinstance(variant, DynamicNtkRope):
        mend = "dynamic NTK must write its trained length there, where transformers starts to stretch; leave it out"
        raise ConfigError("max_position_embeddings", max_position_embeddings, mend)
    rotary_dim = rotary_dim_of(described.config)
    family_of_nemo(described.config)  # a refusal comes before the weights are read, and so does xPos's
    variant.to_hf(rotary_dim=rotary_dim, max_position_embeddings=longest)
    module, config, nemo_tokenizer = load_model(checkpoint, merge=True)
    hf_tokenizer = _hf_tokenizer(nemo_tokenizer, tokenizer)
    exported = hf_model(module, config, variant, max_position_embeddings=longest, tokenizer=hf_tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        exported.save_pretrained(beside)
        if hf_tokenizer is not None:
            hf_tokenizer.save_pretrained(beside)
        if verify:
            verify_export(module, beside, variant, rotary_dim=rotary_dim, tokens=tokens, longest=longest)
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return variant


def hf_model(
    module: torch.nn.Module, config: Any, variant: RopeVariant, *, max_position_embeddings: int, tokenizer: Any = None
) -> Any:
    """The transformers model of a Megatron-Core one (unsharded), with its config, RoPE and generation config.

    Args:
        module: `megatron.core.models.gpt.GPTModel`.
        config: its NeMo config.
        variant: its RoPE.
        max_position_embeddings: longest input, tokens.
        tokenizer: a transformers tokenizer, for the numbers of its special tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = variant.to_hf(rotary_dim=rotary_dim_of(config), max_position_embeddings=max_position_embeddings)
    fields = hf_fields(config, family_of_nemo(config)) | rope | _token_numbers(config.generation_config, tokenizer)
    hf_config = AutoConfig.for_model(**fields, dtype=config.params_dtype)
    exported = AutoModelForCausalLM.from_config(hf_config, dtype=config.params_dtype)
    weights = {name: w.cpu() for name, w in module.state_dict().items() if isinstance(w, torch.Tensor)}
    _load_strictly(exported, to_hugging_face(weights, config))
    if config.generation_config is not None:
        exported.generation_config = config.generation_config
    return exported


def _check_free(target: Path) -> None:
    if target.exists():
        raise ConfigError("target", str(target), "exists already; remove it or name another")


def _checked_tokens(verify: bool, verify_tokens: int | None) -> int:
    """Length of the input of a comparison."""
    if verify_tokens is None:
        return VERIFY_TOKENS
    if not verify:
        raise ConfigError("verify_tokens", verify_tokens, "has no effect where nothing is verified; leave one of the two out")
    if verify_tokens < 1:
        raise ConfigError("verify_tokens", verify_tokens, "the length of the compared input in tokens, 1 or more")
    return verify_tokens


def _load_strictly(model: torch.nn.Module, weights: Weights) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name != "lm_head.weight" or not model.config.tie_word_embeddings]  # type: ignore[union-attr]
    if missing or unexpected:
        raise ConfigError("weights", missing or unexpected, "have no counterpart in transformers' model; cannot be exported")


def _generation_config(source: Path) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(source) if (source / "generation_config.json").is_file() else None


def _nemo_tokenizer(source: Path, folder: Path) -> Any:
    """NeMo's tokenizer over a copy of the tokenizer's files alone, which the checkpoint's context then takes in."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from transformers import AutoTokenizer as HFTokenizer

    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    HFTokenizer.from_pretrained(source).save_pretrained(folder)
    return AutoTokenizer(str(folder))


def _hf_tokenizer(nemo_tokenizer: Any, directory: str | Path | None) -> Any:
    from transformers import AutoTokenizer

    if directory is not None:
        return AutoTokenizer.from_pretrained(directory)
    return getattr(nemo_tokenizer, "tokenizer", None)


def _token_numbers(generation_config: Any, tokenizer: Any) -> dict[str, Any]:
    """Beginning, end and padding token: the generation config's word first, since a chat model may end in several ways."""
    numbers = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(generation_config, name, None)
        numbers[name] = found if found is not None else getattr(tokenizer, name, None)
    return numbers


def _save_nemo(model: llm.GPTModel, weights: Weights, target: Path) -> None:
    """Build `model`, fill it, and let NeMo write its own checkpoint: weights and context."""
    connector = io.ModelConnector(str(target))
    strategy = nl.MegatronStrategy(ckpt_save_optimizer=False, always_save_context=True)
    # The transform itself changes no weight; NeMo only asks that its callback be there.
    callbacks = [ModelTransform()] if model.model_transform is not None else []
    trainer = connector.nemo_setup(
        model, nl.Trainer(devices=1, accelerator="cpu", strategy=strategy, callbacks=callbacks, logger=False)
    )
    module = model.module
    converted = to_megatron(weights, set(module.state_dict()), model.config)
    missing, unexpected = module.load_state_dict(converted, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise ConfigError("weights", missing or unexpected, "have no counterpart in the NeMo model; cannot be imported")
    connector.nemo_save(target, trainer)
