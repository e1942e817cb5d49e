"""Whether a Hugging Face model and a NeMo one are the same: what makes an import or export safe to report as done."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_longctx.adapters.megatron.rope_guard import verify_live_rope
from nemo_longctx.config import ConfigError
from nemo_longctx.hf.dtypes import in_dtype
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import Rope

VERIFY_TOKENS = 512  # length of the random input whose logits are compared
TOLERANCE = 1e-4  # of logits, both models in fp32, as a share of the largest where that is above 1
FREQUENCY_ROUNDING = 4e-6  # transformers computes frequencies in float32: share of the unscaled one


def source_model(source: Path, config: Any, *, dtype: Any, named: Path | None = None) -> Any:
    """The transformers model of a directory: every weight of it is read, and every weight that it needs is there.

    Args:
        source: directory with weights.
        config: its transformers config.
        dtype: of the weights, or "auto".
        named: the directory as the user knows it, for messages; None is `source`.

    Raises:
        ConfigError: weights that cannot be read, are missing, left over or of another shape than the config says.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    named = source if named is None else named
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **in_dtype(dtype)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        mend = f"transformers cannot load its weights ({line}); if they are damaged, copy or download them again"
        raise ConfigError("HF_DIR", str(named), mend) from error
    mend = "config.json and weights disagree; take both from the same model"
    wrong = {
        "mismatched": "have another shape",
        "missing": "are missing from the files",
        "unexpected": "have no place in the model",
    }
    for kind, told in wrong.items():
        # Of another shape, some releases give the shapes too.
        names = sorted(each if isinstance(each, str) else each[0] for each in info[f"{kind}_keys"])
        if names:
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ConfigError("HF_DIR", str(named), f"{len(names)} weights {told} ({shown}): {mend}")
    return model.eval()


def verify_export(
    module: torch.nn.Module, directory: Path, variant: RopeVariant, *, rotary_dim: int, tokens: int, longest: int
) -> float:
    """Load `directory` with transformers and compare it with the Megatron-Core model it came from: see `verify_same`."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(directory, **in_dtype(torch.float32)).eval()
    return verify_same(module, exported, variant, rotary_dim=rotary_dim, tokens=tokens, longest=longest)


@torch.no_grad()
def verify_same(
    module: torch.nn.Module, theirs: Any, variant: RopeVariant, *, rotary_dim: int, tokens: int, longest: int
) -> float:
    """Compare a Megatron-Core model with a transformers one, both in fp32.

    Far positions need no far input: the frequencies of both are compared with those of `variant` at every length that matters.

    Args:
        module: `megatron.core.models.gpt.GPTModel`; it becomes fp32.
        theirs: the transformers model, fp32, in evaluation mode.
        variant: the RoPE that both must have.
        tokens: length of the random input whose logits are compared.
        longest: frequencies are compared at lengths up to this one.

    Returns:
        the largest difference between two logits.

    Raises:
        ConfigError: a logit, frequency or attention factor differs, with both values.
    """
    verify_live_rope(module, variant)
    lengths = {2, tokens, longest}
    if variant.depends_on_length:
        trained = variant.original_max_position_embeddings  # type: ignore[attr-defined]
        lengths |= {trained, trained + 1, 4 * trained}
    _verify_frequencies(theirs, variant, rotary_dim, lengths)
    device = next(module.parameters()).device
    ids = torch.randint(0, theirs.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens)[None]
    ours = module.float()(ids.to(device), positions.to(device), None).float().cpu()[..., : theirs.config.vocab_size]
    expected = theirs(input_ids=ids, position_ids=positions).logits
    worst = float((ours - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not worst <= allowed:
        at = int((ours - expected).abs().amax(dim=-1).argmax())
        mend = f"differ by {worst:.3g} from the NeMo model's at position {at} of {tokens}, more than {allowed:.3g}; not written"
        raise ConfigError("logits", float(expected[0, at].flatten()[0]), mend)
    return worst


def _verify_frequencies(theirs: Any, variant: RopeVariant, rotary_dim: int, lengths: set[int]) -> None:
    rotary = theirs.model.rotary_emb
    plain = Rope(base=variant.base).theta(rotary_dim)
    for length in sorted(lengths):
        rotary(torch.zeros(1), torch.tensor([[length - 1]]))  # transformers picks the frequencies of this length
        found, ours = rotary.inv_freq.numpy(), variant.inv_freq(rotary_dim, length)
        if found.shape != ours.shape or (np.abs(found - ours.astype(np.float64)) > FREQUENCY_ROUNDING * plain).any():
            mend = f"transformers has it at {length} tokens, the NeMo model {ours.tolist()}; not written"
            raise ConfigError("inv_freq", found.tolist(), mend)
        if abs(rotary.attention_scaling - variant.attention_scaling) > 1e-9:
            mend = f"transformers has it, the NeMo model {variant.attention_scaling}; not written"
            raise ConfigError("attention_factor", rotary.attention_scaling, mend)
    rotary(torch.zeros(1), torch.tensor([[0]]))  # under dynamic NTK transformers keeps a long input's until a short one comes
