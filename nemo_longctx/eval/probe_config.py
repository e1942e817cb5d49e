"""Which probes there are, and which are made."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.eval import helmet, mrcr, nolima, ruler

# Xiong et al. 2023, Figure 5: the lengths of first-sentence retrieval.
PAPER_LENGTHS = (256, 1024, 2048, 4096, 8192, 10240, 12288, 14336, 16384, 20480, 24576, 28672, 30720)
KINDS = (
    "first_sentence",
    "passkey",
    "record",
    "code",
    "needle",
    "needle_multi_key",
    "needle_multi_value",
    "variable_tracking",
    nolima.KIND,
    *ruler.KINDS,
    *helmet.KINDS,
    *mrcr.KINDS,
)
WITHOUT_DEPTH = ("first_sentence", "variable_tracking", *ruler.KINDS, *helmet.KINDS, *mrcr.KINDS)
SUITES = {"ruler": ruler.KINDS, "helmet": helmet.KINDS, "nolima": (nolima.KIND,), "mrcr": mrcr.KINDS}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Which probes to make.

    Attributes:
        kinds: any of `first_sentence`, `passkey`, `record`, `code`, `needle` and the tasks of the suites.
        lengths: tokens of the whole prompt.
        depths: where the needle is, 0 (start) to 1 (end).
        samples: probes of each kind, length and depth.
        seed: of their texts, names and numbers.
        max_new_tokens: longest answer of passkeys and needles; a first sentence gets its own length and 16 more.
        suite: `ruler`, `helmet`, `nolima` or `mrcr` in place of kinds: all of its tasks.
        data: folder of question answering data for RULER's qa_1 (`squad.json`) and qa_2 (`hotpotqa.json`), without which its
            other eleven tasks are measured, and of labelled texts for HELMET's learning in context (`icl.jsonl`).
        chat: ask as a user in the tokenizer's chat template, without thought before the answer, as a tuned model is asked; the
            template is part of a length. False asks as a base model is asked, in plain text that the answer goes on with.
    """

    kinds: tuple[str, ...] = ("first_sentence", "passkey")
    lengths: tuple[int, ...] = PAPER_LENGTHS
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    seed: int = 0
    max_new_tokens: int = 32
    suite: str = ""
    data: str = ""
    chat: bool = False

    def __post_init__(self) -> None:
        if self.suite:
            if self.suite not in SUITES:
                raise ConfigError("probes.suite", self.suite, f"unknown suite, {did_you_mean(str(self.suite), SUITES)}")
            default = next(each.default for each in fields(self) if each.name == "kinds")
            if tuple(self.kinds) not in (default, SUITES[self.suite]):
                mend = f"has no effect beside suite={self.suite}, which names its own; leave one out"
                raise ConfigError("probes.kinds", list(self.kinds), mend)
            object.__setattr__(self, "kinds", SUITES[self.suite])
        if not self.kinds:
            raise ConfigError("probes.kinds", [], f"name at least one of {', '.join(KINDS)}, or leave the task out")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError("probes.kinds", kind, f"unknown probe, {did_you_mean(kind, KINDS)}")
        if self.chat and "code" in self.kinds:
            mend = "begins the answer's word itself, which no chat template lets it; leave this kind out, or chat: false"
            raise ConfigError("probes.kinds", "code", mend)
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("probes.lengths", self.lengths, "give at least one positive length in tokens")
        if not all(0 <= depth <= 1 for depth in self.depths) or not self.depths:
            raise ConfigError("probes.depths", self.depths, "give shares between 0 (start) and 1 (end)")
        if self.samples < 1:
            raise ConfigError("probes.samples", self.samples, "give at least 1 sample a cell")
        if self.max_new_tokens < 1:
            raise ConfigError("probes.max_new_tokens", self.max_new_tokens, "give at least 1 token for the answer")
