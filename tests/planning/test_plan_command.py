"""The command as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_longctx.cli import main
from nemo_longctx.compose import compose
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.planning.planner import FILL
from nemo_longctx.recipe import load_recipe

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
    assert "'nemo_longctx.planning.report'" in modules
    for heavy in ("'numpy'", "'torch'", "'transformers'", "'megatron'", "'nemo'", "'lightning'", "'hydra'", "'yaml'"):
        assert heavy not in modules


def test_a_recipe_needs_no_torch_either():
    code = "import sys; from nemo_longctx.cli import main; main(['plan', '--recipe', 'llama2_70b']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = out.splitlines()[-1]
    assert "'hydra'" in modules
    for heavy in ("'torch'", "'transformers'", "'megatron'", "'nemo'", "'lightning'"):
        assert heavy not in modules


def test_attention_share_of_the_70b_beside_the_reported_slow_down(capsys):
    out = run(capsys, "--model", "llama2_70b", "--curriculum", "16384", "--flops", "full")
    assert "49,152" in out
    assert f" {100_000 * 4_194_304 / 1e9:.1f}B " in out  # tokens of the stage
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
    assert f"recipe={file}" in out
    recipe = load_recipe(compose([f"recipe={file}"]))
    assert recipe.trainer.world_size == 32
    assert recipe.optimizer.lr == 2e-5  # llama2_7b's, with which the file begins


@pytest.mark.slow
def test_the_example_script_takes_an_applied_plan(tmp_path):
    """Composed, checked by the schema and its parts begun: what stops it is that this process may see no GPU."""
    file = tmp_path / "mine.yaml"
    assert main(["plan", "--recipe", "llama2_70b", "--gpus", "512", "--apply", str(file), "--json"]) == 0
    script = Path(__file__).parents[2] / "examples" / "megatron_gpt_continual.py"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), f"recipe={file}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_choices_of_recomputation_and_offload_say_what_they_save_and_cost(capsys):
    plan = run_json(capsys, "--recipe", "llama2_7b")
    rows = {(row["recompute"], row["offload"]): row for row in plan["layout"]["activation_choices"]}
    none, full, moved = rows["none", "none"], rows["full", "none"], rows["full", "full"]
    assert none["saves_gib"] == none["costs"] == 0
    assert full["saves_gib"] > 0 < full["costs"]
    assert moved["saves_gib"] > full["saves_gib"]
    assert moved["costs"] > full["costs"]
    out = run(capsys, "--recipe", "llama2_7b")
    assert "saves" in out


def test_a_recipe_for_a_cpu_is_planned_for_this_machine(capsys):
    plan = run_json(capsys, "--recipe", "tiny_cpu_base")
    assert plan["machine"]["name"] == "cpu"
    assert plan["layout"]["stages"][0]["fits"]
    assert plan["layout"]["stages"][0]["memory_gib"]["framework"] == 0
    assert main(["plan", "--recipe", "tiny_cpu_base", "--search"]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_people_read_of_a_cpu_its_memory_and_of_gpus_their_time_too(capsys):
    assert main(["plan", "--recipe", "tiny_cpu_base"]) == 0
    cpu = capsys.readouterr().out
    assert main(["plan", "--recipe", "llama2_7b", "--price", "2"]) == 0
    gpus = capsys.readouterr().out
    for timed in ("  rates: ", " s a step, ", " tokens/s a GPU", "  in all ", " GPU-hours, cost "):
        assert timed in gpus
        assert timed not in cpu
    plan = run_json(capsys, "--recipe", "tiny_cpu_base")
    for shown, unit, size, digits, tokens in (
        (cpu, "M", 1e6, 2, plan["tokens"]),
        (gpus, "B", 1e9, 1, run_json(capsys, "--recipe", "llama2_7b")["tokens"]),
    ):
        assert f" {tokens / size:.{digits}f}{unit} " in shown  # of the only stage, in words that tell it from nothing
    stage, machine = plan["layout"]["stages"][0], plan["machine"]
    total = stage["memory_gib"]["total"] * machine["gpus"]
    assert f"  {stage['seq_length']:,} tokens: {total:.1f} of {machine['memory_gib'] * FILL:.1f} GiB, fits\n" in cpu


def test_overrides_change_the_recipe_that_is_planned(capsys):
    plan = run_json(capsys, "--recipe", "llama2_7b", "trainer.num_nodes=16", "curriculum=paper_4k_to_32k")
    assert plan["machine"]["gpus"] == 128
    assert [stage["seq_length"] for stage in plan["stages"]] == [4096, 32_768]


def test_kv_cache_of_a_recipes_evaluations_is_in_the_memory(capsys):
    tasks = "eval.tasks=[{kind: position, corpus: x, seq_length: 65536}]"
    plan = run_json(capsys, "--recipe", "llama2_7b", tasks)
    assert plan["layout"]["stages"][0]["memory_gib"]["kv_cache"] > 0
    assert run_json(capsys, "--recipe", "llama2_7b")["layout"]["stages"][0]["memory_gib"]["kv_cache"] == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "lama2_7b"], "llama2_7b"),
        ([], "--model"),
        (["--model", "llama2_7b", "--mfu", "0.4"], "--gpus"),
        (["--model", "llama2_7b", "--gpus", "8", "--gpu", "h10"], "h100"),
        (["--model", "llama2_7b", "--flops", "document"], "--documents"),
        (["--model", "llama2_70b", "--gpus", "2", "--search"], "more GPUs"),
        (["--model", "llama2_7b", "trainer.num_nodes=4"], "--recipe"),
        (["llama2_7b"], "--recipe llama2_7b or --model llama2_7b"),
        (
            ["recipe=llama2_7b", "--gpus", "8"],
            "plan='recipe=llama2_7b': a model or recipe is named by an option, --recipe llama2_7b",
        ),
        (["--recipe", "nowhere/mine.yaml"], "no such file"),
        (["--model", "llama2_7b", "--gpus", "8", "--mfu", "0.4", "--mfu-from", "x.json"], "give --mfu or --mfu-from, not both"),
        (["--model", "llama2_7b", "--gpus", "8", "--price", "-1"], "must be the price of a GPU-hour, 0 or more"),
        (["--model", "llama2_7b", "--gpus", "8", "--price", "inf"], "must be the price of a GPU-hour, 0 or more"),
        (
            [
                "--model",
                "num_layers=2,hidden_size=8,ffn_hidden_size=8,num_attention_heads=2,vocab_size=8",
                "--gpus",
                "1",
                "--steps",
                "8",
                "--apply",
                "x.yaml",
            ],
            "--recipe",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, args, says):
    assert main(["plan", *args]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
