"""A Hugging Face causal language model behind the scorer's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.generation import ends_of
from nemo_longctx.eval.scoring import logits_to_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rope types whose frequencies transformers recomputes from the length of the sequence being read.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class HFCausalModel:
    """`nemo_longctx.eval.scoring.CausalModel` over a transformers model.

    The body and the head are called apart, so that logits exist only where they are scored. A head that does more than a
    matrix product (soft caps, scales) is found out by comparing both ways on two tokens.

    Args:
        model: any `AutoModelForCausalLM`, on its device.
        max_length: default, the `max_position_embeddings` of the model, or of the language model in a multimodal one.

    Raises:
        ConfigError: neither says a longest input.
        ValueError: the model's logits are not its head applied to its body's states.
    """

    def __init__(self, model: PreTrainedModel, *, max_length: int | None = None):
        self.model = model.eval()
        # A multimodal model may be its own base, of other outputs; text is read by the language model in it alone.
        self.body = model.base_model if model.base_model is not model else model.get_decoder()
        text = model.config.get_text_config()
        longest = max_length or getattr(text, "max_position_embeddings", None)
        if longest is None:
            mend = f"{type(model).__name__} says no longest input; say how many tokens it may read"
            raise ConfigError("--max-length", None, mend)
        self.max_length: int = longest
        self.ends = ends_of(model.generation_config)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        scaling = getattr(text, "rope_scaling", None) or {}
        self.reads_whole = scaling.get("rope_type", scaling.get("type")) in LENGTH_DEPENDENT_ROPE
        self.stretched = [part for part in model.modules() if "dynamic" in str(getattr(part, "rope_type", ""))]
        self.truncate(0)
        self._check_head()

    @torch.inference_mode()
    def _check_head(self) -> None:
        tokens_S = torch.tensor([0, 1])
        ours_SV = self._logits(self.extend(tokens_S))
        theirs_SV = self.model(tokens_S[None].to(self.model.device)).logits[0].float()
        self.truncate(0)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if not torch.allclose(ours_SV, theirs_SV, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(self.model).__name__} does more to its logits than its head"
                f"{f' (final_logit_softcapping={cap})' if cap else ''}: score it with lm_eval --model hf"
            )

    @torch.inference_mode()
    def truncate(self, length: int) -> None:
        from transformers import DynamicCache

        if length == 0:
            # Without the config every layer keeps all keys, so that a sliding-window layer can be cut back too.
            self._cache = DynamicCache()
            # Under dynamic NTK transformers keeps a long input's frequencies until one within the trained length comes.
            place = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            for rotary in self.stretched:
                rotary(place.float(), place)
        else:
            self._cache.crop(length)

    @torch.inference_mode()
    def extend(self, tokens_S: Tensor) -> Tensor:
        start = self._cache.get_seq_length()
        place_S = torch.arange(start, start + len(tokens_S), device=self.model.device)
        out = self.body(
            input_ids=tokens_S[None].to(self.model.device),
            past_key_values=self._cache,
            cache_position=place_S,
            position_ids=place_S[None],
            use_cache=True,
        )
        return out.last_hidden_state[0]

    def _logits(self, states_KH: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(states_KH).float()

    @torch.inference_mode()
    def log_probs(self, states_KH: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
        return logits_to_log_probs(self._logits(states_KH), targets_K)

    @torch.inference_mode()
    def next_logits(self, state_H: Tensor) -> Tensor:
        return self._logits(state_H[None])[0]
