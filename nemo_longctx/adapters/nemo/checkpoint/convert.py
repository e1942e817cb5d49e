"""Into and out of Hugging Face: weights, RoPE of any variant, tokenizer, generation config, maximum length.

What either direction wrote is loaded again and compared with its source before it is called done: logits on random tokens, and
the frequencies and attention factor that transformers makes at every length that matters (`hf_verify`).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
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
from transformers import GenerationConfig

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.rope_module import rotary_dim_of
from nemo_longctx.adapters.nemo.checkpoint.hf_verify import (
    VERIFY_TOKENS,
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
    stored_dtype,
    to_hugging_face,
    to_megatron,
)
from nemo_longctx.adapters.nemo.checkpoint.load import load_model
from nemo_longctx.adapters.nemo.model.config import checkpoint_directory, checkpoint_model
from nemo_longctx.adapters.nemo.model.rope import place_rope, variant_of
from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import check_one_rope, family_rope, token_numbers
from nemo_longctx.hf.directory import HFDirectory, check_directory, write_copy
from nemo_longctx.hf.dtypes import by_both_names, in_dtype
from nemo_longctx.hf.files import check_target
from nemo_longctx.hf.generation import read_generation_config
from nemo_longctx.hf.serving import reading_lines, vllm_length
from nemo_longctx.hf.tokenizer import (
    check_numbers,
    copy_tokenizer,
    has_tokenizer,
    load_hf_tokenizer,
    open_tokenizer,
    with_limit,
)
from nemo_longctx.nemo_files import padded_by_host
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import DynamicNtkRope, Llama3Rope

logger = logging.getLogger(__name__)


def import_hf(source: str | Path, target: str | Path, *, verify: bool = True, verify_tokens: int | None = None) -> RopeVariant:
    """A Hugging Face directory -> a NeMo checkpoint, on the CPU.

    Args:
        source: directory with `config.json` and weights of a family that `hf.families` knows, and a tokenizer if there is one;
            as transformers 4.46 to 5 write it.
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
    check_target(target, source)
    found = check_directory(source)
    tokens = _checked_tokens(verify, verify_tokens)
    for note in found.notes:
        logger.warning("%s: %s", source, note)
    family, variant = family_of_hf(found.config), found.config.variant
    # Llama 3.1's scaling has a config class of its own, which stock tools then recognise.
    is_llama31 = family.model_type == "llama" and isinstance(variant, Llama3Rope)
    cpu.install()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="nemo_longctx_hf_") as folder,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside,
    ):
        model_copy = write_copy(found, Path(folder) / "model")
        config = AutoConfig.from_pretrained(model_copy)
        weights = source_model(model_copy, config, dtype="auto", named=source).state_dict()
        with cpu.stock_configs():
            dtype = stored_dtype(config, weights)
            nemo = nemo_config(found, family, Llama31Config if is_llama31 else family.config_class, dtype)
        model = family.model_class(nemo, tokenizer=_nemo_tokenizer(found, model_copy, Path(folder) / "tokenizer"))
        place_rope(model, variant)
        made = Path(beside) / target.name
        _save_nemo(model, weights, made)
        if verify:
            del model, weights
            gc.collect()  # the trainer holds the model in a cycle, and two more are loaded now
            module, nemo, _ = load_model(made)
            theirs = source_model(model_copy, config, dtype=torch.float32, named=source)
            longest = config.max_position_embeddings
            verify_same(module, theirs, variant, rotary_dim=rotary_dim_of(nemo), tokens=tokens, longest=longest)
        made.rename(target)
    return variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        variant: its RoPE.
        notes: what transformers and vLLM read from it, and where they differ, a line each.
    """

    variant: RopeVariant
    notes: tuple[str, ...]


def export_hf(
    checkpoint: str | Path,
    target: str | Path,
    *,
    verify: bool = True,
    verify_tokens: int | None = None,
    max_position_embeddings: int | None = None,
    tokenizer: str | Path | None = None,
) -> Exported:
    """A NeMo checkpoint -> a Hugging Face directory that transformers loads; LoRA adapters are merged into the weights.

    Args:
        checkpoint: a NeMo checkpoint, or a run's directory (its newest finished checkpoint).
        target: directory to make; nothing is left there unless the export succeeds.
        verify: load the result with transformers and compare it with the NeMo model.
        verify_tokens: length of the random input whose logits are compared; None takes `VERIFY_TOKENS`.
        max_position_embeddings: longest input, tokens; None takes the checkpoint's `seq_length`.
        tokenizer: a Hugging Face tokenizer directory, where the checkpoint carries none.

    Returns:
        the RoPE variant that was written, and what transformers and vLLM read from the directory.

    Raises:
        ConfigError: transformers cannot say this variant or architecture, `target` exists, a token has no row in the
            embedding, the checkpoint's two descriptions disagree, or the comparison fails.
    """
    target = Path(target).absolute()
    tokens = _checked_tokens(verify, verify_tokens)
    if max_position_embeddings is not None and max_position_embeddings < 1:
        raise ConfigError("max_position_embeddings", max_position_embeddings, "the longest input in tokens, 1 or more")
    cpu.install()
    directory = checkpoint_directory(checkpoint)
    check_target(target, directory / "weights")
    described = checkpoint_model(directory, {}, adapters=True)
    variant = variant_of(described)
    check_one_rope(variant)
    longest = described.config.seq_length if max_position_embeddings is None else max_position_embeddings
    if max_position_embeddings is not None and isinstance(variant, DynamicNtkRope):
        mend = "dynamic NTK must write its trained length there, where transformers starts to stretch; leave it out"
        raise ConfigError("max_position_embeddings", max_position_embeddings, mend)
    rotary_dim = rotary_dim_of(described.config)
    # A refusal comes before the weights are read, and so do xPos's and Phi-3's.
    family = family_of_nemo(described.config).model_type
    family_rope(family, variant, variant.to_hf(rotary_dim=rotary_dim, max_position_embeddings=longest))
    hf_tokenizer = _hf_tokenizer(described.tokenizer, tokenizer)
    _check_tokens(hf_tokenizer, described.config)
    module, config, _ = load_model(checkpoint, merge=True)
    if padded_by_host(directory) and described.tokenizer is not None:
        config.vocab_size = described.tokenizer.vocab_size  # the rest are rows that the host added and nobody trained
    exported = hf_model(module, config, variant, max_position_embeddings=longest, tokenizer=hf_tokenizer)
    limit = _lengths_together(exported, hf_tokenizer, longest)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        exported.save_pretrained(beside)
        by_both_names(beside / "config.json")
        if hf_tokenizer is not None:
            hf_tokenizer.save_pretrained(beside)
        if verify:
            verify_export(module, beside, variant, rotary_dim=rotary_dim, tokens=tokens, longest=longest)
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(variant=variant, notes=tuple(reading_lines(exported.config.to_dict(), variant, limit)))


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

    family = family_of_nemo(config)
    keys = variant.to_hf(rotary_dim=rotary_dim_of(config), max_position_embeddings=max_position_embeddings)
    rope = family_rope(family.model_type, variant, keys)
    fields = hf_fields(config, family) | rope | _token_numbers(config.generation_config, tokenizer)
    hf_config = AutoConfig.for_model(**fields, **in_dtype(config.params_dtype))
    exported = AutoModelForCausalLM.from_config(hf_config, **in_dtype(config.params_dtype))
    weights = {name: w.cpu() for name, w in module.state_dict().items() if isinstance(w, torch.Tensor)}
    _load_strictly(exported, to_hugging_face(weights, config))
    if config.generation_config is not None:
        exported.generation_config = _saveable(config.generation_config, config.vocab_size)
    return exported


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


def _nemo_tokenizer(found: HFDirectory, made: Path, folder: Path) -> Any:
    """NeMo's tokenizer over a copy of the tokenizer's files alone, which the checkpoint's context then takes in."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    if not found.has_tokenizer:
        return None
    loaded = load_hf_tokenizer(made, named=found.path)
    check_numbers(loaded.get_vocab(), found.config.values["vocab_size"])  # a class may add tokens of its own
    loaded.save_pretrained(folder, save_jinja_files=False)  # NeMo copies files alone, and several templates make a folder
    return AutoTokenizer(str(folder))


def _hf_tokenizer(nemo_tokenizer: Any, directory: str | Path | None) -> Any:
    """A transformers tokenizer of our own, whose length limit is changed."""
    if directory is not None:
        if not has_tokenizer(Path(directory)):
            raise ConfigError("--tokenizer", str(directory), "no tokenizer there; give a Hugging Face tokenizer's directory")
        with tempfile.TemporaryDirectory(prefix="nemo_longctx_tokenizer_") as folder:
            copy_tokenizer(Path(directory), Path(folder))
            return load_hf_tokenizer(Path(folder), named=Path(directory))
    return _without_borrowed(copy.deepcopy(getattr(nemo_tokenizer, "tokenizer", None)))


def _without_borrowed(tokenizer: Any) -> Any:
    """NeMo names the end as separator and the beginning as class token where a tokenizer has neither; an export leaves them out
    again, where the files that it was loaded from show it."""
    files = Path(str(getattr(tokenizer, "name_or_path", None) or ""))
    if not files.name or not has_tokenizer(files):
        return tokenizer
    own = open_tokenizer(files)
    for borrowed, lender in (("sep_token", "eos_token"), ("cls_token", "bos_token")):
        if getattr(own, borrowed) is None and getattr(tokenizer, borrowed) == getattr(own, lender):
            setattr(tokenizer, borrowed, None)
    return tokenizer


def _check_tokens(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer or special tokens that the embedding has no rows for, before weights are read."""
    if tokenizer is not None:
        check_numbers(tokenizer.get_vocab(), config.vocab_size)
    numbers = _token_numbers(config.generation_config, tokenizer)
    for key in numbers:
        token_numbers(numbers, key, config.vocab_size, [], file="the checkpoint")


def _saveable(generation: Any, vocab_size: int) -> Any:
    """A generation config that transformers saves: other tools' checkpoints carry fields without effect, which it refuses."""
    try:
        with tempfile.TemporaryDirectory(prefix="nemo_longctx_generation_") as folder:
            generation.save_pretrained(folder)
    except ValueError:
        return GenerationConfig(**read_generation_config(generation.to_diff_dict(), vocab_size)[0])
    return copy.deepcopy(generation)


def _lengths_together(exported: Any, tokenizer: Any, longest: int) -> int | None:
    """Let generation config and tokenizer end where the model does; returns the tokenizer's limit, None where there is none.

    A tokenizer without a limit stays so, unless vLLM would then take inputs that the model was not made for.
    """
    generation = exported.generation_config
    if generation.max_length != GenerationConfig().max_length:
        generation.max_length = longest
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is not None:  # tokenizer.json's own, by which the tokenizers library cuts
        backend.enable_truncation(**{**backend.truncation, "max_length": longest})
    limit = with_limit(tokenizer.model_max_length, longest)
    if vllm_length(exported.config.to_dict(), limit) > longest:
        limit = longest
    tokenizer.model_max_length = limit
    return limit


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
    # Attention has no weights, and the stock one of older Megatron-Core takes windows from Transformer Engine alone.
    window, model.config.window_size = model.config.window_size, None
    trainer = connector.nemo_setup(
        model, nl.Trainer(devices=1, accelerator="cpu", strategy=strategy, callbacks=callbacks, logger=False)
    )
    model.config.window_size = window
    module = model.module
    converted = to_megatron(weights, set(module.state_dict()), model.config)
    missing, unexpected = module.load_state_dict(converted, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise ConfigError("weights", missing or unexpected, "have no counterpart in the NeMo model; cannot be imported")
    connector.nemo_save(target, trainer)
