"""Lists that fill a prompt: exact to the token, numbered without a gap, with what is needed whole and in its order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.probe_tools import Tools


def letters(text, after=""):
    """A tokenizer of characters."""
    return [ord(letter) for letter in text]


def nothing(*_, **__):
    raise AssertionError("a list asks for tokens only")


TOOLS = Tools(
    tokenizer=None, encode=letters, prefix=[0, 0], essay=nothing, size=0, fill=nothing, spread=nothing, questions=nothing,
    labelled=nothing,
)  # fmt: skip


def listed(room, needed, between="\n"):
    extras = (f"extra {number}" for number in itertools.count())
    tokens = TOOLS.packed(
        "list", 9999, room, needed=needed, extras=extras, show=lambda number, entry: f"{number}. {entry}", between=between
    )
    return "".join(map(chr, tokens))


@settings(max_examples=60, deadline=None)
@given(st.integers(40, 700), st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True))
def test_a_list_is_exact_numbered_and_holds_what_is_needed(room, depths):
    needed = [(depth, f"<{place}>") for place, depth in enumerate(sorted(depths))]
    text = listed(room, needed)
    assert len(text) == room
    lines = text.rstrip("\n").split("\n")
    assert [line.split(". ")[0] for line in lines[:-1]] == [str(number) for number in range(1, len(lines))]
    names = [line.partition(". ")[2] for line in lines]
    assert [name for name in names if name.startswith("<")] == [entry for _, entry in needed]
    extras = [name for name in names[:-1] if name.startswith("e")]
    assert extras == [f"extra {number}" for number in range(len(extras))]
    assert f"{len(lines)}. extra ".startswith(lines[-1][: len(f"{len(lines)}. extra ")]) or names[-1].startswith("<")


def test_what_is_needed_lies_at_its_depth_among_the_extras():
    lines = listed(2000, [(0.0, "<first>"), (0.5, "<middle>"), (1.0, "<last>")]).split("\n")
    assert sum("<" in line for line in lines) == 3
    places = [next(number for number, line in enumerate(lines) if name in line) for name in ("<first>", "<middle>", "<last>")]
    assert places[0] == 0
    assert places[1] == round(0.5 * (places[2] - 1))


def test_a_list_says_how_much_room_what_is_needed_takes():
    needed = [(0.0, "abc"), (1.0, "defg")]
    size = len("1. abc\n2. defg\n")
    assert listed(size, needed) == "1. abc\n2. defg\n"
    assert listed(size + 1, needed) == "1. abc\n2. defg\n\n"
    with pytest.raises(ConfigError, match=r"probes.lengths=9999: too short for a list probe, which needs 10001 tokens"):
        listed(size - 2, needed)


def test_the_room_left_is_what_is_not_fixed():
    assert TOOLS.room("list", 10, [1, 2, 3], [4]) == 4
    assert TOOLS.room("list", 6, [1, 2, 3], [4]) == 0
    with pytest.raises(ConfigError, match="needs 6 tokens"):
        TOOLS.room("list", 5, [1, 2, 3], [4])
