"""`nemo-longctx eval` as a user runs it: a NeMo checkpoint scores as the Hugging Face model it came from, in any layout."""

import json
import os
import subprocess
import sys

import host_server
import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("megatron.core")
from lm_eval.api.instance import Instance
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx.adapters.lm_eval import LongContextLM
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.report.evaluation import read_results

TEXT = "The smith opened his door to the street before six. Nobody had ever seen such a machine at work! " * 30
STORY = {"id": "1", "pid": "1", "input": f"Who opened the door?\n\n{TEXT[:300]}", "output": "the smith"}


def command(place, *arguments, processes=1):
    """Run nemo-longctx in `place`; what it printed."""
    status, said = host_server.start("-m", "nemo_longctx.cli", *arguments, cwd=place, processes=processes).finish()
    assert status == 0, said[-5000:]
    return said


def started_anew(place, *line):
    """The same of any `python LINE` that imports everything itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *line], cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama as a Hugging Face folder and as a NeMo checkpoint, and both evaluated in one process."""
    directory, rng = tmp_path_factory.mktemp("checkpoint"), np.random.default_rng(0)
    tokenizer = byte_tokenizer([TEXT])
    tiny_llama(vocab=len(tokenizer), length=600, rope_theta=500_000.0).save_pretrained(directory / "hf")
    tokenizer.save_pretrained(directory / "hf")
    with CorpusWriter(directory / "held_out", np.uint16) as writer:
        for _ in range(8):
            writer.add_document(rng.integers(2, len(tokenizer), 500))
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    (directory / "narrative_qa.jsonl").write_text(json.dumps(STORY) + "\n", encoding="utf-8")
    suite = {"tasks": [{"kind": "probes", "text": "text.txt", "probes": PROBES}]}
    (directory / "suite.json").write_text(json.dumps(suite), encoding="utf-8")
    command(directory, "import", "hf", "nemo")
    printed = command(directory, "eval", "hf", "nemo", *ASKED, "--out", "alone")
    assert "wrote alone/index.html" in printed
    return directory


PROBES = {"kinds": ["first_sentence", "passkey"], "lengths": [300], "depths": [0.0, 1.0], "samples": 1, "max_new_tokens": 8}
ASKED = [
    "--corpus", "held_out", "--suite", "suite.json", "--max-length", "500",
    "--tasks", "longctx_narrativeqa", "--data", "narrative_qa.jsonl", "--limit", "1",
]  # fmt: skip


def assert_same(got, want, atol):
    assert got.errors == want.errors == {}
    ((_, a),), ((_, b),) = got.position.items(), want.position.items()
    np.testing.assert_allclose([row.loss for row in a], [row.loss for row in b], atol=atol)
    np.testing.assert_allclose([row.standard_error for row in a], [row.standard_error for row in b], atol=atol)
    for x, y in zip(got.probes, want.probes, strict=True):
        assert (x.kind, x.length, x.depth, x.samples, x.skipped) == (y.kind, y.length, y.depth, y.samples, y.skipped)
        assert x.score == y.score
        assert x.answer_loss == pytest.approx(y.answer_loss, abs=atol)
    assert got.tasks == want.tasks


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_nemo_checkpoint_scores_as_the_model_it_came_from(place):
    hf, alone = read_results(place / "alone")
    assert [hf.model, alone.model] == ["hf", "nemo"]
    assert_same(alone, hf, 1e-4)
    record = json.loads((place / "alone" / "results.json").read_text())["provenance"]["checkpoints"]
    assert record["hf"]["tokenizer"] == record["nemo"]["tokenizer"]  # the checkpoint's own, found without being named


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flags", [["--tensor-parallel", "2"], ["--pipeline-parallel", "2"], []], ids=["TP", "PP", "DP"])
def test_two_processes_score_as_one(place, flags):
    _, alone = read_results(place / "alone")
    out = "_".join(["two", *flags])
    line = ["eval", "nemo", *ASKED, "--out", out, *flags]
    if flags:
        printed = command(place, *line, processes=2)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        printed = started_anew(place, *torchrun, "nemo_longctx.cli", *line)
    assert printed.count("wrote ") == 1  # by one process
    (together,) = read_results(place / out)
    assert_same(together, alone, 1e-5)
    assert (place / out / "index.html").stat().st_size > 50_000


@pytest.mark.slow
def test_stock_command_line_runs_our_task_on_our_model(place):
    """lm-eval's own command, by the one import that its release needs: scores as `nemo-longctx eval` gives them."""
    metadata = json.dumps({"data": str(place / "narrative_qa.jsonl")})
    common = ["--model", "nemo_longctx", "--tasks", "longctx_narrativeqa", "--metadata", metadata, "--limit", "1"]
    line = ["run", *common, "--model_args", "pretrained=hf", "--output_path", "stock", "--log_samples"]
    started_anew(place, "-m", "nemo_longctx.adapters.lm_eval", *line)
    (file,) = (place / "stock").rglob("results_*.json")
    scores = json.loads(file.read_text())["results"]["longctx_narrativeqa"]
    hf, _ = read_results(place / "alone")
    assert scores["f1,none"] == hf.tasks["longctx_narrativeqa"]["f1"]
    (file,) = (place / "stock").rglob("samples_longctx_narrativeqa_*.jsonl")
    sample = json.loads(file.read_text().splitlines()[0])
    prompt, options = sample["arguments"]["gen_args_0"].values()
    asked = Instance(request_type="generate_until", doc={}, arguments=(prompt, options), idx=0)
    assert [sample["resps"][0][0]] == LongContextLM(str(place / "hf")).generate_until([asked])
