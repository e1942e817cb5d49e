"""The end of the demo: both models side by side, the export checked, figures with their data, and one summary.

Each model is measured under its own RoPE: the base at its own length is what the extended model must not fall behind.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from nemo_longctx.adapters.megatron.inference import MCoreCausalModel, evaluating
from nemo_longctx.adapters.megatron.position import loss_by_position
from nemo_longctx.adapters.nemo.checkpoint.load import load_model
from nemo_longctx.adapters.nemo.launch.callbacks import versions
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.eval.position import PositionRow, by_model, write_csv
from nemo_longctx.eval.results import SuiteResult
from nemo_longctx.eval.suite import Suite, parse_tasks
from nemo_longctx.hf.dtypes import in_dtype
from nemo_longctx.report.demo import (
    BASE,
    FOUND,
    LONG,
    LONG_LENGTH,
    NAMES,
    SHORT_LENGTH,
    TARGETS,
    findings,
    markdown,
    write_pictures,
)
from nemo_longctx.report.plots import plot_loss_by_position, plot_training_curve
from nemo_longctx.report.training_log import read_training_log, training_columns, write_json

BIN, MAX_WINDOWS = 64, 160
LOGIT_TOLERANCE = 1e-3
NEAR, FAR = (128, 256), (1024, 2048)  # where a model is at home, and where only an extended one is


def tasks(held_out: str) -> list[dict[str, Any]]:
    """What both models are asked, beside loss by position: the same tokens after more and more context, and look-ups."""
    contexts = [read - TARGETS for read in (96, 128, 192, SHORT_LENGTH, 512, 1024, LONG_LENGTH)]
    fixed = {"contexts": contexts, "targets": TARGETS, "short": SHORT_LENGTH - TARGETS}
    asked = {"kinds": list(FOUND), "lengths": [256, 512, 1024, 2048], "depths": [0.0, 0.25, 0.5, 0.75], "samples": 4}
    return [
        {"kind": "context", "corpus": held_out, "documents": 64, **fixed},
        {"kind": "position", "corpus": held_out, "seq_length": SHORT_LENGTH - 1, "documents": 64, "bins": 4, "guard": True},
        {"kind": "probes", "text": held_out, "probes": {**asked, "max_new_tokens": 10}},
    ]


def write_report(output: Path, steps: dict[str, Any]) -> int:
    """Write everything that the demo promises under `output`; exit status 1 where a promise does not hold."""
    began = time.monotonic()
    rows, found, check = _compare(output)
    write_csv(output / "loss_by_position.csv", rows)
    figure = {NAMES[model]: model_rows for model, model_rows in by_model(rows).items()}
    plot_loss_by_position(
        figure, output / "loss_by_position.png", marks=[(SHORT_LENGTH, "what the first model read in training")]
    )
    curve, switch = _training_rows(output)
    _write_rows(output / "training.csv", curve)
    plot_training_curve(curve, output / "training.png", switches=[(switch, "from here on 2,048 tokens at a time")])
    losses = {model: {"128-255": _mean(rows, model, *NEAR), "1024-2047": _mean(rows, model, *FAR)} for model in (BASE, LONG)}
    measured = findings(found)
    write_pictures(output, found)
    gains = measured["gain_from_256_to_2048"]
    checks = {
        "text beyond its 256 tokens harms the base": gains[BASE]["high"] < 0,
        "it does not harm the extended model": gains[LONG]["high"] > 0,
        "export gives the NeMo model's logits": check["max_abs_logit_difference"] < LOGIT_TOLERANCE,
    }
    seconds = {name: step["seconds"] for name, step in steps.items()} | {"report": round(time.monotonic() - began, 1)}
    summary = {
        "commands": {name: step["command"] for name, step in steps.items()},
        "seconds": seconds,
        "tokens_per_second": {model: _median_speed(output, model) for model in (BASE, LONG)},
        "losses": losses,
        "findings": measured,
        "checks": checks,
        "export": check,
        "read": _read(output),
        "settings": {model: _record(output, model)["settings"] for model in (BASE, LONG)},
        "data": _data(output),
        "versions": versions(),
    }
    write_json(output / "summary.json", summary)
    (output / "summary.md").write_text(markdown(summary), encoding="utf-8")
    print(markdown(summary), flush=True)
    return 0 if all(checks.values()) else 1


def _compare(output: Path) -> tuple[list[PositionRow], dict[str, SuiteResult], dict[str, Any]]:
    held_out = str(output / "data" / "corpus_holdout")
    corpus = open_corpus(held_out)
    edges = np.arange(0, LONG_LENGTH + 1, BIN)
    rows: list[PositionRow] = []
    found: dict[str, SuiteResult] = {}
    tokenizer = AutoTokenizer.from_pretrained(output / "data" / "tokenizer")
    for name in (BASE, LONG):
        model, config, _ = load_model(output / name, seq_length=LONG_LENGTH + TARGETS)  # and room for an answer
        rows += loss_by_position(model, corpus, edges=edges, max_windows=MAX_WINDOWS, name=name).rows(name)
        with evaluating(model):
            read = MCoreCausalModel(model, vocab_size=config.vocab_size, max_length=LONG_LENGTH + TARGETS)
            found[name] = Suite(parse_tasks(tasks(held_out)), tokenizer=tokenizer).run(read, name=name)
            read.release()
        if found[name].errors:
            raise RuntimeError(f"{name} could not be measured: {found[name].errors}")
    return rows, found, _check_export(output / "hf", model, corpus)


def _check_export(directory: Path, model: torch.nn.Module, corpus: Any) -> dict[str, Any]:
    """Compare the exported model in transformers with the live one, on real text, at every position of the long window."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(directory, **in_dtype(torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    document = int(np.argmax(np.asarray(corpus.lengths) >= LONG_LENGTH))
    tokens = torch.from_numpy(corpus.tokens(document, 0, LONG_LENGTH).astype(np.int64))[None]
    with torch.no_grad():
        theirs = exported(tokens).logits
        ours = model(tokens, torch.arange(LONG_LENGTH)[None], None).float()
    return {
        "directory": str(directory),
        "rope_theta": exported.config.rope_theta,
        "max_position_embeddings": exported.config.max_position_embeddings,
        "vocab_size": exported.config.vocab_size,
        "tokenizer": type(tokenizer).__name__,
        "positions_compared": LONG_LENGTH,
        "max_abs_logit_difference": float((theirs - ours).abs().max()),
    }


def _training_rows(output: Path) -> tuple[list[dict[str, Any]], int]:
    """Both runs' rows on one clock, the long run's tokens after the base run's; and where it begins."""
    base, long = (read_training_log(output / name / "results" / "training.csv") for name in (BASE, LONG))
    switch = max(row["tokens"] for row in base)
    after = [{**row, "tokens": row["tokens"] + switch} for row in long]
    return [{"run": BASE, **row} for row in base] + [{"run": LONG, **row} for row in after], switch


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(["run", *training_columns(rows)]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def _mean(rows: list[PositionRow], model: str, start: int, end: int) -> float:
    inside = [row for row in rows if row.model == model and start <= row.start and row.end <= end]
    return sum(row.loss * row.tokens for row in inside) / sum(row.tokens for row in inside)


def _median_speed(output: Path, model: str) -> float:
    rows = read_training_log(output / model / "results" / "training.csv")
    return float(np.median([row["tokens_per_second"] for row in rows if "tokens_per_second" in row]))


def _record(output: Path, model: str) -> Any:
    return json.loads((output / model / "results" / "settings.json").read_text())


def _read(output: Path) -> dict[str, Any]:
    """What each model read: tokens, sources with their shares, and the run behind whose documents it began."""
    found = {}
    for name in (BASE, LONG):
        data = _record(output, name)["recipe"]["data"]
        sources = {str(source["path"]): source["weight"] for source in data["mix"]["sources"]}
        tokens = read_training_log(output / name / "results" / "training.csv")[-1]["tokens"]
        found[name] = {"tokens": tokens, "sources": sources, "after": data.get("after")}
    return found


def _data(output: Path) -> dict[str, Any]:
    corpus = open_corpus(str(output / "data" / "corpus"))
    keys = ("documents", "tokens", "tokenizer", "seed")
    return {"fingerprint": corpus.fingerprint(), **{key: corpus.provenance[key] for key in keys if key in corpus.provenance}}
