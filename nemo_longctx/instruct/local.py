"""A checkpoint in this process as the one who answers: the short model itself, where there is no server."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.sft_instances import chat_template
from nemo_longctx.hf.chat import render
from nemo_longctx.instruct.client import Call, CallError
from nemo_longctx.instruct.journal import Reply

_SAMPLE_BYTES = 1 << 20


class LocalCheckpoint:
    """`Completer` over a model in Hugging Face form; one call at a time, with a KV cache.

    Args:
        folder: the checkpoint, with its tokenizer.
        template: how a prompt is put to the model: `tokenizer`, `llama2`, or the path of a Jinja file.

    Raises:
        ConfigError: no checkpoint or no tokenizer there.
    """

    concurrency = 1

    def __init__(self, folder: Path, *, template: str):
        import torch

        from nemo_longctx.eval.hf import HFCausalModel
        from nemo_longctx.eval.scoring import Scorer
        from nemo_longctx.hf.model import load_hf_model
        from nemo_longctx.hf.tokenizer import open_tokenizer

        try:
            self.tokenizer: Any = open_tokenizer(folder)
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError("checkpoint", str(folder), f"no Hugging Face model can be loaded from there ({why})") from error
        model = load_hf_model(folder)
        self.template = chat_template(template, self.tokenizer)
        self.scorer = Scorer(HFCausalModel(model.to("cuda" if torch.cuda.is_available() else "cpu")))
        self.faults: Counter[str] = Counter()

    async def close(self) -> None:
        """Nothing is held beyond this object."""

    async def complete(self, call: Call) -> Reply:
        """Answer one call.

        Raises:
            CallError: prompt and answer do not fit the model's window.
        """
        return await asyncio.to_thread(self._answer, call)

    def _answer(self, call: Call) -> Reply:
        from nemo_longctx.eval.generation import end_tokens
        from nemo_longctx.eval.scoring import Generation

        tokenizer, ends = self.tokenizer, end_tokens(self.scorer.model, self.tokenizer)
        turns = [{"role": "user", "content": call.prompt}]
        asked = render(tokenizer, turns, chat_template=self.template, add_generation_prompt=True)
        window = self.scorer.model.max_length
        if len(asked) + call.max_tokens > window:
            said = f"{len(asked)} tokens and an answer of {call.max_tokens} do not fit a window of {window}; lower chunk_tokens"
            raise CallError(said, refused=True)
        request = Generation(
            context=asked,
            max_new_tokens=call.max_tokens,
            stop=lambda made: made[-1] in ends,
            temperature=call.temperature,
            seed=call.seed,
        )
        (made,) = self.scorer.generate([request])
        return Reply(
            text=tokenizer.decode(made[:-1] if made[-1] in ends else made, skip_special_tokens=True),
            finish_reason="stop" if made[-1] in ends else "length",
            prompt_tokens=len(asked),
            completion_tokens=len(made),
        )


def fingerprint(folder: Path) -> str:
    """A name for a checkpoint's content: its folder's, and a hash of its files' sizes, heads and tails.

    Raises:
        ConfigError: no folder, or one without weights.
    """
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in (".json", ".safetensors", ".bin", ".jinja"))
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise ConfigError("checkpoint", str(folder), "holds no weights in Hugging Face form (*.safetensors, *.bin)")
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
    return f"{Path(folder).resolve().name}@{digest.hexdigest()[:12]}"
