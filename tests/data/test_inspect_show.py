"""`inspect --show`: a window's parts are the documents whose tokens it holds; a report comes before its picture."""

import json
import os
from itertools import pairwise

import numpy as np
import pytest
from tiny_models import byte_tokenizer

from nemo_longctx.cli import main
from nemo_longctx.config import build
from nemo_longctx.data import show
from nemo_longctx.data.best_fit import pack_windows
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.mixture import Documents, MixConfig, plan_mix
from nemo_longctx.data.order import Order, build_order
from nemo_longctx.data.show import show_windows
from nemo_longctx.data.writer import CorpusWriter


def windows_of(prefixes, directory, packing):
    mix = build(MixConfig, {"sources": [{"path": prefix} for prefix in prefixes]})
    documents = Documents.open(mix)
    curriculum = Curriculum.constant(seq_length=64, global_batch_size=1, total_steps=12)
    with open(directory / "order", "wb") as file:
        build_order(documents, plan_mix(mix, documents, curriculum.total_tokens), curriculum, seed=1, file=file)
    order = Order(str(directory / "order"), documents, share_tolerance=1.0)
    return pack_windows(order, curriculum, packing=packing, seed=1, document_masking=True)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_the_parts_of_a_window_are_the_tokens_that_it_holds(telling_corpora, tmp_path, packing):
    prefixes = telling_corpora([[100, 7, 30, 64, 200, 3, 90], [31, 5, 128, 40, 60, 61]])
    windows = windows_of(prefixes, tmp_path, packing)
    for number in range(len(windows)):
        documents, starts, sizes = windows.stages[0].parts(number)
        held = [1000 * int(d) + np.arange(start, start + size) for d, start, size in zip(documents, starts, sizes, strict=True)]
        sample = windows[number]
        whole = np.concatenate(held)
        assert sample["tokens"][: len(whole)].tolist() == whole.tolist()
        assert not sample["loss_mask"][len(whole) :].any()
        lines = list(show_windows(windows, None, first=number, count=1))
        assert sum(line.startswith("--- source") for line in lines) == len(documents)


@pytest.mark.parametrize(
    ("lengths", "size", "shown"),
    [([7, 13], 20, [0, 1, 5, 6, 7, 8, 18, 19]), ([3], 10, [0, 1, 2, 3, 4, 8, 9]), ([30], 20, [0, 1, 18, 19])],
)
def test_tokens_are_listed_around_ends_and_seams(monkeypatch, lengths, size, shown):
    monkeypatch.setattr(show, "_AROUND", 2)
    assert show._listed([("s", "p", 0, 0, length) for length in lengths], size) == shown


@pytest.fixture
def corpus(tmp_path):
    tokenizer = byte_tokenizer(["the old dog runs over long hills"])
    tokenizer.save_pretrained(tmp_path / "tok")
    for name in ("books", "web"):
        with CorpusWriter(str(tmp_path / name), np.uint16) as writer:
            for number in range(12):
                writer.add_document([*tokenizer.encode(f"{name} number {number} " * 3), tokenizer.eos_token_id])
    return tmp_path


def test_the_report_of_a_corpus_that_may_only_be_read_comes_without_its_picture(corpus, capsys, monkeypatch):
    def refused(*arguments):
        raise PermissionError(13, "Permission denied", "books.lengths.png")

    monkeypatch.setattr("nemo_longctx.report.lengths.plot_lengths", refused)  # root may write anywhere
    assert main(["inspect", str(corpus / "books")]) == 0
    captured = capsys.readouterr()
    assert "books: 12 documents" in captured.out
    assert "no figure" in captured.err
    assert main(["inspect", str(corpus / "books"), "--figure", os.devnull + "/x.png"]) != 0
    assert "books: 12 documents" in capsys.readouterr().out


def test_windows_from_a_token_on_that_hold_a_source_are_printed(tmp_path, capsys):
    for name in ("books", "web"):
        with CorpusWriter(str(tmp_path / name), np.uint16) as writer:
            for _ in range(12):
                writer.add_document(np.arange(30))
    common = ["inspect", str(tmp_path / "books"), str(tmp_path / "web"), "--seq-length", "64", "--no-figure"]
    assert main([*common, "--show", "1", "--at", "200", "--source", "web"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("window 3 (stage 0, 64 tokens, 64 count for the loss)")
    assert f"--- web: document 2 of {tmp_path / 'web'}, from its token 0, 30 tokens ---" in out
    assert main([*common, "--at", "200"]) == 2
    assert "no effect without --show" in capsys.readouterr().err
    assert main([*common, "--show", "1", "--source", "wbe"]) == 2
    assert "did you mean 'web'" in capsys.readouterr().err


def test_windows_are_shown_with_their_text(corpus, capsys):
    common = ["inspect", str(corpus / "books"), "--seq-length", "64", "--no-figure", "--show", "1"]
    assert main([*common, "--tokenizer", str(corpus / "tok")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = 0
    for heading, text in pairwise(lines):
        if heading.startswith("--- books: document ") and "from its token 0," in heading:
            document = int(heading.split("document ")[1].split(" ")[0])
            text = text.partition("<")[0]  # the token that ends it
            assert len(text) > 5
            assert (f"books number {document} " * 3).startswith(text)
            shown += 1
    assert shown
    assert "\033" not in "".join(lines)  # no colours into a file
    windows = windows_of([str(corpus / "books")], corpus, "best_fit")
    painted = "".join(show_windows(windows, None, first=0, count=1, colour=True))
    assert "\033[1mwindow 0" in painted
    assert "\033[31m" in painted  # of what does not count for the loss


@pytest.mark.parametrize(("weight", "prompts"), [(None, "0"), ("0.25", "0.25")])
def test_conversations_are_shown_with_their_loss_weights(corpus, capsys, weight, prompts):
    turns = [("user", "Where is the dog?"), ("assistant", "On the hills."), ("user", "Why?"), ("assistant", "It runs.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (corpus / "chats.jsonl").write_text((json.dumps(row) + "\n") * 3)
    options = ["--tokenizer", str(corpus / "tok"), "--chat-template", "llama2"]
    options += ["--prompt-loss-weight", weight] if weight else []
    assert main(["inspect", str(corpus / "chats.jsonl"), "--show", "1", "--at", "2", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"instance 2 of {corpus / 'chats.jsonl'}")
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith("---")] == ["--- prompt", "--- answer"] * 2
    assert f"each counts {prompts} ---" in out
    assert out.index("Where is the dog?") < out.index("On the hills.") < out.index("It runs.")
    rows = [line.split() for line in out.splitlines() if line.startswith("  ") and line.split()[0].isdigit()]
    assert {loss for *_, loss in rows} == {prompts, "1"}
    assert main(["inspect", str(corpus / "chats.jsonl"), "--show", "1", "--at", "3", *options]) == 2
    assert "has 3 conversations" in capsys.readouterr().err
    (corpus / "empty.jsonl").write_text("")
    assert main(["inspect", str(corpus / "empty.jsonl"), "--show", "1", *options]) == 2
    assert "has 0 conversations" in capsys.readouterr().err
    assert main(["inspect", str(corpus / "chats.jsonl")]) == 2
    assert "--show N --tokenizer" in capsys.readouterr().err
