"""Ask many calls at once, each through its attempts, with the journal before the server and the purse in view."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from nemo_longctx.bars import ProgressBar
from nemo_longctx.config import ConfigError
from nemo_longctx.instruct.client import FILTERED, LENGTH, REFUSAL, Call, CallError, Completer
from nemo_longctx.instruct.journal import Journal, Reply
from nemo_longctx.instruct.prompts import FormError


class NeverInFormError(ValueError):
    """The model's replies do not hold what the prompts ask for; going on would burn money."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Money for a million tokens, in any currency; 0 where the model is your own."""

    input: float = 0.0
    output: float = 0.0

    def __post_init__(self):
        for name in ("input", "output"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"price_{name}", getattr(self, name), "must be a number that is not negative")

    def of(self, reply: Reply) -> float:
        """What `reply` cost."""
        return (self.input * reply.prompt_tokens + self.output * reply.completion_tokens) / 1e6


class HasId(Protocol):
    """Anything with a unique name."""

    @property
    def id(self) -> str: ...


ItemT = TypeVar("ItemT", bound=HasId)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one item: the parsed value, or why there is none (`malformed`, `refused`, `unanswered`), in what words."""

    value: Any = None
    reason: str | None = None
    said: str | None = None


class Asker:
    """Asks, journals and counts.

    Args:
        completer: who answers.
        journal: where replies are kept; a call that it knows is not made.
        form_attempts, stop_after_malformed: as in GenerateConfig.
        prices: what tokens cost.
        show_progress: a bar on stderr.
    """

    def __init__(
        self,
        completer: Completer,
        journal: Journal,
        *,
        form_attempts: int,
        stop_after_malformed: int,
        prices: Prices,
        show_progress: bool,
    ):
        self.completer, self.journal, self.prices = completer, journal, prices
        self.form_attempts, self.stop_after_malformed = form_attempts, stop_after_malformed
        self.show_progress = show_progress
        self.cost = 0.0
        self.tokens = Counter({"prompt": 0, "completion": 0})
        self.made = 0
        self.replayed = 0
        self.out_of_form: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._malformed_in_a_row = 0
        self._useless: NeverInFormError | None = None
        self._stopping = False

    def stop(self) -> None:
        """Begin no call any more; `ask_all` ends in KeyboardInterrupt once those under way are journaled."""
        self._stopping = True

    async def ask_all(
        self,
        stage: str,
        items: Sequence[ItemT],
        make_call: Callable[[ItemT, int], Call],
        parse: Callable[[str], Any],
    ) -> dict[str, Outcome]:
        """The outcome of every item, by id.

        Raises:
            NeverInFormError: `stop_after_malformed` replies on end were out of form.
            EndpointError: from the completer.
            KeyboardInterrupt: after `stop`.
        """
        self._malformed_in_a_row = 0
        outcomes: dict[str, Outcome] = {}
        with ProgressBar(total=len(items), desc=stage, unit="item", show=self.show_progress) as bar:
            queue = iter(items)

            async def work() -> None:
                for item in queue:  # shared: each worker takes the next item that nobody has taken
                    if self._stopping or self._useless is not None:
                        return
                    try:
                        outcomes[item.id] = await self._ask(item, make_call, parse)
                    except NeverInFormError as error:  # calls under way are paid for: the others bring theirs home
                        self._useless = self._useless or error
                        return
                    bar.note(self._purse())
                    bar.update()

            await _run_all(work() for _ in range(self.completer.concurrency))
        if self._useless is not None:
            raise self._useless
        if self._stopping:
            raise KeyboardInterrupt
        return outcomes

    async def _ask(self, item: ItemT, make_call: Callable[[ItemT, int], Call], parse: Callable[[str], Any]) -> Outcome:
        said = None
        for attempt in range(self.form_attempts):
            if self._stopping or self._useless is not None:
                break
            try:
                reply = await self._reply(make_call(item, attempt))
            except CallError as failure:
                self.failures[str(failure)] += 1
                if failure.refused:
                    self._count_useless("refused")
                return Outcome(reason="refused" if failure.refused else "unanswered", said=str(failure))
            if reply.finish_reason in (FILTERED, REFUSAL):
                self._count_useless(reply.finish_reason)
                return Outcome(reason="refused", said=f"{reply.finish_reason}: {reply.text}"[:300])
            try:
                if reply.finish_reason == LENGTH:
                    raise FormError("cut_off")
                value = parse(reply.text)
            except FormError as error:
                self._count_useless(error.reason)
                said = error.reason
                continue
            self._malformed_in_a_row = 0
            return Outcome(value=value)
        return Outcome(reason="malformed", said=said)

    async def _reply(self, call: Call) -> Reply:
        reply = self.journal.get(call.key)
        if reply is None:
            reply = await self.completer.complete(call)
            self.journal.append(call.key, reply)
            self.made += 1
        else:
            self.replayed += 1
        self.cost += self.prices.of(reply)
        self.tokens.update(prompt=reply.prompt_tokens, completion=reply.completion_tokens)
        return reply

    def _count_useless(self, reason: str) -> None:
        self.out_of_form[reason] += 1
        self._malformed_in_a_row += 1
        if self._malformed_in_a_row >= self.stop_after_malformed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.out_of_form.most_common(3))
            said = f"; the server said: {next(iter(self.failures))}" if self.failures else ""
            raise NeverInFormError(
                f"the last {self._malformed_in_a_row} calls gave nothing in form ({reasons}){said}; stopped after {self.made} "
                f"new replies ({self._purse()}). Try other prompts or another model, or raise stop_after_malformed"
            )

    def _purse(self) -> str:
        tokens = f"{self.tokens['prompt']:,} + {self.tokens['completion']:,} tokens"
        cost = f"cost {self.cost:.4f}, " if self.prices.input or self.prices.output else ""
        trouble = sum(self.completer.faults.values())
        return f"{cost}{tokens}" + (f", {trouble} retries" if trouble else "")

    def summary(self) -> dict[str, object]:
        """What this run did and what all runs of this journal paid."""
        return {
            "made": self.made,
            "replayed": self.replayed,
            "prompt_tokens": self.tokens["prompt"],
            "completion_tokens": self.tokens["completion"],
            "cost": round(self.cost, 6),
            "faults_retried": dict(sorted(self.completer.faults.items())),
            "out_of_form": dict(sorted(self.out_of_form.items())),
            "failures": dict(self.failures.most_common(10)),
        }


async def _run_all(jobs: Iterable[Any]) -> None:
    """Run coroutines together; the first that fails cancels the others, and its own exception comes out."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
