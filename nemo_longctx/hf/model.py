"""Models of Hugging Face directories as transformers 4 opens them, whichever of 4 and 5 wrote them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import read_json
from nemo_longctx.hf.directory import check_directory, write_copy
from nemo_longctx.hf.dtypes import in_dtype
from nemo_longctx.hf.families import DEFAULTS
from nemo_longctx.rope.base import RopeVariant


def load_hf_model(path: str | Path, dtype: Any = "auto") -> Any:
    """transformers' causal language model of a folder, or of a name on the hub. A folder of transformers 5 is read through a
    copy in the words of 4, which would pass over its RoPE without a word.

    Raises:
        ConfigError: it cannot be loaded, with what is wrong in its files where that can be told; it lacks weights; or its
            RoPE is in words of transformers 5 that nothing here puts into those of 4 (of families that do not convert, of
            multimodal models, and on the hub).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = Path(path) / "config.json"
    with tempfile.TemporaryDirectory(prefix="nemo_longctx_hf_") as folder:
        source = str(path)
        raw = read_json(config) if config.is_file() else {}
        kind = raw.get("model_type")
        known = not isinstance(kind, str) or kind in DEFAULTS
        if raw.get("rope_parameters") and known:
            source = str(write_copy(check_directory(path), Path(folder) / "model"))
        try:
            if raw or not Path(path).is_dir():
                _refuse_unread_rope(str(path), AutoConfig.from_pretrained(source))
            model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **in_dtype(dtype))
        except ConfigError:
            raise
        except Exception as error:  # whatever a class trips over, it is what these files hold
            if config.is_file() and known:
                check_directory(path)  # says it better, for the families that it knows; of others, that they do not convert
            line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ConfigError(
                "checkpoint", str(path), f"transformers cannot load it ({type(error).__name__}: {line})"
            ) from error
        missing = sorted(info["missing_keys"])
        if missing and getattr(model.config, "quantization_config", None) is None:  # those of a quantised one have other names
            shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            mend = f"lacks {len(missing)} weights ({shown}), which transformers would draw at random; copy or download it again"
            raise ConfigError("checkpoint", str(path), mend)
        return model


def _refuse_unread_rope(path: str, config: Any) -> None:
    """Refuse RoPE in transformers 5's words, its own or that of the language model in it, where 4 is here."""
    from transformers import __version__

    if int(__version__.partition(".")[0]) >= 5:
        return
    for said in (config.to_dict(), config.get_text_config().to_dict()):
        if not said.get("rope_parameters"):
            continue
        try:
            read = RopeVariant.from_hf({key: value for key, value in said.items() if key != "rope_parameters"})
            if RopeVariant.from_hf(said) == read:
                continue
        except ConfigError:  # no variant of ours, and so none that both are
            pass
        mend = (
            f"its RoPE is said by rope_parameters, which transformers {__version__} passes over; write rope_theta and "
            f"rope_scaling into a copy of it as 4 reads them for {config.model_type}, or take a release that has them"
        )
        raise ConfigError("checkpoint", path, mend)
