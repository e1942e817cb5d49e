"""One builder for all settings: nested, strict, and clear about what is wrong."""

import ast
import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

import nemo_longctx
from nemo_longctx.config import ConfigError, build, did_you_mean, is_finite, plain, refuse_missing, to_values
from nemo_longctx.data.config import DataConfig, InstructDataConfig
from nemo_longctx.eval.config import EvalConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    length: int = 4

    def __post_init__(self):
        if self.length < 1:
            raise ConfigError("inner.length", self.length, "set at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)
    others: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    rate: float = 1.0
    flag: bool = False
    most: int | None = None
    text: str = ""
    choice: Literal["one", "two"] = "one"
    paths: str | Sequence[str] = "here"
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)


def test_builds_nested_dataclasses():
    made = build(Outer, {"name": "a", "inner": {"length": 2}, "others": [{"length": 3}, {}], "maybe": {"length": 5}})
    assert made == Outer(name="a", inner=Inner(length=2), others=(Inner(length=3), Inner()), maybe=Inner(length=5))


@pytest.mark.parametrize(
    ("values", "key", "mend"),
    [
        ({"nam": "a"}, "nam", "did you mean 'name'"),
        ({"name": "a", "inner": {"lenght": 2}}, "inner.lenght", "did you mean 'length'"),
        ({"name": "a", "others": [{}, {"zzz": 1}]}, "others[1].zzz", "known: length"),
        ({}, "name", "missing"),
        ({"name": "a", "rate": "fast"}, "rate", "not a number"),
        ({"name": "a", "rate": True}, "rate", "not a number"),
        ({"name": "a", "flag": 1}, "flag", "true or false"),
        ({"name": "a", "most": 4096.0}, "most", "must be a whole number; write 4096"),
        ({"name": "a", "most": "many"}, "most", "must be a whole number"),
        ({"name": "a", "inner": 3}, "inner", "takes keys of its own: length"),
        ({"name": "a", "others": "length"}, "others", "must be a list"),
        ({"name": "a", "inner": {"length": 0}}, "inner.length", "at least 1"),
        ({"name": "a", "rate": float("nan")}, "rate", "must be a finite number"),
        ({"name": "a", "rate": float("-inf")}, "rate", "must be a finite number"),
        ({"name": "a", "most": 2**63}, "most", "64 bits"),
        ({"name": "a", "flag": "no"}, "flag", "must be true or false"),
        ({"name": "a", "flag": "off"}, "flag", "must be true or false"),
        ({"name": "a", "flag": None}, "flag", "null is no value here"),
        ({"name": None}, "name", "missing; set it"),
        ({"name": "a", "text": 1.5}, "text", "must be text"),
        ({"name": "a", "text": True}, "text", "must be text"),
        ({"name": "a", "text": ["b"]}, "text", "must be text"),
        ({"name": "a", "choice": "tow"}, "choice", "did you mean 'two'"),
        ({"name": "a", "paths": 2.5}, "paths", "must be text"),
        ({"name": "a", "paths": ["b", 2.5]}, "paths[1]", "must be text"),
        ({"name": "a", "paths": {"b": 1}}, "paths", "must be"),
        ({"name": "a", "shares": [1]}, "shares", "must be a mapping"),
        ({"name": "a", "shares": {"b": "c"}}, "shares.b", "not a number"),
        ("name", "Outer", "takes keys of its own"),
    ],
)
def test_mistakes_name_key_and_mend(values, key, mend):
    with pytest.raises(ConfigError) as raised:
        build(Outer, values)
    assert raised.value.key == key
    assert mend in str(raised.value)


def test_errors_survive_a_process_pool():
    error = pickle.loads(pickle.dumps(ConfigError("a.b", 3, "set 4")))
    assert (error.key, error.value, error.mend, str(error)) == ("a.b", 3, "set 4", "a.b=3: set 4")


def test_a_word_in_other_letters_is_meant():
    assert did_you_mean("ABF", ["pi", "abf"]) == "did you mean 'abf'?"
    assert did_you_mean("rmsnorm", ["LayerNorm", "RMSNorm"]) == "did you mean 'RMSNorm'?"


def test_did_you_mean_lists_all_when_nothing_is_near():
    assert did_you_mean("qqq", ["abf", "pi"]) == "known: abf, pi"


def test_a_whole_number_is_taken_as_text():
    """YAML reads `name: 256` as a number."""
    assert build(Outer, {"name": 256}).name == "256"


def test_to_values_is_what_builds_it_again():
    values = {"name": "a", "inner": {"length": 2}, "others": [{"length": 3}, {}], "paths": ["b", "c"], "shares": {"d": 1.0}}
    made = build(Outer, values)
    assert to_values(made) == values
    assert build(Outer, to_values(made)) == made


SIGNATURES = {
    "adapters/nemo/data/data_module.py": ("LongContextDataModule", DataConfig, {"curriculum", "seed"}),
    "adapters/nemo/data/instruct_data_module.py": ("LongInstructDataModule", InstructDataConfig, {"curriculum", "seed"}),
    "adapters/nemo/evaluation/callback.py": ("LongContextEvalCallback", EvalConfig, {"base", "directory"}),
}


@pytest.mark.parametrize("file", SIGNATURES)
def test_what_a_recipe_can_say_is_what_the_host_s_part_takes(file):
    """A key of the schema that its data module or callback does not take would be lost, or the other way about."""
    name, schema, more = SIGNATURES[file]
    tree = ast.parse((Path(nemo_longctx.__file__).parent / file).read_text())
    made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in made.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = {each.arg for each in init.args.args[1:] + init.args.kwonlyargs}
    assert arguments - more == {field.name for field in dataclasses.fields(schema)}
    defaults = {a.arg: ast.literal_eval(d) for a, d in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True) if d}
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING and field.name in defaults:
            assert defaults[field.name] == field.default, field.name


def test_text_has_no_nul():
    """No file, and no process, can be called so."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Named:
        name: str

    assert build(Named, {"name": "a"}, where="x").name == "a"
    with pytest.raises(ConfigError, match=r"must be text without a NUL character"):
        build(Named, {"name": "a\0b"}, where="x")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinds:
    whole: int = 0
    number: float = 0.0
    text: str = ""
    either: int | str | None = None
    many: Sequence[int] = ()
    listed: list[float] = dataclasses.field(default_factory=list)
    choice: Literal[1, "two"] = 1
    plain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inner: Inner | Sequence[Inner] | None = None
    hidden: int = dataclasses.field(default=7, init=False)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("whole", 2**63 - 1, None), ("whole", -(2**63), None), ("whole", 2**63, "must be a whole number of 64 bits"),
        ("whole", -(2**63) - 1, "must be a whole number of 64 bits"), ("whole", "4Ki", "must be a whole number; write 4096"),
        ("whole", "4.5", "must be a whole number"), ("whole", 4.5, "must be a whole number"),
        ("whole", True, "must be a whole number"),
        ("number", 10**400, "must be a finite number"), ("number", 3, None),
        ("number", "3", "not a number; write digits, with a point before an exponent (5.0e+5)"),
        ("either", 3, None), ("either", "x", None), ("either", 1.5, "must be a whole number"),
        ("many", [1, 2], None), ("many", range(2), None), ("many", {"a": 1}, "must be a list of numbers"),
        ("many", "12", "must be a list of numbers"), ("many", 3, "must be a list of numbers"), ("many", b"1", "must be a list"),
        ("listed", [1], None), ("choice", 1, None), ("choice", "two", None), ("choice", 2, "no such choice, known: 1, two"),
        ("choice", True, "no such choice"), ("choice", 1.0, "no such choice"), ("plain", {"a": object}, None),
        ("plain", [], "must be a mapping, such as {key: value}"), ("inner", {"length": 2}, None), ("inner", Inner(), None),
        ("inner", [{"length": 3}], None), ("inner", {"lenth": 2}, "unknown key, did you mean 'length'?"),
        ("inner", [{"length": 0}], "set at least 1"), ("hidden", 1, "unknown key"),
    ],
)  # fmt: skip
def test_a_value_is_of_its_kind_or_named_with_the_mend(key, value, said):
    if said is None:
        build(Kinds, {key: value})
        return
    with pytest.raises(ConfigError) as error:
        build(Kinds, {key: value}, where="part")
    assert said in str(error.value)
    assert error.value.key.startswith((f"part.{key}", "inner.length"))


def test_kinds_are_made_what_the_field_holds():
    made = build(Kinds, {"many": [1, 2], "listed": (1, 2), "either": "3", "text": 12, "inner": [{}]})
    assert (made.many, made.listed, made.either, made.text, made.inner) == ((1, 2), [1, 2], "3", "12", (Inner(),))
    assert build(Kinds, None) == build(Kinds, {}) == Kinds()
    with pytest.raises(
        ConfigError, match=r"part=3: takes keys of its own: whole, number, text, either, many, listed, choice, pl"
    ):
        build(Kinds, 3, where="part")


def test_what_must_still_be_set_is_named_where_it_stands():
    refuse_missing({"a": ["x", {"b": "??"}], "c": None, "d": 3, "e": "????"})
    for values, where in (({"a": ["x", {"b": "???"}]}, "a[1].b"), ({"a": {"b": ("???",)}}, "a.b[0]"), (["???"], "[0]")):
        with pytest.raises(ConfigError) as error:
            refuse_missing(values)
        assert str(error.value) == f"{where}='???': missing; set it"


def test_an_error_made_anew_from_its_text_is_the_same():
    """A data loader's worker: torch knows the traceback alone."""
    error = ConfigError("a.b", 3, "set 4: or 5")
    again = ConfigError(f"Traceback (most recent call last):\n  File x\nnemo_longctx.config.ConfigError: {error}\n")
    assert (str(again), again.key, again.mend) == (str(error), "a.b=3", "set 4: or 5")
    assert plain({1: ({"a": (1, [2])},)}) == {"1": [{"a": [1, [2]]}]}
    assert [is_finite(each) for each in (1, 1e308, 10**400, float("inf"), float("nan"))] == [True, True, False, False, False]
    assert did_you_mean("abff", iter(["pi", "abf"])) == "did you mean 'abf'?"
