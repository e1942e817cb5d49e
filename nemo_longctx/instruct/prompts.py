"""Prompts as files: five texts with named holes, which a user can replace by a folder of their own.

The shipped words follow the specification of Xiong et al. 2023 (section 4.3, appendix D): two question prompts of equal
probability, a self-critique, and two training templates. They are this project's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_longctx.config import ConfigError, did_you_mean

KINDS = ("normal", "short")
# file name -> the holes that it must have, each at least once. No other hole is allowed.
HOLES: Mapping[str, frozenset[str]] = {
    "question_normal": frozenset({"chunk"}),
    "question_short": frozenset({"chunk"}),
    "critique": frozenset({"chunk", "question", "answer"}),
    "train_normal": frozenset({"document", "question"}),
    "train_short": frozenset({"document", "question"}),
}
_HOLE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The five prompt texts, by name (`HOLES` lists them)."""

    texts: Mapping[str, str]

    def __post_init__(self):
        for name, text in self.texts.items():
            if name not in HOLES:
                raise ConfigError("prompts", name, f"no such prompt, {did_you_mean(name, HOLES)}")
            found = set(_HOLE.findall(text))
            for hole in sorted(HOLES[name] - found):
                raise ConfigError(f"prompts.{name}", _head(text), f"has no {{{hole}}}; say where it goes")
            for hole in sorted(found - HOLES[name]):
                raise ConfigError(f"prompts.{name}", f"{{{hole}}}", f"unknown hole, {did_you_mean(hole, HOLES[name])}")
        for name in sorted(set(HOLES) - set(self.texts)):
            raise ConfigError("prompts", name, f"missing; write it to {name}.txt")

    @classmethod
    def load(cls, folder: Path | None = None) -> PromptSet:
        """The shipped prompts, each replaced by `folder`/NAME.txt where that file exists.

        Raises:
            ConfigError: a .txt file of `folder` whose name is no prompt's, or a text with missing or unknown holes.
        """
        shipped = Path(__file__).parent / "prompts"
        texts = {name: (shipped / f"{name}.txt").read_text(encoding="utf-8").strip() for name in HOLES}
        if folder is not None:
            own = sorted(Path(folder).glob("*.txt"))
            if not own:
                raise ConfigError("prompts", str(folder), f"holds no .txt file; write any of {', '.join(sorted(HOLES))}")
            texts |= {path.stem: path.read_text(encoding="utf-8").strip() for path in own}
        return cls(texts=texts)

    @property
    def version(self) -> str:
        """Twelve hex digits of the SHA-256 of all five texts: rows of different versions came from different words."""
        joined = "\0".join(f"{name}\0{self.texts[name]}" for name in sorted(self.texts))
        return hashlib.sha256(joined.encode()).hexdigest()[:12]

    def fill(self, name: str, **values: str) -> str:
        """Text `name` with its holes filled in one pass, so that braces inside a document stay as they are."""
        return _HOLE.sub(lambda match: values[match[1]], self.texts[name])


class FormError(ValueError):
    """A reply that does not hold exactly the fields asked for; `reason` is one of a few fixed words, for counting."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def without_thoughts(text: str) -> str:
    """What a reasoning model says after its thoughts: `<think>...</think>`, whose opening tag some servers keep back."""
    return re.sub(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*\Z", "", text, flags=re.DOTALL | re.IGNORECASE)


def parse_fields(text: str, names: tuple[str, ...]) -> dict[str, str]:
    """The content of each `<name>...</name>`: each tag exactly once in any case, none nested, none empty.

    Thoughts in front are left out, and the last tag may stay open: a model that ends its turn has ended it.

    Raises:
        FormError: `no_tags`, `missing_NAME`, `repeated_NAME`, `nested_tags` or `empty_NAME`.
    """
    text = re.sub(
        rf"<(/?)\s*({'|'.join(names)})\s*>", lambda tag: f"<{tag[1]}{tag[2].lower()}>", without_thoughts(text), flags=re.I
    )
    tags = re.findall(rf"</?(?:{'|'.join(names)})>", text)
    if not tags:
        raise FormError("no_tags")
    if tags.count(tags[-1]) == 1 and not tags[-1].startswith("</"):
        tags.append(f"</{tags[-1][1:]}")
        text += tags[-1]
    for name in names:
        opened, closed = tags.count(f"<{name}>"), tags.count(f"</{name}>")
        if not opened or not closed:
            raise FormError(f"missing_{name}")
        if opened > 1 or closed > 1:
            raise FormError(f"repeated_{name}")
    fields = {}
    for name in names:
        match = re.search(rf"<{name}>((?:(?!</?(?:{'|'.join(names)})>).)*)</{name}>", text, flags=re.DOTALL)
        if match is None:
            raise FormError("nested_tags")
        fields[name] = match[1].strip()
        if not fields[name]:
            raise FormError(f"empty_{name}")
    return fields


def parse_pair(text: str) -> tuple[str, str]:
    """(question, answer) of a reply to a question prompt. Raises FormError."""
    fields = parse_fields(text, ("question", "answer"))
    return fields["question"], fields["answer"]


def parse_verdict(text: str) -> tuple[bool, str]:
    """(kept, reason) of a reply to the critique prompt. Raises FormError, `unknown_verdict` among its reasons."""
    fields = parse_fields(text, ("reason", "verdict"))
    word = fields["verdict"].strip(" .").lower()
    if word not in ("correct", "incorrect"):
        raise FormError("unknown_verdict")
    return word == "correct", fields["reason"]


def _head(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
