"""The host's own `llm.export_ckpt(CKPT, "hf")`, for checkpoints whose RoPE its exporters would lose.

They write `rope_theta` and Llama 3.1's scaling, some not even that: position interpolation is dropped without a word, and a
checkpoint with a model transform is taken for LoRA's, of which only the adapters are loaded. Without Transformer Engine they
find none of its names and end in an IndexError. `register` puts a connector in front of each that sends such a checkpoint to
`export_hf`, which writes its variant and verifies it, or refuses with the reason.

It is called when anything of `nemo_longctx.adapters.nemo` is imported: by a checkpoint with our transform, by nemo_run.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTModel

from nemo_longctx.adapters.megatron.rope_module import check_supported, rotary_dim_of
from nemo_longctx.adapters.nemo.checkpoint.convert import export_hf
from nemo_longctx.adapters.nemo.model.config import checkpoint_model
from nemo_longctx.adapters.nemo.model.rope import variant_of
from nemo_longctx.capability import has_module
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant


class _KeepsRope:
    """In front of an exporter of the host's (`nemo.lightning.io.ModelConnector`): takes the checkpoints that it cannot say."""

    def nemo_load(self, path: Path, *args: Any, **kwargs: Any) -> Any:
        """As the host's. With an empty model a checkpoint declines the route of quantised ones, which is tried first."""
        if not self._says_all():
            return torch.nn.Module(), None
        return super().nemo_load(path, *args, **kwargs)  # type: ignore[misc]

    def apply(self, output_path: Path, **kwargs: Any) -> Path:
        """As the host's: write the Hugging Face directory."""
        if self._says_all():
            return super().apply(output_path, **kwargs)  # type: ignore[misc]
        export_hf(str(self), output_path)
        return output_path

    def _says_all(self) -> bool:
        """Whether the host can export here, and the config that it would write gives the checkpoint's frequencies."""
        if not has_module("transformer_engine"):
            return False
        model = checkpoint_model(str(self), {})
        if isinstance(getattr(model.model_transform, "variant", None), RopeVariant):  # placed by a transform of ours
            return False
        try:
            check_supported(model.config)
            said = RopeVariant.from_hf(self.config.to_dict())  # type: ignore[attr-defined]
        except ConfigError:  # not one RoPE for all layers: none of ours
            return True
        rotary_dim, length = rotary_dim_of(model.config), model.config.seq_length
        return np.array_equal(said.inv_freq(rotary_dim, length), variant_of(model).inv_freq(rotary_dim, length))


def register() -> None:
    """Put `_KeepsRope` before the "hf" exporter of every GPT model of `nemo.collections.llm`; a second call does nothing."""
    found = [value for value in vars(llm).values() if inspect.isclass(value) and issubclass(value, GPTModel)]
    for model_class in cast("list[Any]", found):
        try:
            exporter = type(model_class.exporter("hf", "unused"))
        except ValueError:  # the host has none for this class
            continue
        if not issubclass(exporter, _KeepsRope):
            model_class.register_exporter("hf")(type(exporter.__name__, (_KeepsRope, exporter), {}))
