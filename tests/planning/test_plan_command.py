"""The command as a user calls it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from nemo_longctx.cli import main
from nemo_longctx.data.writer import CorpusWriter

EXAMPLE = ["plan", "--model", "llama2_7b", "--tokens-per-step", "4194304", "--steps", "100000"]
EXAMPLE += ["--curriculum", "4096@0.2,32768", "--flops", "full", "--json"]


def run(capsys, *args):
    assert main(["plan", *args]) == 0
    return capsys.readouterr().out


def run_json(capsys, *args):
    return json.loads(run(capsys, *args, "--json"))


def test_the_example_prints_table_10(capsys):
    plan = run_json(capsys, *EXAMPLE[1:-1])
    assert f"{plan['total_flops']:.3e}" == "3.405e+22"
    assert plan["saving"] == pytest.approx(0.1)
    assert plan["tokens"] == 100_000 * 4_194_304
    assert [stage["steps"] for stage in plan["stages"]] == [20_000, 80_000]
    assert [stage["global_batch_size"] for stage in plan["stages"]] == [1024, 128]


def test_it_imports_no_torch_and_no_host():
    code = f"import sys; from nemo_longctx.cli import main; main({EXAMPLE!r}); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = out.splitlines()[-1]
    assert "'numpy'" in modules
    for heavy in ("'torch'", "'transformers'", "'megatron'", "'nemo'", "'lightning'", "'hydra'"):
        assert heavy not in modules


def test_attention_share_of_the_70b_beside_the_reported_slow_down(capsys):
    out = run(capsys, "--model", "llama2_70b", "--curriculum", "16384", "--flops", "full")
    assert "49,152" in out
    assert "7.7% and 25.0%" in out
    assert "reported: 17%" in out


def test_documents_lower_the_bill(capsys, tmp_path):
    prefix = tmp_path / "corpus"
    with CorpusWriter(str(prefix), np.uint16) as writer:
        for length in (100, 2000, 7):
            writer.add_document(np.zeros(length, dtype=np.uint16))
    args = ("--model", "llama2_7b", "--curriculum", "32768")
    masked = run_json(capsys, *args, "--flops", "document", "--documents", str(prefix))["total_flops"]
    assert masked < run_json(capsys, *args, "--flops", "causal")["total_flops"]


def test_time_and_cost_at_an_mfu(capsys):
    args = ("--model", "llama2_7b", "--curriculum", "4096", "--gpus", "128", "--mfu", "0.4", "--price", "2")
    at = run_json(capsys, *args)
    seconds = at["total_flops"] / (128 * 989e12 * 0.4)
    assert at["at_mfu"]["hours"] == pytest.approx(seconds / 3600)
    assert at["at_mfu"]["cost"] == pytest.approx(seconds / 3600 * 128 * 2)


def test_measured_mfu_must_be_in_the_plans_convention(capsys, tmp_path):
    measured = tmp_path / "throughput.json"
    measured.write_text(json.dumps({"mfu": 0.31, "convention": "causal"}))
    args = ["--model", "llama2_7b", "--curriculum", "4096", "--gpus", "8", "--mfu-from", str(measured)]
    assert run_json(capsys, *args)["at_mfu"]["mfu"] == 0.31
    assert main(["plan", *args, "--flops", "full"]) == 2
    assert "--flops causal" in capsys.readouterr().err


def test_recomputation_and_offload_of_a_recipe_and_of_the_options(capsys):
    text = run(capsys, "--recipe", "llama2_7b_curriculum", "--recompute", "selective", "--offload", "block:4")
    assert text.count("recompute selective, offload block:4") == 2  # both stages
    assert "what is kept for the backward pass" in text
    plan = run_json(capsys, "--recipe", "llama2_7b_curriculum")
    rows = {(row["recompute"], row["offload"]): row for row in plan["layout"]["activation_choices"]}
    assert rows["full", "none"]["saves_gib"] > rows["selective", "none"]["saves_gib"] > 0
    assert rows["full", "none"]["costs"] > rows["selective", "none"]["costs"] > 0
    assert [stage["recompute"] for stage in plan["layout"]["stages"]] == ["none", "none"]


def test_search_apply_and_longest(capsys, tmp_path):
    file = tmp_path / "override.yaml"
    args = ("--model", "llama2_7b", "--curriculum", "32768", "--gpus", "32", "--search", "3", "--longest", "--apply", str(file))
    out = run(capsys, *args)
    assert "fastest" in out
    assert "do not fit" in out
    assert "longest sequence that fits" in out
    assert "tensor_model_parallel_size" in file.read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "lama2_7b"], "llama2_7b"),
        ([], "--model"),
        (["--model", "llama2_7b", "--mfu", "0.4"], "--gpus"),
        (["--model", "llama2_7b", "--gpus", "8", "--gpu", "h10"], "h100"),
        (["--model", "llama2_7b", "--flops", "document"], "--documents"),
        (["--model", "llama2_70b", "--gpus", "2", "--search"], "more GPUs"),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, args, says):
    assert main(["plan", *args]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
