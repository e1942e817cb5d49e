"""Settings as `--keys` and the docs show them come from the schema, with nothing left out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest

from nemo_longctx.eval.config import TASKS
from nemo_longctx.recipe import InstructRecipe, RecipeConfig
from nemo_longctx.reference import _kind, meanings, settings
from nemo_longctx.rope.variants import VARIANTS


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
    assert list(found) == ["items", "items[].size", "items[].low", "items[].high", "kind", "on"]
    assert found["items[].size"].default is None
    assert found["items[].size"].meaning == "tokens; a sentence that goes on."
    assert (found["items[].high"].kind, found["items[].high"].default) == ("number or null", "null")
    assert found["items[].low"].meaning == found["items[].high"].meaning == "bounds."
    assert (found["kind"].kind, found["kind"].meaning) == ("a or b", "one of two.")
    assert (found["on"].kind, found["on"].default) == ("true or false", "false")


@pytest.mark.parametrize("cls", [RecipeConfig, InstructRecipe, *TASKS.values()], ids=lambda cls: cls.__name__)
def test_every_setting_says_what_it_means(cls):
    """In a sentence of its own: none that sends the reader to a class, and none of two settings of one section at once."""
    found = [each for each in settings(cls) if not each.key.endswith("_parallel_size")]
    assert [each.key for each in found if len(each.meaning.split()) < 2 or "as in `" in each.meaning] == []
    said = [(each.key.rpartition(".")[0], each.meaning) for each in found]
    assert [key for key in said if said.count(key) > 1] == []


@pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
def test_every_field_of_a_variant_says_what_it_means(cls):
    assert not {field.name for field in dataclasses.fields(cls)} - set(meanings(cls))


def test_what_may_be_null_and_a_list_are_settings_too():
    found = {each.key: each for each in settings(InstructRecipe)}
    assert (found["lora"].kind, found["lora"].default) == ("mapping or null", "null")
    assert (found["data.validation"].kind, found["data.validation"].default) == ("list of mappings", "[]")
    assert found["curriculum.stages"].default is None
    assert "optimizer" not in found  # made of its keys, whatever is said
    assert list(found).index("lora") < list(found).index("lora.dim")


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
