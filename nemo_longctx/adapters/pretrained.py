"""Models and tokenizers from where they were saved: a NeMo checkpoint or run, a Hugging Face folder, or a name on its hub."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.checks import check_name, check_tokenizer
from nemo_longctx.eval.results_cache import weights_digest
from nemo_longctx.hf.model import load_hf_model
from nemo_longctx.hf.other_formats import no_nemo_checkpoint, told_apart
from nemo_longctx.hf.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_longctx.eval.scoring import CausalModel

logger = logging.getLogger(__name__)


def load_checkpoint(
    path: str,
    *,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> tuple[CausalModel, str, Any, Any]:
    """A checkpoint behind the scorer's interface, its digest, the tokenizer in it (None where it holds none), and the group of
    ranks that share its work (None: this process alone).

    Args:
        path: NeMo 2 checkpoint or run folder, or name or folder of a Hugging Face model.
        device: default, CUDA where there is one. lm-eval's command line says "cuda:0" unasked, which without one is the CPU.
        dtype: "auto" for the checkpoint's own, or torch's name of one.
        tensor_parallel_size, pipeline_parallel_size: of a NeMo checkpoint under torchrun; see `LongContextLM`.

    Raises:
        ConfigError: parallel sizes for a Hugging Face model, or as `load_nemo_checkpoint`.
    """
    check_name("checkpoint", path)
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("there is no %s on this machine: %s is read on the CPU", device, path)
        device = None
    if not _is_hugging_face(path):
        from nemo_longctx.adapters.megatron.inference import data_group
        from nemo_longctx.adapters.nemo.checkpoint.load import load_nemo_checkpoint

        model, weights, tokenizer = load_nemo_checkpoint(
            path,
            max_length=max_length,
            device=device,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
        )
        return model, weights, tokenizer, data_group()
    if tensor_parallel_size * pipeline_parallel_size > 1:
        mend = "a Hugging Face model is read whole; nemo-longctx import it for several processes"
        raise ConfigError("tensor_parallel_size", tensor_parallel_size, mend)
    from nemo_longctx.eval.hf import HFCausalModel

    hf = load_hf_model(path, dtype).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # The same weights under another rope_theta are another model.
    settings = json.dumps(hf.config.to_diff_dict(), sort_keys=True, default=str)
    whole = HFCausalModel(hf, max_length=max_length)
    if whole.stretched:  # results that were kept before each input had the frequencies of its own length are others
        settings += " by length"
    return whole, weights_digest(hf.state_dict().items(), settings), path, None


def check_source(path: str, tokenizer: Any = None) -> None:
    """Refuse what cannot be evaluated before anything is loaded: a path with a slip, a folder without a tokenizer.

    Args:
        path: as `load_checkpoint` takes it. tokenizer: given beside it, or None for the checkpoint's own.

    Raises:
        ConfigError: nothing there, with what is; or no tokenizer.
    """
    check_name("checkpoint", path)
    if isinstance(tokenizer, str):
        check_tokenizer("tokenizer", tokenizer)
    folder = Path(path)
    if folder.is_file():
        raise ConfigError("checkpoint", path, no_nemo_checkpoint(folder))
    if not folder.is_dir():
        return
    if _is_hugging_face(path):
        if tokenizer is None:
            check_tokenizer("tokenizer", path)
    elif not any((folder / name).is_dir() for name in ("weights", "context", "checkpoints")):  # of NeMo's checkpoints and runs
        mend = "is no checkpoint; give a NeMo checkpoint or run, or a Hugging Face directory with config.json"
        raise ConfigError("checkpoint", path, told_apart(folder) or no_nemo_checkpoint(folder, mend))


def _is_hugging_face(path: str) -> bool:
    """Whether `path` is a Hugging Face folder, or no folder at all and so a name on the hub."""
    return not Path(path).is_dir() or (Path(path) / "config.json").is_file()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a tokenizer does: its rules where it is a fast one, else its class and vocabulary; which token begins,
    which ends, and which are left out of texts (not by what names: NeMo calls the end `sep_token` too)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()])
    special = json.dumps([tokenizer.bos_token, tokenizer.eos_token, sorted(set(tokenizer.all_special_tokens))])
    return hashlib.blake2b((rules + special).encode(), digest_size=16).hexdigest()


def hf_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer itself, from its name or from inside NeMo's `AutoTokenizer`.

    Raises:
        ConfigError: none, or another kind of tokenizer.
    """
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, str):
        check_tokenizer("tokenizer", tokenizer)
        try:
            return open_tokenizer(tokenizer)
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError("tokenizer", tokenizer, f"no Hugging Face tokenizer can be loaded from there ({why})") from error
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        kind = None if tokenizer is None else type(tokenizer).__name__
        raise ConfigError("tokenizer", kind, "give a Hugging Face tokenizer (path, name or object) for evaluation")
    return tokenizer
