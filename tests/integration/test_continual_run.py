"""The main job through the real NeMo: train short, extend, resume, and refuse what cannot work, before any work."""

import json
import random
import shutil
import time
from pathlib import Path

import host_server
import numpy as np
import pytest

from nemo_longctx.cli import main as cli
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.recipe import load_recipe
from nemo_longctx.report.training_log import read_training_log

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "megatron_gpt_continual.py"
VOCABULARY = 300


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """This package's own source as a corpus with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("text")
    source, size = str(ROOT / "nemo_longctx"), str(VOCABULARY)
    files = ["--output", str(folder / "corpus"), "--tokenizer", str(folder / "tokenizer"), "--train-tokenizer", size]
    status = cli(["prepare", source, "--glob", "*.py", *files, "--holdout", "0.2", "--workers", "1"])
    assert status == 0
    return folder


def overrides(text: Path, output: Path, *more: str) -> list[str]:
    """A few steps of the tiny recipes on `text`."""
    validation = f"[{{name: held_out, path: {text}/corpus_holdout, seq_length: 64, micro_batch_size: 2, samples: 4}}]"
    return [
        f"output_dir={output}", f"data.tokenizer={text}/tokenizer", f"data.mix.sources=[{{path: {text}/corpus}}]",
        f"data.validation={validation}", f"data.cache_dir={output}/order", "trainer.val_every_tokens=0",
        "optimizer.warmup_tokens=0", "eval=none", *more,
    ]  # fmt: skip


def base(text: Path, output: Path, *more: str) -> list[str]:
    small = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.kv_channels=16"]
    clock = ["curriculum.stages=[{until: 1.0, seq_length: 64, micro_batch_size: 2}]", "curriculum.tokens_per_step=256",
             "curriculum.total_tokens=2560", "checkpoint.every_tokens=512"]  # fmt: skip
    sizes = [*small, f"model.vocab_size={VOCABULARY}", *clock]
    return overrides(text, output, "recipe=tiny_cpu_base", *sizes, *more)


def long(text: Path, output: Path, *more: str) -> list[str]:
    clock = ["curriculum.stages=[{until: 1.0, seq_length: 256}]", "curriculum.tokens_per_step=512",
             "curriculum.total_tokens=1536", "checkpoint.every_tokens=0"]  # fmt: skip
    return overrides(text, output, "recipe=tiny_cpu_long", f"restore_from={output}/tiny_cpu_base", *clock, *more)


def start(arguments: list[str]) -> host_server.Started:
    return host_server.start(EXAMPLE, *arguments)


def finish(started: host_server.Started) -> str:
    status, output = started.finish()
    assert status == 0, output[-4000:]
    return output


def kill_after(started: host_server.Started, log: Path, steps: int) -> None:
    """SIGKILL once the training log has so many rows."""
    while started.poll() is None and (not log.exists() or len(read_training_log(log)) < steps):
        time.sleep(0.05)
    assert started.poll() is None, started.said[-3000:]
    started.kill()
    started.finish()


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """A base run and its extension, by the script, as a user runs them; and what the second one printed."""
    output = tmp_path_factory.mktemp("runs")
    finish(start(base(text, output)))
    return output, finish(start(long(text, output)))


def build(arguments: list[str]):
    from nemo_longctx.adapters.nemo.launch.run import build_run

    return build_run(load_recipe(compose(arguments)))


def test_the_extension_is_shown_verified_and_stored(trained):
    output, printed = trained
    assert "rotary_base *" in printed
    assert "RoPE verified live" in printed
    record = json.loads((output / "tiny_cpu_long" / "results" / "settings.json").read_text())
    assert record["settings"]["rotary_base"] == {"before": 10000, "run": 500000}
    assert record["settings"]["seq_length"] == {"before": 64, "run": 256}
    assert "base=500000" in record["verified"][0]
    assert record["versions"]["megatron-core"]


def test_the_training_log_counts_tokens(trained):
    output, _ = trained
    rows = [row for row in read_training_log(output / "tiny_cpu_base" / "results" / "training.csv") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["tokens"] for row in rows] == [256 * step for step in range(1, 11)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["grad_norm"] > 0 for row in rows)


def test_checkpoints_load_with_stock_nemo(trained):
    """The context, tokenizer included, without any function of ours in it."""
    from nemo.lightning import io

    from nemo_longctx.adapters.nemo.model.config import checkpoint_directory

    output, _ = trained
    directory = checkpoint_directory(output / "tiny_cpu_long")
    model = io.load_context(directory / "context", subpath="model")
    assert model.config.rotary_base == 500000
    assert model.config.seq_length == 256
    assert model.tokenizer.vocab_size == VOCABULARY
    assert model.tokenizer.text_to_ids("def f(): pass")
    assert "nemo_longctx" not in (directory / "context" / "model.yaml").read_text()


def test_the_recipe_restores_weights_before_it_trains(trained, text):
    """The first loss of the extension is that of a trained model, not of random weights."""
    output, _ = trained
    first = read_training_log(output / "tiny_cpu_long" / "results" / "training.csv")[0]["loss"]
    assert first < np.log(VOCABULARY) - 0.1


BROKEN = {
    "no corpus": ("data.mix.sources=[{path: nowhere/corpus}]", "nowhere/corpus"),
    "vocabulary": ("model.vocab_size=200", "model.vocab_size=200"),
    "class": ("model.config=LlamaConfigg", "did you mean 'LlamaConfig'"),
    "field": ("model.num_layer=3", "did you mean 'num_layers'"),
    "data key": ("data.num_worker=1", "did you mean 'num_workers'"),
    "tokenizer": ("data.tokenizer=/nonexistent/tokenizer", "data.tokenizer"),
    "gpu": ("trainer.accelerator=gpu", "no CUDA device"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_input_is_refused_while_building(text, tmp_path, case):
    override, message = BROKEN[case]
    with pytest.raises(ConfigError) as raised:
        build(base(text, tmp_path, override)).data.mix  # noqa: B018
    assert message in str(raised.value)
    assert not (tmp_path / "tiny_cpu_base").exists()


@pytest.mark.parametrize(
    ("restore_from", "message"),
    [
        ("nowhere", "no finished NeMo checkpoint is there"),
        (".", "no finished NeMo checkpoint is there"),
        ("model.nemo", "of NeMo 1"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_refused(text, tmp_path, restore_from, message):
    with pytest.raises(ConfigError, match=message):
        build(long(text, tmp_path, f"restore_from={tmp_path / restore_from}"))


def test_a_checkpoint_of_another_shape_is_refused(trained, text):
    output, _ = trained
    with pytest.raises(ConfigError, match=r"model.num_layers=5: the checkpoint .* has 2"):
        build(long(text, output, "model.num_layers=5"))
    with pytest.raises(ConfigError, match="the checkpoint"):
        build(long(text, output, "model={config: Llama2Config7B, vocab_size: 32000}"))


def test_groups_that_do_not_divide_the_heads_are_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=r"model.num_query_groups=3: must divide the 4 of model.num_attention_heads"):
        build(base(text, tmp_path, "model.num_attention_heads=4", "model.num_query_groups=3"))


@pytest.mark.slow
def test_text_without_a_window_is_refused(text, tmp_path):
    with CorpusWriter(str(tmp_path / "short"), np.uint16) as writer:
        writer.add_document([1, 2, 3])
    status, output = start(base(text, tmp_path, f"data.mix.sources=[{{path: {tmp_path}/short}}]")).finish()
    assert status == 2, output[-3000:]
    assert "error: curriculum.stages.seq_length=64: the corpus has only 3 tokens" in output


def test_a_disk_too_full_to_save_is_said_before_training(trained, monkeypatch):
    from nemo_longctx.adapters.nemo.launch.callbacks import check_disk

    output, _ = trained
    usage = shutil.disk_usage(output)
    check_disk(output, usage.free // 2)
    with pytest.raises(ConfigError, match="MiB free, and saving takes"):
        check_disk(output, usage.total * 2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_kills_change_no_bit(text, tmp_path):
    """Killed with SIGKILL at five random moments, the run ends with the losses of one that was never killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(base(text, whole, "curriculum.total_tokens=23040")))
    log = killed / "tiny_cpu_base" / "results" / "training.csv"
    moments = sorted(random.Random(1234).sample(range(4, 55), 5))
    for step in moments:
        kill_after(start(base(text, killed, "curriculum.total_tokens=23040")), log, step)
    finish(start(base(text, killed, "curriculum.total_tokens=23040")))
    keep = ("step", "tokens", "loss", "lr", "grad_norm", "validation_loss")
    curves = [
        [{key: row[key] for key in keep if key in row} for row in read_training_log(path)]
        for path in (whole / "tiny_cpu_base" / "results" / "training.csv", log)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) >= 90


# What a user of stock NeMo types with this package imported, and the CPU adapter.
STOCK_EXPORT = """
import sys
import nemo_longctx.adapters.nemo
from nemo.collections import llm
from nemo_longctx.adapters.megatron import cpu

cpu.install()
with cpu.stock_configs():
    llm.export_ckpt(sys.argv[1], "hf", sys.argv[2])
"""


def checkpoint_of(run: Path) -> Path:
    from nemo_longctx.adapters.nemo.model.config import checkpoint_directory

    return checkpoint_directory(run)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["pi", "yarn", "xpos_abf"])
def test_a_rope_choice_trains_resumes_and_exports_by_one_word(trained, text, tmp_path, choice, monkeypatch):
    """Variants by the host's field, by our transform, and one that transformers cannot say; by the host's exporter too.
    What one of the runs logs arrives in every logger, before the kill and after it."""
    base_run, _ = trained
    rope = ["rope.original_max_position_embeddings=64"] if choice == "yarn" else []
    word = [f"rope={choice}", f"restore_from={base_run}/tiny_cpu_base", *rope]
    run = [*long(text, tmp_path), *word, "checkpoint.every_tokens=512"]
    if choice == "pi":
        monkeypatch.setenv("WANDB_MODE", "offline")
        position = f"{{kind: position, corpus: {text}/corpus_holdout, seq_length: 64, documents: 4, guard: true}}"
        run += ["logger=[tensorboard,wandb,csv]", f"eval={{tasks: [{position}], guard: {{loss: 9}}}}"]
    log = tmp_path / "tiny_cpu_long" / "results" / "training.csv"
    kill_after(start(run), log, 2)
    assert "RoPE verified live" in finish(start(run))
    assert [row["step"] for row in read_training_log(log) if "loss" in row] == [1, 2, 3]
    if choice == "pi":
        check_loggers(tmp_path / "tiny_cpu_long")
    exported = cli(["export", str(tmp_path / "tiny_cpu_long"), str(tmp_path / "hf")])
    assert exported == (2 if choice == "xpos_abf" else 0)
    assert (tmp_path / "hf" / "config.json").exists() == (choice != "xpos_abf")
    checkpoint = checkpoint_of(tmp_path / "tiny_cpu_long")
    stock, said = host_server.start("-c", STOCK_EXPORT, checkpoint, tmp_path / "stock").finish()
    if choice == "xpos_abf":
        assert stock != 0
        assert "transformers has no xPos" in said
        assert not (tmp_path / "stock").exists()
        return
    assert stock == 0, said[-3000:]
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "stock"))
    assert theirs == ours
    assert theirs["rope_scaling"]["rope_type"] == {"pi": "linear", "yarn": "yarn"}[choice]


LOGGED = {
    "reduced_train_loss", "lr", "grad_norm", "consumed_tokens", "seq_length", "tokens_per_second", "tflops_per_gpu", "val_loss",
    "val_loss_held_out", "eval/", "guard/",
}  # fmt: skip


def check_loggers(run: Path) -> None:
    """Every figure by its name, and the pictures, in TensorBoard, W&B and CSV."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    scalars, pictures = board.Tags()["scalars"], board.Tags()["images"]
    assert {name for name in LOGGED if not any(tag.startswith(name) for tag in scalars)} == set()
    assert "figures/training" in pictures
    assert len(pictures) >= 2
    assert {event.step for event in board.Scalars("consumed_tokens")} >= {0, 1, 2}  # the host counts steps from 0
    runs = sorted((run / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in runs}) == 1  # killed and gone on with: one run
    kept = b"".join(file.read_bytes() for folder in runs for file in folder.glob("*.wandb"))
    assert {name for name in LOGGED if name.encode() not in kept} == set()
    assert list((run / "wandb").rglob("training_*.png"))
    head = [line for file in (run / "csv").rglob("metrics.csv") for line in file.read_text().splitlines()[:1]]
    assert {name for name in LOGGED if not any(name in line for line in head)} == set()
