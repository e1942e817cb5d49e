"""Settings as `--keys` and the docs show them come from the schema, with nothing left out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest

from nemo_longctx.recipe import RecipeConfig
from nemo_longctx.reference import _kind, meanings, settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inner:
    """Of a list.

    Attributes:
        size: tokens; a sentence that
            goes on.
        low, high: bounds.
    """

    size: int
    low: float = 0.5
    high: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Outer:
    """Attributes:
    items: a list of dataclasses.
    kind: one of two.
    """

    items: tuple[_Inner, ...] = ()
    kind: Literal["a", "b"] = "a"
    on: bool = False


def test_settings_of_a_dataclass_are_all_there():
    found = {each.key: each for each in settings(_Outer)}
    assert list(found) == ["items[].size", "items[].low", "items[].high", "kind", "on"]
    assert found["items[].size"].default is None
    assert found["items[].size"].meaning == "tokens; a sentence that goes on."
    assert (found["items[].high"].kind, found["items[].high"].default) == ("number or null", "null")
    assert found["items[].low"].meaning == found["items[].high"].meaning == "bounds."
    assert (found["kind"].kind, found["kind"].meaning) == ("a or b", "one of two.")
    assert (found["on"].kind, found["on"].default) == ("true or false", "false")


@pytest.mark.parametrize("name", ["optimizer", "trainer", "checkpoint", "curriculum", "data"])
def test_every_setting_of_a_recipe_says_what_it_means(name):
    silent = [each.key for each in settings(RecipeConfig) if each.key.startswith(f"{name}.") and not each.meaning]
    assert not silent


def test_a_child_s_docstring_keeps_its_parent_s():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Child(_Inner):
        """Attributes:
        more: its own.
        """

        more: int = 0

    assert set(meanings(Child)) == {"size", "low", "high", "more"}


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (int, "whole number"), (float | None, "number or null"), (bool, "true or false"), (tuple[str, ...], "list of text"),
        (Sequence[int], "list"), (Mapping[str, int], "mapping"), (dict[str, int], "mapping"),
        (Literal["a", "b"], "a or b"), (int | str, "whole number or text"), (object, "any"), (set[int], "any"),
    ],
    ids=str,
)  # fmt: skip
def test_kinds_in_the_words_of_yaml(hint, said):
    assert _kind(hint) == said
