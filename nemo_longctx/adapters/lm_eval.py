"""lm-eval's `LM` over any causal model: a live Megatron-Core one, a NeMo or a Hugging Face checkpoint.

Importing this module registers the model as `nemo_longctx`. lm-eval 0.4.13 loads no plugins, so its command line needs the
import: `python -m nemo_longctx.adapters.lm_eval run --model nemo_longctx ...` is stock `lm_eval` with it, and with our tasks
where no other `--include_path` is given. Later releases find the model through the entry-point group `lm_eval.models`.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_longctx.adapters.pretrained import hf_tokenizer, load_checkpoint, tokenizer_digest
from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.eval.generation import end_tokens
from nemo_longctx.eval.requests import Continuation, Generation, Request
from nemo_longctx.eval.results_cache import ResultsCache, key_of, packed, unpacked
from nemo_longctx.eval.scoring import CausalModel, Chunks, Scorer
from nemo_longctx.eval.sharing import from_first, run_shared
from nemo_longctx.eval.truncation import UNSCORED, Truncated, TruncationRecord, prompt_budget, token_span, truncate
from nemo_longctx.hf.chat import render

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks")


@register_model("nemo_longctx")
class LongContextLM(TemplateLM):
    """Scores lm-eval's requests with shared prefixes, chunked logits and a key-value cache.

    To lm-eval this is one process: every rank builds all requests, the work is divided here by cost, and every rank
    returns all results. So no rank can run out of documents, and the same samples are scored in any layout.

    Args:
        pretrained: a `CausalModel`, or the path or name of a checkpoint (NeMo 2 folder, or Hugging Face).
        tokenizer: Hugging Face tokenizer, its path or name, or NeMo's wrapper around one; default, that of `pretrained`.
        max_length: tokens the model may read; default, what it says.
        max_gen_toks: default length of generations.
        add_bos_token: add the tokenizer's special tokens; None leaves it to the tokenizer.
        device, dtype: for a checkpoint.
        tensor_parallel_size, pipeline_parallel_size: of a NeMo checkpoint under torchrun, however it was trained; the other
            processes hold copies and share the work.
        batch_size, max_batch_size: what lm-eval's command line passes. One document is read at a time, so only 1 or "auto".
        read_chunk: tokens of one forward pass.
        share_prefixes: False reads each request alone, to compare.
        results_cache: file of results to reuse; needs `identity` for a `CausalModel` (for a checkpoint it is computed).
        identity: what made the results beside requests and tokenizer: at least {"weights": digest of weights and settings},
            and say {"step": n}.
        data_group: `torch.distributed` group of ranks that hold the same part of the model.
        seed: of sampled generations.
        enable_thinking, think_end_token: as of lm-eval's own backend: whether a chat template lets the model think before it
            answers (None: as the template has it), and the text behind which its answer stands.
    """

    def __init__(
        self,
        pretrained: str | CausalModel,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        device: str | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        read_chunk: int = 1024,
        share_prefixes: bool = True,
        results_cache: str | None = None,
        identity: Mapping[str, Any] | None = None,
        data_group: torch.distributed.ProcessGroup | None = None,
        seed: int = 0,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
    ):
        super().__init__()
        if str(batch_size).split(":")[0] not in ("1", "auto") or max_batch_size not in (None, 1):
            raise ConfigError("batch_size", batch_size, "requests share prefixes instead of batches; leave it at 1 or auto")
        if isinstance(pretrained, str):
            path = pretrained
            sizes = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
            pretrained, weights, own, data_group = load_checkpoint(
                path, max_length=max_length, device=device, dtype=dtype, **sizes
            )
            tokenizer = tokenizer or own
            identity = {"weights": weights}
        self.causal = pretrained
        self.tokenizer = hf_tokenizer(tokenizer)
        self._max_length = max_length or pretrained.max_length
        self.max_gen_toks, self.add_bos_token, self.seed = max_gen_toks, add_bos_token, seed
        self.template_args = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.think_end_token = think_end_token
        self.ends = end_tokens(pretrained, self.tokenizer)
        self.scorer = Scorer(pretrained, chunks=Chunks(read=read_chunk), share=share_prefixes)
        self.data_group = data_group
        if results_cache and not (identity or {}).get("weights"):
            raise ConfigError("identity", identity, "a results cache needs {'weights': digest} so that it never mixes models")
        self.results_cache = results_cache
        self._opened: ResultsCache | None = None
        self._unreadable = False
        self.identity = {**(identity or {}), "tokenizer": tokenizer_digest(self.tokenizer)} if results_cache else {}
        self.truncations: list[TruncationRecord] = []
        self.truncation: Mapping[str, Any] = {}  # policy and max_prompt of samples that name none
        self._thinks = False  # told already
        self._headers: dict[str, int] = {}  # prompt in a chat template -> characters in front of what its first user says

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            mend = "names neither a beginning nor an end of a text, which lm-eval's tasks need; set eos_token in its"
            raise ConfigError("tokenizer", self.tokenizer.name_or_path, f"{mend} tokenizer_config.json")
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.encode(string, **self._special(string, add_special_tokens), **kwargs)

    def _special(self, string: str, add_special_tokens: bool | None) -> dict[str, bool]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
        return {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = render(
            self.tokenizer,
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.template_args,
        )
        if text.rstrip().endswith("<think>") and not self.think_end_token and not self._thinks:
            self._thinks = True
            mend = "replies of few tokens may end before their answer, and what is thought is scored with it"
            logger.warning("the chat template lets the model think before it answers: %s", mend)
        asked = next((turn["content"].strip() for turn in chat_history if turn["role"] == "user"), "")
        self._headers[text] = max(0, text.find(asked)) if asked else 0
        return text

    # Log-likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._instances = requests
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's, but a continuation whose letters the tokenizer puts into the context's last token is scored by that
        token: a token that spans both belongs to what is asked."""
        before, after = super()._encode_pair(context, continuation)
        if not after and continuation:
            whole = self.tok_encode(context + continuation)
            before, after = whole[:-1], whole[-1:]
        return before or [self.prefix_token_id], after

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        jobs, lost = [], []
        for instance, (_, context, continuation) in zip(self._instances, requests, strict=True):
            if len(continuation) > self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens does not fit the model's {self.max_length}")
            cut = self._fit(instance, context, self.max_length + 1 - len(continuation))
            jobs.append(Continuation(context=cut.tokens, continuation=continuation))
            lost.append(bool(cut.lost))
        scores = self._run(jobs, "log-likelihood", disable_tqdm)
        # An answer about text that was cut away is no answer: NaN, which our tasks count and leave out of the mean.
        return [(float("nan") if gone else s.log_likelihood, s.is_greedy) for s, gone in zip(scores, lost, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        jobs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                jobs.append(Continuation(context=context, continuation=continuation))
                owners.append(owner)
        totals = np.zeros(len(requests))
        for owner, score in zip(owners, self._run(jobs, "rolling log-likelihood", disable_tqdm), strict=True):
            totals[owner] += score.log_likelihood
        return totals.tolist()

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        jobs, untils, lost = [], [], []
        asked_before: Counter[int] = Counter()  # lm-eval asks one instance again for each repeat: another draw
        end: int | None = self.eot_token_id
        eos = None if end is None else self.tokenizer.decode(end, skip_special_tokens=False)
        for instance in requests:
            text, asked = instance.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            for name, value in options.items():
                if name not in SAMPLING:
                    raise ConfigError(f"generation_kwargs.{name}", value, f"not supported, {did_you_mean(name, SAMPLING)}")
            until = handle_stop_sequences(options["until"], eos=eos)
            new = options["max_gen_toks"]
            cut = self._fit(instance, self.tok_encode(text), prompt_budget(self.max_length, new))
            sampled = options["do_sample"]
            jobs.append(
                Generation(
                    context=cut.tokens,
                    max_new_tokens=new,
                    stop=self._stop(until),
                    temperature=options["temperature"] if sampled else 0.0,
                    top_p=options.get("top_p") or 1.0,
                    top_k=options.get("top_k") or 0,
                    seed=self.seed + asked_before[id(instance)] if sampled else self.seed,
                )
            )
            asked_before[id(instance)] += 1
            untils.append(until)
            lost.append(cut.lost)
        # Not in the key where it is the tokenizer's own end, which is there already.
        more: dict[str, Any] = {} if self.ends <= {self.eot_token_id} else {"ends": sorted(self.ends)}
        made = self._run(jobs, "generation", disable_tqdm, extra=[{"until": u, **more} for u in untils])
        made = [tokens[:-1] if tokens and tokens[-1] in self.ends else tokens for tokens in made]
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]
        thought = self.think_end_token
        texts = [postprocess_generated_text(t, until, thought) for t, until in zip(texts, untils, strict=True)]
        return [UNSCORED + " and ".join(gone) if gone else text for text, gone in zip(texts, lost, strict=True)]

    def _stop(self, until: Sequence[str]) -> Callable[[list[int]], bool]:
        """True once the tail of the generation holds a stop string, looked for as lm-eval's HF backend does: over the
        tokens of the stop string and two more, since it may have been made in another tokenization."""
        tails = [(text, len(self.tokenizer.encode(text, add_special_tokens=False)) + 2) for text in until if text]

        def stop(made: list[int]) -> bool:
            return made[-1] in self.ends or any(text in self.tokenizer.decode(made[-n:]) for text, n in tails)

        return stop

    # Truncation

    def _fit(self, instance: Instance, tokens: list[int], room: int) -> Truncated:
        """Cut a prompt by its task's policy (the doc's `longctx` entry; lm-eval's own tasks: `self.truncation`). BOS, system
        prompt and chat header stay."""
        policy = {
            "policy": "left",
            "max_prompt": None,
            "protect": {},
            **self.truncation,
            **((instance.doc or {}).get("longctx") or {}),
        }
        budget = room if policy["max_prompt"] is None else min(room, policy["max_prompt"])
        if len(tokens) <= budget:
            return Truncated(tokens=tokens, removed=0, lost=())
        text, protect = instance.args[0], {name: part for name, part in (policy["protect"] or {}).items() if part}
        spans = self._spans(text, protect, tokens) if protect else {}
        whole = tokens
        if policy["policy"] == "keep_start":
            whole, spans["question"] = self._parted(text, policy.get("tail") or protect.get("question") or "", policy)
        cut = truncate(whole, budget, policy["policy"], spans, frame=self._frame(text, whole))
        self.truncations.append(
            TruncationRecord(
                task=instance.task_name or "",
                doc_id=instance.doc_id,
                policy=policy["policy"],
                tokens=len(tokens),
                removed=len(tokens) - len(cut.tokens),
                lost=cut.lost,
            )
        )
        return cut

    def _parted(self, text: str, tail: str, policy: Mapping[str, Any]) -> tuple[list[int], tuple[int, int]]:
        """Tokens of a prompt whose document is to lose its end, with what says so in front of the question (as ZeroSCROLLS does
        in its experiments/hf/run_hf_model.py at c994676), and the span of that and the question."""
        place = text.rfind(tail.strip()) if tail.strip() else len(text)
        head = self.tok_encode(text[:place])
        rest = (policy.get("separator") or "") + text[place:]
        end = self.tokenizer.encode(rest, add_special_tokens=False)
        return [*head, *end], (len(head), len(head) + len(end))

    def _frame(self, text: str, tokens: Sequence[int]) -> int:
        """Tokens in front of a prompt that are no part of what is asked: BOS, and a chat template's header."""
        special = set(self.tokenizer.all_special_ids)
        first = next((place for place, token in enumerate(tokens) if token not in special), len(tokens))
        header = text[: self._headers.get(text, 0)]
        return max(first, len(self.tok_encode(header)) if header else 0)

    def _spans(self, text: str, protect: Mapping[str, str], tokens: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Where protected texts lie in the prompt, in tokens. The last occurrence counts: shots come before the sample."""
        offsets = self._offsets(text, tokens)
        spans = {}
        for name, wanted in protect.items():
            start = text.rfind(wanted.strip())
            if start < 0:
                raise ValueError(f"the protected {name} {wanted[:60]!r} does not occur in its prompt")
            spans[name] = token_span(offsets, start, start + len(wanted.strip()))
        return spans

    def _offsets(self, text: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """First and last character of each token.

        Raises:
            ConfigError: a slow tokenizer, which tells none.
        """
        if not self.tokenizer.is_fast:
            mend = "tells no offsets, by which a prompt is cut; give a fast tokenizer (tokenizer.json)"
            raise ConfigError("tokenizer", type(self.tokenizer).__name__, mend)
        offsets = self.tokenizer(text, return_offsets_mapping=True, **self._special(text, None))["offset_mapping"]
        if len(offsets) != len(tokens):
            raise ValueError(
                f"the prompt has {len(tokens)} tokens but {len(offsets)} offsets: the tokenizer is not deterministic"
            )
        return offsets

    # Work

    def _run(
        self, jobs: Sequence[Request], what: str, quiet: bool, extra: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Any]:
        """Results of all jobs on every rank, from the cache where it has them.

        Only the first rank opens the cache: ranks that hold parts of one model have to read the same requests.
        """
        keys = [key_of(self.identity, job, more) for job, more in zip(jobs, extra or [{}] * len(jobs), strict=True)]
        known: dict[str, Any] = from_first(lambda: self._known(keys)) if self.results_cache else {}
        todo = [i for i, key in enumerate(keys) if key not in known]
        results = run_shared(self.scorer, [jobs[i] for i in todo], group=self.data_group, what=what, quiet=quiet)
        fresh = {keys[i]: packed(result) for i, result in zip(todo, results, strict=True)}
        if self._opened is not None:
            try:
                self._opened.put(fresh)
            except sqlite3.Error as error:  # a full disk must not cost the results themselves
                logger.warning("results could not be kept in %s: %s", self.results_cache, error)
        return [unpacked((known | fresh)[key]) for key in keys]

    def _known(self, keys: Sequence[str]) -> dict[str, Any]:
        """What the cache knows of `keys`; nothing where its file cannot be read, which must not cost the results."""
        if self._unreadable:
            return {}
        try:
            self._opened = self._opened or ResultsCache(str(self.results_cache))
            return self._opened.get(keys)
        except (sqlite3.Error, OSError, ValueError) as error:
            mend = "every request is run; delete the file so that results are kept again"
            logger.warning("the results cache %s cannot be read (%s): %s", self.results_cache, error, mend)
            self._opened, self._unreadable = None, True
            return {}


def command_line() -> None:
    """lm-eval's own command line, which finds our tasks where no other `--include_path` is given."""
    import sys
    from importlib.util import find_spec

    from lm_eval.__main__ import cli_evaluate

    given = any(word.split("=")[0] == "--include_path" for word in sys.argv)
    if not given and sys.argv[1:2] != ["--help"]:
        ours = find_spec("nemo_longctx.eval.tasks")
        sys.argv += ["--include_path", *(ours.submodule_search_locations or [] if ours else [])]
    cli_evaluate()


if __name__ == "__main__":
    command_line()
