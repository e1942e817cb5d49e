"""The command line: lazy, and a mistake is one sentence."""

import json
import subprocess
import sys

import pytest

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
