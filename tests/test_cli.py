"""The command line: lazy, and a mistake is one sentence."""

import json
import subprocess
import sys

import pytest
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx.cli import COMMANDS, main

# Commands that must answer without torch, and what they are called with.
LIGHT = [["--help"], *([name, "--help"] for name in COMMANDS), ["doctor", "--json"]]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_no_torch(arguments):
    code = (
        "import sys\nfrom nemo_longctx.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'nemo', 'megatron', 'lightning', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_doctor_reports_versions_and_what_missing_parts_cost(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"].startswith("2.")
    parts = {part["name"]: part for part in report["capabilities"]}
    assert set(parts) == {"CUDA", "bf16", "Transformer Engine", "flash-attn", "NVIDIA's apex", "gloo", "nccl"}
    for part in parts.values():
        assert part["available"] or (part["cost"] and part["remedy"] and part["detail"])


def test_unknown_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepair"])
    assert stop.value.code == 2
    assert "did you mean 'prepare'" in capsys.readouterr().err


def test_a_users_mistake_is_one_sentence_and_status_2(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nemo-longctx inspect: error: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_versions_are_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    first, others = capsys.readouterr().out.splitlines()
    assert first.startswith("nemo-longctx 0.")
    assert "megatron-core" in others


@pytest.mark.parametrize("command", ["train", "sft"])
def test_training_is_a_command(command, capsys):
    """The example scripts are not in the wheel."""
    assert main([command, "recipe=no_such_recipe" if command == "train" else "sft=no_such_row"]) == 2
    assert "no such choice" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["nemo_longctx", "nemo_longctx.launch"])
def test_modules_under_python_m_do_not_end_in_silence(module):
    """`python -m nemo_longctx.launch recipe=x` did nothing, with status 0."""
    words = ["train", "recipe=x"] if module == "nemo_longctx" else ["recipe=x"]
    result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "no such choice" in result.stderr


def test_help_of_a_command_shows_one_percent_sign(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    out = capsys.readouterr().out
    assert "95 % intervals" in " ".join(out.split())
    assert "%%" not in out


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"nemo", "megatron", "lightning", "lm_eval", "datasets", "openai", "nemo_run"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from nemo_longctx.cli import main
sys.exit(main(sys.argv[1:]))
"""


def refused_without_the_host(arguments):
    result = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_command_without_its_extra_says_what_to_install(tmp_path):
    assert "pip install 'nemo-longctx[nemo]'" in refused_without_the_host(["export", "nowhere", str(tmp_path / "out")])
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(["a few words"]).save_pretrained(tmp_path / "model")
    asked = ["eval", str(tmp_path / "model"), "--tasks", "longctx_qmsum", "--out", str(tmp_path / "out")]
    assert "pip install 'nemo-longctx[eval]'" in refused_without_the_host(asked)
