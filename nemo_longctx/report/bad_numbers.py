"""Losses and gradients that are no numbers, or that jump: told from the run's own past, the same after a resume."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass
class NumbersWatch:
    """Judges a step's loss and gradient norm by those of the steps before.

    Attributes:
        factor: a spike is over this many times the median of the window.
        window: steps whose numbers are kept.
        past: (loss, gradient norm) of good steps, oldest first: what a checkpoint keeps.
    """

    factor: float
    window: int
    past: deque[tuple[float, float]] = dataclasses.field(default_factory=deque)

    def judge(self, loss: float, grad_norm: float) -> tuple[str, str] | None:
        """(kind, sentence) where a step's numbers are bad, kind being "not_finite" or "spike"; else None, and they are kept.

        Args:
            loss: mean over the step's tokens.
            grad_norm: norm of the whole gradient, before clipping.
        """
        bad = [name for name, value in (("loss", loss), ("gradient", grad_norm)) if not math.isfinite(value)]
        if bad:
            return "not_finite", f"{' and '.join(bad)} not finite (loss {loss:g}, gradient norm {grad_norm:g})"
        if len(self.past) >= max(1, self.window // 2):
            for name, value, place in (("loss", loss, 0), ("gradient norm", grad_norm, 1)):
                usual = statistics.median(each[place] for each in self.past)
                if value > self.factor * usual > 0:  # of nothing nothing is a multiple: a gradient that begins is no jump
                    return "spike", f"the {name} jumps to {value:g}, {value / usual:.1f} times its median of {usual:g}"
        self.past.append((loss, grad_norm))
        while len(self.past) > self.window:
            self.past.popleft()
        return None

    def state(self) -> list[list[float]]:
        """What a resumed run needs to judge as this one."""
        return [list(each) for each in self.past]

    def load(self, state: Iterable[Iterable[float]]) -> None:
        """Take over what `state` gave."""
        self.past = deque((loss, norm) for loss, norm in state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step with bad numbers, named so that its data can be looked at.

    Attributes:
        step: number of the step, the first being 1.
        stage, seq_length: of the curriculum.
        first_token, last_token: the run's tokens [first, last) that it read.
        documents: `SOURCE:NUMBER` of its documents, or of those whose loss is no number.
        what: the sentence of `NumbersWatch.judge`.
        policy: what was done.
    """

    step: int
    stage: int
    seq_length: int
    first_token: int
    last_token: int
    documents: tuple[str, ...]
    what: str
    policy: str

    def sentence(self, most: int = 12) -> str:
        """Step, stage, tokens and the first `most` documents."""
        named = ", ".join(self.documents[:most]) or "unknown"
        more = f" and {len(self.documents) - most} more" if len(self.documents) > most else ""
        stage = f"stage {self.stage} (sequences of {self.seq_length})"
        tokens = f"tokens {self.first_token:,} to {self.last_token:,}"
        return f"{self.what} at step {self.step}, {stage}, {tokens}; documents {named}{more}"

    def record(self) -> dict[str, Any]:
        """For a line of JSON."""
        return dataclasses.asdict(self)
