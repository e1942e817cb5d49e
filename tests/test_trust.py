"""What a checkpoint may make when it is read: an allow-list of packages, and nothing is imported for one that is refused."""

import json
import pickle
import sys
from pathlib import Path

import pytest

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.trust import OPENED, allowed, check_checkpoint, check_context, check_pickle, check_reference

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
    from nemo_longctx.trust import references

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
