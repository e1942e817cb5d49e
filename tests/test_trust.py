"""What a checkpoint may make when it is read: an allow-list of packages, and nothing is imported for one that is refused."""

import json
import pickle
import sys
from pathlib import Path

import pytest

from nemo_longctx import trust
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.trust import (
    OPENED,
    allowed,
    check_checkpoint,
    check_context,
    check_pickle,
    check_reference,
    check_targets,
    references,
)

CONTEXT = Path(__file__).parent / "fixtures" / "checkpoint_0_1" / "context" / "io.json"


def with_target(tmp_path, module, name):
    """A real context in which one target is another."""
    text = CONTEXT.read_text()
    was = '"module": "nemo.collections.llm.gpt.model.llama", "name": "LlamaModel"'
    assert was in text
    context = tmp_path / "checkpoint" / "context"
    context.mkdir(parents=True, exist_ok=True)
    (context / "io.json").write_text(text.replace(was, f'"module": "{module}", "name": "{name}"'))
    return context


OUTSIDE = """
pty:spawn os:system posix:system subprocess:Popen builtins:eval builtins:exec builtins:__import__ builtins:getattr
importlib:import_module runpy:run_path shutil:rmtree torch:load torch.hub:load torch.utils.cpp_extension:load_inline
numpy:load pickle:loads nemo.lightning.io.mixin:pickle.loads nemo.lightning.io.mixin:shutil.rmtree pathlib:os.system
torch.nn.modules.module:functools.partial nemo.utils.import_utils:import_class_by_path transformers:pipeline
nemo.x.__globals__:f my_package:Model
"""


@pytest.mark.parametrize("target", OUTSIDE.split())
def test_a_target_outside_the_list_is_refused_before_anything_is_imported(tmp_path, target):
    before, (module, _, name) = set(sys.modules), target.partition(":")
    with pytest.raises(ConfigError, match=OPENED) as error:
        check_checkpoint(with_target(tmp_path, module, name).parent)
    assert error.value.value == f"{module}.{name}"
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", ["os", "urlquote_from_bytes"])
def test_what_an_allowed_module_only_passes_on_is_refused(tmp_path, name):
    assert allowed("pathlib", "Path")
    check_reference("pathlib", "Path", tmp_path)
    assert allowed("pathlib", name)
    with pytest.raises(ConfigError, match=OPENED):
        check_reference("pathlib", name, tmp_path)


def test_everything_that_checkpoints_of_ours_refer_to_is_allowed():
    values = json.loads(CONTEXT.read_text())
    found = set(references(values))
    assert len(found) > 15
    assert [each for each in found if not allowed(*each)] == []


def test_a_package_is_opened_by_its_name(tmp_path, monkeypatch):
    assert not allowed("my_package.models", "Model")
    monkeypatch.setenv(OPENED, "other, my_package")
    assert allowed("my_package.models", "Model")
    assert not allowed("pty", "spawn")


def test_a_tokenizer_that_runs_code_of_its_own_is_refused(tmp_path):
    context = with_target(tmp_path, "nemo.collections.llm.gpt.model.llama", "LlamaModel")
    text = (context / "io.json").read_text()
    name = '"Attr(name=\'pretrained_model_name\')", {"type": "leaf", "value": "tok"'
    assert name in text
    values = text.replace(name, '"Attr(name=\'trust_remote_code\')", {"type": "leaf", "value": true')
    assert values != text
    from nemo_longctx.trust import _runs_remote_code

    assert _runs_remote_code(json.loads(values))
    assert not _runs_remote_code(json.loads(text))


class Runs:
    def __reduce__(self):
        return (eval, ("1",))


class Names:
    """A pickle whose references only plain packages hold."""

    def __reduce__(self):
        return (Path, ("a",))


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickle_is_read_and_not_run(tmp_path, protocol):
    bad, good = tmp_path / "bad.pkl", tmp_path / "good.pkl"
    bad.write_bytes(pickle.dumps({"a": [1, Runs()]}, protocol))
    with pytest.raises(ConfigError, match="eval"):
        check_pickle(bad)
    good.write_bytes(pickle.dumps({"a": [1, Names(), Names()], "b": {"c": (2, "x")}}, protocol))
    check_pickle(good)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / ".metadata").write_bytes(bad.read_bytes())
    with pytest.raises(ConfigError, match="metadata"):
        check_checkpoint(tmp_path)


def test_a_target_in_yaml_is_refused(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [tiny_cpu_base, _self_]\neval: {tasks: [{_target_: pty.spawn, argv: ls}]}\n")
    with pytest.raises(ConfigError, match=r"eval\.tasks\[0\]\._target_='pty\.spawn'"):
        compose([f"recipe={mine}"])


def test_a_checkpoint_without_context_has_nothing_to_refuse(tmp_path):
    check_context(tmp_path)


@pytest.mark.parametrize(
    ("between", "taken"),
    [(b"", True), (pickle.FRAME + bytes(8), True), (pickle.MARK, True), (pickle.EMPTY_TUPLE * 2, False), (pickle.NONE, False)],
)
def test_a_reference_is_of_the_two_words_that_lie_on_top(tmp_path, between, taken):
    """What lies on them is their place taken by something that only shows when the pickle runs."""
    words = b"".join(pickle.SHORT_BINUNICODE + bytes([len(word)]) + word for word in (b"collections", b"OrderedDict"))
    path = tmp_path / "made"
    path.write_bytes(pickle.PROTO + b"\x04" + words + between + pickle.STACK_GLOBAL + pickle.STOP)
    if taken:
        check_pickle(path)
        return
    with pytest.raises(ConfigError, match="made by the pickle itself"):
        check_pickle(path)


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        ("builtins:int", True), ("builtins:print", False), ("builtins:int.from_bytes", False), ("torch:float32", True),
        ("torch:Size", True), ("torch:compile", False), ("torch:nn.Linear", False), ("torch.nn:Linear", True),
        ("torch.nn.modules.linear:Linear", True), ("torch.nnx:Linear", False), ("torch._utils:_rebuild_parameter", True),
        ("torch.distributed:init_process_group", False), ("torch.distributed.checkpoint.metadata:Metadata", True),
        ("transformers:LlamaConfig", True), ("transformers:pipeline", False), ("transformers:LlamaConfig.from_dict", True),
        ("transformers.models.llama:f", True), ("transformers.utils:f", False), ("collections:OrderedDict", True),
        ("collections:OrderedDict.fromkeys", True), ("collections:abc.Mapping", False), ("collections.abc:Mapping", True),
        ("functools:partial", True), ("functools:reduce", False), ("nemo.x:f", True), ("nemo_longctx.x:f", True),
        ("nemo.utils.import_utils:f", False), ("nemo.utils.import_utils.a:f", False), ("nemo.utils.import_utils_b:f", True),
        ("megatron.core.jit:f", False), ("lightning.app:f", False), ("nemo.x:__init__", False), ("nemo.__main__:f", False),
        ("nemo.x:C.__init__", False), ("nemox:f", False), ("os:path", False), (":f", False),
    ],
)  # fmt: skip
def test_what_is_allowed_is_a_list_of_names(target, taken):
    module, _, name = target.partition(":")
    assert allowed(module, name) is taken


def test_what_was_opened_is_whole_and_by_its_name_alone(monkeypatch):
    monkeypatch.setenv(OPENED, " ,other , pkg.inner,")
    assert allowed("other", "f")
    assert allowed("other.deep", "__init__")
    assert not allowed("pkg.inner", "f")
    assert not allowed("othe", "f")
    assert not allowed("", "f")


def test_references_are_found_wherever_they_stand():
    values = {"a": [{"module": "m", "name": "n", "deep": {"module": "o", "name": "p"}}, [{"module": "q", "name": "r"}]]}
    values |= {"b": {"module": "m", "name": 3}, "c": {"name": "x"}, "d": {"module": "y"}, "module": 1, "name": "z"}
    assert list(references(values)) == [("m", "n"), ("o", "p"), ("q", "r")]


@pytest.mark.parametrize(
    ("values", "runs"),
    [
        ([["Attr(name='trust_remote_code')", {"value": True}]], True),
        ([["trust_remote_code", True]], True),
        ({"a": {"b": [["x", 1], ["trust_remote_code", {"value": True}]]}}, True),
        ([["trust_remote_code", {"value": False}]], False),
        ([["trust_remote_code", {"value": 1}]], False),
        ([["trust_remote_code", "True"]], False),
        ([["trust_remote_code", True, 3]], False),
        ([[True, "trust_remote_code"]], False),
        ([["revision", True]], False),
        ({"trust_remote_code": True}, False),  # no pair of fiddle's
        ("trust_remote_code", False),
        (["trust_remote_code", ["trust_remote_code", True]], True),
    ],
)
def test_code_from_a_hub_is_a_pair_that_says_true(values, runs):
    assert trust._runs_remote_code(values) is runs


def test_a_context_is_refused_by_its_file_and_its_kind(tmp_path, monkeypatch):
    io = tmp_path / "io.json"
    io.write_text('{"objects": [')
    with pytest.raises(ConfigError, match=r"io\.json='unreadable': is not JSON .*; copy the checkpoint again"):
        check_context(tmp_path)
    io.write_text(json.dumps({"a": {"module": "nemo.x", "name": "f"}, "b": {"module": "evil.x", "name": "f"}}))
    with pytest.raises(ConfigError) as error:
        check_context(tmp_path)
    said = "it would be called when the file is read, and is not of a package that checkpoints are made of"
    assert str(error.value) == f"{io}='evil.x.f': {said}; if you trust whoever made it, set {OPENED}=evil"
    io.write_text(json.dumps([["trust_remote_code", True]]))
    with pytest.raises(ConfigError, match=r"trust_remote_code=True.*its tokenizer would run code that comes with it"):
        check_context(tmp_path)
    monkeypatch.setenv(OPENED, "transformers")
    check_context(tmp_path)
    for name in ("a.pkl", "deep/b.pickle"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pickle.dumps(Runs()))
        with pytest.raises(ConfigError, match="eval"):
            check_context(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(Runs()))
    check_context(tmp_path)


@pytest.mark.parametrize("put", ["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"])
@pytest.mark.parametrize(("module", "name", "taken"), [("collections", "OrderedDict", True), ("os", "system", False)])
def test_words_that_a_pickle_remembers_are_read_as_it_reads_them(tmp_path, put, module, name, taken):
    words = [pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name)]
    places = {
        "PUT": (pickle.PUT + b"0\n", pickle.GET + b"0\n"), "BINPUT": (pickle.BINPUT + b"\0", pickle.BINGET + b"\0"),
        "LONG_BINPUT": (pickle.LONG_BINPUT + bytes(4), pickle.LONG_BINGET + bytes(4)),
        "MEMOIZE": (pickle.MEMOIZE, pickle.BINGET + b"\0"),
    }  # fmt: skip
    to, back = places[put]
    path = tmp_path / "made"
    path.write_bytes(pickle.PROTO + b"\x04" + words[0] + to + back + words[1] + pickle.STACK_GLOBAL + pickle.STOP)
    if taken:
        check_pickle(path)
        return
    with pytest.raises(ConfigError, match=r"os\.system"):
        check_pickle(path)


def test_targets_are_refused_by_the_key_under_which_they_stand(monkeypatch):
    check_targets({"a": {"_target_": "nemo.x.C"}, "b": [1, {"_target_": None}], "_target_": "megatron.y.f"})
    for values, where in (
        ({"_target_": "os.system"}, "_target_"),
        ({"a": [{"b": 1}, {"c": {"_target_": "os.system"}}]}, "a[1].c._target_"),
        ([[{"_target_": "os.system"}]], "[0][0]._target_"),
    ):
        with pytest.raises(ConfigError) as error:
            check_targets(values)
        mend = f"is not of a package that recipes are made of; if you trust this file, set {OPENED}=os"
        assert str(error.value) == f"{where}='os.system': {mend}"
    monkeypatch.setenv(OPENED, "os")
    check_targets({"_target_": "os.system"})
