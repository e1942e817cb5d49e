"""`from nemo_longctx import train, ...`: light to import, settings as Python has them, a sentence raised."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

import nemo_longctx
from nemo_longctx import api
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.runs import RunError


def test_importing_the_functions_imports_neither_torch_nor_the_host():
    code = (
        "import sys\nimport nemo_longctx\nassert 'nemo_longctx.api' not in sys.modules\n"
        "from nemo_longctx import evaluate, export, plan, prepare, train\n"
        "heavy = {'torch', 'numpy', 'transformers', 'nemo', 'megatron'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", nemo_longctx.__all__)
def test_each_is_documented_and_typed(name):
    made = getattr(nemo_longctx, name)
    assert made.__doc__
    if inspect.isfunction(made):
        signature = inspect.signature(made)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


VALUES = [
    "with space", "it's", "a, b: [c] {d}", "step=100-last", "null", "true", "007", "1e5", "\\n", "cost $5", "é", "a~/x", 3,
    1e-4, -2.5, True, False, None, [1, "a b"], {"path": "x y", "weight": 0.5}, [{"path": "it's", "weight": None}],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_setting_arrives_as_it_was_given(value):
    words = api._overrides({"recipe": "tiny_cpu_base", "data.cache_dir": value})
    assert compose(words)["data"]["cache_dir"] == value


@pytest.mark.parametrize(
    ("value", "read"),
    [(np.float32(0.5), 0.5), (np.int64(7), 7), (np.bool_(True), True), (np.array([1, 2]), [1, 2]), ([np.float64(2.5)], [2.5])],
    ids=repr,
)
def test_a_setting_of_numpy_is_the_number(value, read):
    assert compose(api._overrides({"recipe": "tiny_cpu_base", "data.cache_dir": value}))["data"]["cache_dir"] == read


@pytest.mark.parametrize("value", [object(), {1, 2}, [object()]], ids=["object", "set", "list"])
def test_a_setting_that_cannot_be_written_is_named(value):
    with pytest.raises(ConfigError, match=r"optimizer\.lr=.*give None, truth, a number"):
        api.train("tiny_cpu_base", overrides={"optimizer.lr": value})


def test_what_is_no_list_of_words_is_refused():
    with pytest.raises(ConfigError, match=r"overrides=\('optimizer.lr', 1\).*list of key=value"):
        api.train("tiny_cpu_base", overrides=[("optimizer.lr", 1)])
    with pytest.raises(ConfigError, match=r"nodes_line='torchrun.*nodes_line\.split"):
        api.train("tiny_cpu_base", nodes_line="torchrun -m nemo_longctx")


def test_one_name_is_not_its_letters_and_home_is_home(monkeypatch, tmp_path):
    """`globs="*.txt"` was the patterns `*`, `.`, `t`, ...: every file was taken."""
    ran = []
    monkeypatch.setattr(api, "_run", lambda words, **kwargs: ran.append(list(words)) or "{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    api.prepare("~/texts", "~/data/c", tokenizer="~/t", globs="*.txt")
    named = [f"{tmp_path}/{name}" for name in ("texts", "data/c", "t")]
    assert ran == [["prepare", named[0], "--output", named[1], "--tokenizer", named[2], "--json", "--glob", "*.txt"]]
    assert api.export("~/a", "~/b") == tmp_path / "b"
    assert api.import_hf("~/b", "~/c") == tmp_path / "c"
    assert ran[1:] == [["export", f"{tmp_path}/a", f"{tmp_path}/b"], ["import", f"{tmp_path}/b", f"{tmp_path}/c"]]


def test_one_text_of_overrides_is_refused():
    with pytest.raises(ConfigError, match="give a mapping"):
        api.train("tiny_cpu_base", overrides="optimizer.lr=1")


def test_a_plan_is_the_command_s(capsys):
    import json

    from nemo_longctx.cli import main

    assert main(["plan", "--model", "llama2_7b", "--steps", "10", "--gpus", "8", "--tp", "2", "--json"]) == 0
    assert json.loads(json.dumps(nemo_longctx.plan("llama2_7b", steps=10, gpus=8, tp=2))) == json.loads(capsys.readouterr().out)
    with pytest.raises(ConfigError, match="no option of nemo-longctx plan"):
        nemo_longctx.plan("llama2_7b", gpusss=8)


def test_a_script_without_a_main_guard_prepares_text(tmp_path):
    """Workers are spawned, which would start such a script anew."""
    (tmp_path / "some texts").mkdir()
    for number in range(3):
        (tmp_path / "some texts" / f"{number}.txt").write_text(f"text {number} " * 50)
    script = tmp_path / "script.py"
    script.write_text(
        "from nemo_longctx import prepare\n"
        "made = prepare('some texts', 'data/long', tokenizer='tok', train_tokenizer=260, workers=2)\n"
        "print('documents', made['documents']['train'])\n"
    )
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "documents 3"


def test_what_ends_a_command_is_raised_as_its_sentence(tmp_path):
    with pytest.raises(RunError, match="nothing_here"):
        api.prepare(tmp_path / "nothing_here", tmp_path / "out", tokenizer="t")


def test_a_step_that_was_validated_is_one_row_of_the_training(tmp_path):
    """A validation has a row of its own in training.csv, so that the last one had no loss."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "training.csv").write_text(
        "step,tokens,loss,validation_loss,validation_loss_a\n1,8,2.5,,\n2,16,2.0,,\n2,16,,3.0,3.5\n"
    )
    assert api.Trained(tmp_path).training == [
        {"step": 1, "tokens": 8, "loss": 2.5},
        {"step": 2, "tokens": 16, "loss": 2.0, "validation_loss": 3.0, "validation_loss_a": 3.5},
    ]


def test_training_starts_the_command_with_what_was_given(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(api, "_run", lambda words, start=(): started.append((list(words), list(start))))
    place = f"output_dir={tmp_path}"
    nodes = ["torchrun", "-m", "nemo_longctx"]
    made = api.train("tiny_cpu_base", restore_from="a b", overrides=["trainer=cpu", place], nodes_line=nodes)
    assert made.directory.parent == tmp_path
    words, start = started.pop()
    assert words[:2] == ["train", "recipe=tiny_cpu_base"]
    assert words[2:4] == ["trainer=cpu", place]
    assert words[4].startswith("restore_from=")
    assert "a b" in words[4]
    assert start == nodes
    api.train("tiny_cpu_base", overrides={"output_dir": str(tmp_path)})
    assert started.pop() == (["train", "recipe=tiny_cpu_base", place], [])
