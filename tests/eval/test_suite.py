import json
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.eval import suite as suite_module
from nemo_longctx.eval.config import EvalConfig
from nemo_longctx.eval.guard import GuardConfig
from nemo_longctx.eval.hf import HFCausalModel
from nemo_longctx.eval.requests import Score
from nemo_longctx.eval.results import as_record, from_record
from nemo_longctx.eval.scoring import token_losses
from nemo_longctx.eval.suite import (
    HarnessResult,
    InterruptedEvaluationError,
    Suite,
    choose_documents,
    corpus_texts,
    longest_input,
    parse_tasks,
    read_texts,
)
from nemo_longctx.eval.truncation import TruncationRecord
from nemo_longctx.report.evaluation import read_results, write_results
from nemo_longctx.report.html import Section, write_page


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    prefix, rng = tmp_path_factory.mktemp("corpus") / "held_out", np.random.default_rng(0)
    documents = [rng.integers(0, 101, n) for n in (30, 60, 41, 41, 200, 5)]
    with CorpusWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix), documents


def test_loss_by_position_is_that_of_each_document(corpus, llama):
    prefix, documents = corpus
    tasks = parse_tasks([{"kind": "position", "corpus": prefix, "seq_length": 40, "documents": 4, "bins": 4, "guard": True}])
    model = HFCausalModel(llama)
    result = Suite(tasks).run(model, name="tiny", quiet=True)
    losses = np.stack([token_losses(model, documents[i][:41].tolist()) for i in (1, 2, 3, 4)])
    rows = result.position["position_40"]
    np.testing.assert_allclose([row.loss for row in rows], losses.reshape(4, 4, 10).mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(result.watched["loss_position_40"], losses.mean(1), rtol=1e-5)
    assert result.scalars()["position_40/loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_loss_on_answers_is_that_of_each_answer_behind_its_prompt(tmp_path, caplog):
    words = ["the ship sailed north", "letters and ice", "whales"]
    tokenizer = byte_tokenizer(words)
    llama = tiny_llama(vocab=len(tokenizer))
    written = "{{ ('Q' if m.role == 'user' else '') + m.content + ('</s>' if m.role == 'assistant' else '') }}"
    template = "{% for m in messages %}" + written + "{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    file = tmp_path / "held_out.jsonl"
    talks = [[("the ship", "ice")], [("whales", "north"), ("and", "letters")], [("ice " * 200, "ice")]]
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": r, "content": c} for turn in talk for r, c in zip(roles, turn, strict=True)]} for talk in talks
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"kind": "answers", "conversations": str(file), "template": str(tmp_path / "template.jinja"), "guard": True}
    model = HFCausalModel(llama, max_length=100)
    result = Suite(parse_tasks([block]), tokenizer=tokenizer).run(model, name="tiny", quiet=True)
    expected = []
    for talk in talks[:2]:  # the third is longer than the model reads
        text, losses = "", []
        for question, answer in talk:
            before = len(tokenizer(text + "Q" + question)["input_ids"])
            text += "Q" + question + answer + "</s>"
            losses.extend(token_losses(model, tokenizer(text)["input_ids"])[before - 1 :])
        expected.append(np.mean(losses))
    assert result.errors == {}
    np.testing.assert_allclose(result.watched["loss_answers"], expected, rtol=1e-4)
    assert result.tasks["answers"]["loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert result.tasks["answers"]["samples"] == 2
    assert "answers: 1 of 3 conversations are longer than the model's 100 tokens and are left out" in caplog.text
    assert from_record(as_record(result)).watched == result.watched
    assert write_results(tmp_path / "out", [result], provenance={}).exists()


def test_documents_are_chosen_long_enough_first():
    lengths = np.array([5, 100, 1, 50, 80, 90])
    assert choose_documents(lengths, 50, 2).tolist() == [1, 5]
    assert choose_documents(lengths, 85, 3).tolist() == [1, 4, 5]
    assert choose_documents(lengths, 1000, 9).tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(ValueError, match="no document"):
        choose_documents(np.array([1, 1]), 10, 2)


def test_an_error_in_one_task_leaves_the_others(corpus, llama, tmp_path):
    prefix, _ = corpus
    blocks = [
        {"kind": "position", "corpus": prefix + "_missing", "seq_length": 20},
        {"kind": "position", "corpus": prefix, "seq_length": 30, "documents": 2},
        {"kind": "position", "corpus": prefix, "seq_length": 900, "documents": 1},
    ]
    suite = Suite(parse_tasks(blocks))
    result = suite.run(HFCausalModel(llama, max_length=100), name="tiny", quiet=True)
    assert set(result.position) == {"position_30"}
    assert "held_out_missing" in result.errors["position_20"]
    assert "the model reads 100" in result.errors["position_900"]
    # A task that took longer than the whole budget last time is not begun again.
    suite.took["position_30"] = 1e9
    again = suite.run(HFCausalModel(llama, max_length=100), name="later", quiet=True, time_budget=60)
    assert again.skipped == ["position_30"]
    write_results(tmp_path, [result, again], provenance={"seed": 1})
    assert [as_record(r) for r in read_results(tmp_path)] == [as_record(result), as_record(again)]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "held_out_missing" in page
    assert (tmp_path / "loss_by_position_30.csv").exists()


def test_probes_and_tables(corpus, tmp_path):
    text = "The smith opened his door to the street before six. Nobody had ever seen such a machine at work! " * 10
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    tokenizer = byte_tokenizer([text])
    probes = {"kinds": ["passkey", "first_sentence"], "lengths": [300, 400], "depths": [0.0, 1.0], "samples": 1}
    tasks = parse_tasks([{"kind": "probes", "text": str(tmp_path / "text.jsonl"), "probes": probes}])
    assert longest_input(tasks) > 400
    model = HFCausalModel(tiny_llama(vocab=len(tokenizer), length=600))
    result = Suite(tasks, tokenizer=tokenizer).run(model, name="a", quiet=True)
    assert not result.errors
    assert len(result.probes) == 6
    assert from_record(json.loads(json.dumps(as_record(result)))) == result
    page = write_results(tmp_path / "out", [result], provenance={})
    assert page.read_text(encoding="utf-8").count("data:image/png;base64,") == 2
    with pytest.raises(ConfigError, match=r"eval\.tokenizer"):
        Suite(tasks)


def test_tasks_of_one_name_are_told_apart_by_a_label(corpus, llama):
    prefix, _ = corpus
    block = {"kind": "position", "corpus": prefix, "seq_length": 20, "documents": 2, "bins": 2}
    asked = {"kind": "lm_eval", "tasks": ["a", "b"]}
    with pytest.raises(ConfigError, match=r"position_20.*label"):
        Suite(parse_tasks([block, block]))
    tasks = parse_tasks([block, block | {"label": "books"}, asked, asked | {"label": "4096"}])

    def harness(task):
        return HarnessResult(tasks={task.tasks[0]: {"f1": len(task.label)}})

    suite = Suite(tasks, tokenizer="not used here")
    result = suite.run(HFCausalModel(llama), name="x", quiet=True, harness=harness)
    assert set(result.position) == {"position_20", "position_books_20"}
    assert {name: values["f1"] for name, values in result.tasks.items()} == {"a": 0, "b": 0, "a@4096": 4, "b@4096": 4}


def test_time_left_is_told_from_the_speed_seen_so_far(corpus, llama):
    prefix, _ = corpus
    block = {"kind": "position", "corpus": prefix, "seq_length": 30, "documents": 2}
    first, long = parse_tasks([block, block | {"seq_length": 40, "documents": 10**9}])
    suite = Suite([first, long])
    assert suite.expected_seconds(long) == 0  # nothing is known yet
    result = suite.run(HFCausalModel(llama), name="x", quiet=True, time_budget=3600)
    assert set(result.position) == {"position_30"}
    assert result.skipped == ["position_40"]  # forty thousand million tokens


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kind": "positon"}, "did you mean 'position'"),
        ({"kind": "position", "corpus": "x"}, r"eval\.tasks\[0\]\.seq_length"),
        ({"kind": "position", "corpus": "x", "seq_length": 4, "document": 3}, "did you mean 'documents'"),
        ({"kind": "probes", "text": "x", "probes": {"depth": [0]}}, "did you mean 'depths'"),
        ({"kind": "lm_eval", "tasks": []}, "list of lm-eval task names"),
        ({"kind": "lm_eval", "tasks": ["a", None]}, "each is the name"),
        ({"kind": "lm_eval", "tasks": ["a"], "limit": -1}, "eval.limit=-1"),
        ({"kind": "lm_eval", "tasks": ["a"], "num_fewshot": -1}, "eval.num_fewshot=-1"),
        ({"kind": "lm_eval", "tasks": ["a"], "metadata": 3}, "eval.metadata=3"),
        ({"kind": "probes", "text": "x", "probes": 5}, r"eval\.tasks\[0\]\.probes=5: takes keys of its own"),
        ({"kind": ["position"]}, "unknown kind"),
        ("position", r"eval\.tasks\[0\]='position': give a block"),
        (None, r"eval\.tasks\[0\]=None: give a block"),
    ],
)
def test_blocks_are_checked(block, message):
    with pytest.raises(ConfigError, match=message):
        parse_tasks([block])


def test_probes_in_the_text_of_a_corpus(tmp_path):
    text = "The smith opened his door to the street before six. Nobody had ever seen such a machine at work! "
    tokenizer = byte_tokenizer([text])
    with CorpusWriter(tmp_path / "held_out", np.uint16) as writer:
        for _ in range(9):
            writer.add_document(np.array([*tokenizer.encode(text), tokenizer.eos_token_id]))
    assert corpus_texts(str(tmp_path / "held_out"), tokenizer, 1) == [text]
    assert corpus_texts(str(tmp_path / "held_out"), tokenizer, 10**9) == [text] * 9


@pytest.mark.parametrize(
    "block",
    [
        {"kind": "position", "corpus": "P", "seq_length": 20},
        {"kind": "context", "corpus": "P", "contexts": [8, 16], "targets": 2},
        {"kind": "probes", "text": "P", "probes": {"kinds": ["passkey"], "lengths": [200], "samples": 1}},
    ],
    ids=lambda block: block["kind"],
)
def test_a_corpus_of_another_tokenizer_is_an_error_of_its_task(block, corpus, llama, monkeypatch):
    prefix, _ = corpus

    tokenizer = types.SimpleNamespace(bos_token_id=None)

    def refuse(opened, given):
        assert (opened.prefix, given) == (prefix, tokenizer)
        raise ConfigError("corpus", prefix, "its tokens are of another tokenizer")

    monkeypatch.setattr(suite_module, "check_ids", refuse)
    suite = Suite(parse_tasks([{key: prefix if value == "P" else value for key, value in block.items()}]), tokenizer=tokenizer)
    (why,) = suite.run(HFCausalModel(llama), name="x", quiet=True).errors.values()
    assert "its tokens are of another tokenizer" in why


CONF = Path(__file__).parents[2] / "conf" / "eval"


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_a_suite(file):
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert values.keys() <= {"tasks", "every", "at_start", "at_end", "time_budget", "guard", "max_length", "results_cache"}
    tasks = parse_tasks(values["tasks"])
    assert len(tasks) == len(values["tasks"])
    build(GuardConfig, values.get("guard"))
    assert not values.get("max_length") or longest_input(tasks) <= values["max_length"]


def test_texts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": 1}\n', encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["plain"]
    for text, said in (
        ('{"body": 1}\n', "line 1 has no text in a field 'text'; it has body"),
        ('{"text": "a"}\n\n[1]\n', "line 3 has no text in a field 'text'; it is a list"),
        ('{"text": "a"}\n{bad\n', "line 2 is not JSON"),
        ("", "b.jsonl holds no text"),
    ):
        (tmp_path / "b.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read_texts(tmp_path / "b.jsonl")


def test_pages_escape_what_they_show(tmp_path):
    page = write_page(tmp_path / "p.html", "<b>", [Section(heading="a & b", table=[["<i>", 1.23456], ["x", 2]])])
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;" in text
    assert "<i>" not in text
    assert "1.235" in text


POSITION = {"kind": "position", "corpus": "c", "seq_length": 40, "documents": 3}
CONTEXT = {"kind": "context", "corpus": "c", "contexts": [10, 30], "targets": 5, "documents": 2, "blocks": 3}
PROBES = {"kind": "probes", "text": "t", "probes": {"kinds": ["needle", "first_sentence"], "lengths": [100, 50],
          "depths": [0.0, 0.5, 1.0], "samples": 2, "max_new_tokens": 200}}  # fmt: skip


def test_the_longest_input_and_the_tokens_of_each_kind_of_task():
    short = PROBES | {"probes": {"lengths": [100, 50], "max_new_tokens": 3}}
    for blocks, longest in (
        ([POSITION], 41), ([CONTEXT], 35), ([PROBES], 300), ([short], 228), ([POSITION, CONTEXT], 41), ([], 0),
        ([{"kind": "lm_eval", "tasks": ["a"]}], 0), ([POSITION, PROBES], 300),
    ):  # fmt: skip
        assert longest_input(parse_tasks(blocks)) == longest
    tasks = parse_tasks([POSITION, CONTEXT, PROBES, {"kind": "answers", "conversations": "x"}])
    suite = Suite(tasks, tokenizer="none")
    assert [suite.expected_seconds(task) for task in tasks] == [0, 0, 0, 0]
    suite.rate = 10.0
    assert [suite.expected_seconds(task) for task in tasks] == [12.0, 2 * 3 * (15 + 35) / 10, (3 + 1) * 2 * 150 / 10, 0.0]
    suite.took["probes"] = 4.5
    assert suite.expected_seconds(tasks[2]) == 4.5


def test_names_hold_what_tells_tasks_apart():
    answers = {"kind": "answers", "conversations": "x"}
    blocks = [POSITION, POSITION | {"label": "b"}, CONTEXT, CONTEXT | {"label": "b"}, PROBES, answers, answers | {"label": "b"}]
    names = [task.name for task in parse_tasks([*blocks, {"kind": "lm_eval", "tasks": ["a", "c"], "label": "b"}])]
    assert names == [
        "position_40", "position_b_40", "context_30", "context_b_30", "probes", "answers", "answers_b", "a+c@b",
    ]  # fmt: skip
    assert parse_tasks([CONTEXT])[0].short == 10


def test_a_guard_needs_a_task_to_watch():
    watched = EvalConfig(tasks=(POSITION | {"guard": True}, CONTEXT), guard=GuardConfig())
    assert [task.name for task in watched.tasks] == ["position_40", "context_30"]
    with pytest.raises(ConfigError, match=r"no task is watched: set guard: true in at least one"):
        EvalConfig(tasks=(POSITION, CONTEXT), guard=GuardConfig())
    assert EvalConfig(guard=GuardConfig()).guard
    with pytest.raises(ConfigError, match=r"eval\.tasks='position_40': two tasks of this name; give each a `label`"):
        EvalConfig(tasks=(POSITION, CONTEXT, POSITION))
    with pytest.raises(ConfigError, match=r"eval\.at_end=False: nothing is then measured at any time"):
        EvalConfig(tasks=(POSITION,), at_start=False, at_end=False)
    for when in ({"at_start": True}, {"at_end": True}, {"every": 1}):
        EvalConfig(tasks=(POSITION, POSITION | {"label": "b"}), **{"at_start": False, "at_end": False, **when})
    EvalConfig(at_start=False, at_end=False)
    for blocks in ("position", {"kind": "position"}, 5):
        with pytest.raises(ConfigError, match=r"eval\.tasks=.*must be a list of blocks"):
            parse_tasks(blocks)


def test_an_evaluation_that_is_asked_to_leave_keeps_nothing_and_each_task_has_its_seconds(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(suite_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    suite = Suite(parse_tasks([{"kind": "lm_eval", "tasks": ["a", "b"]}]), tokenizer="none")
    began = []

    def harness(task):
        began.append(task.name)
        cut = TruncationRecord(task=task.name, doc_id=1, policy="left", tokens=9, removed=1, lost=())
        return HarnessResult(tasks={task.name: {"f1": 1.0}}, truncations=[cut], watched={f"{task.name}/f1": [1.0]})

    result = suite.run(None, name="m", harness=harness, interrupted=lambda: False)
    assert (result.seconds, suite.took) == ({"a": 10, "b": 10}, {"a": 10, "b": 10})
    assert [cut.task for cut in result.truncations] == ["a", "b"]
    assert result.watched == {}  # without guard: true
    with pytest.raises(InterruptedEvaluationError):
        suite.run(None, name="m", harness=harness, interrupted=lambda: len(began) > 2)
    assert began == ["a", "b", "a"]
    assert suite.run(None, name="m", harness=harness, time_budget=20).skipped == ["b"]  # 10 gone, and 10 expected: on time
    without = suite.run(None, name="m")
    assert "lm-eval tasks need lm-eval: pip install nemo-longctx[eval]" in without.errors["a"]
    labelled = parse_tasks([{"kind": "lm_eval", "tasks": ["a"], "label": "4k", "guard": True}])
    found = Suite(labelled, tokenizer="none").run(None, name="m", harness=lambda task: harness(parse_tasks([task])[0]))
    assert [*found.tasks, *found.watched, found.truncations[0].task] == ["a@4k@4k", "a@4k/f1@4k", "a@4k@4k"]


def test_answers_are_means_of_their_tokens_and_right_where_all_are(tmp_path, monkeypatch):
    """Five talks, one too long; three of the four are asked, evenly spaced; each has two answers."""
    sizes = [6, 7, 30, 8, 9]
    monkeypatch.setattr(suite_module, "chat_template", lambda *_: "t")
    monkeypatch.setattr(suite_module, "read_conversations", lambda _: range(5))
    roles = {n: np.full(size, suite_module.PROMPT) for n, size in enumerate(sizes)}
    for role in roles.values():
        role[[2, 4, 5]] = suite_module.PROMPT + 1  # an answer of one token, and one of two
    monkeypatch.setattr(suite_module, "encode_conversation", lambda *a: (np.arange(sizes[a[2]]) + 10 * a[2], roles[a[2]]))
    asked = []

    def run(self, requests, *_):
        asked.extend(requests)
        logs = [[-1.0], [-2.0, -3.0], [-4.0], [-1.0, -1.0], [-3.0], [-3.0, -3.0]]
        greedy = [True, True, True, False, False, True]
        return [Score(token_log_probs=np.array(log, np.float32), is_greedy=g) for log, g in zip(logs, greedy, strict=True)]

    monkeypatch.setattr(Suite, "_run", run)
    block = {"kind": "answers", "conversations": "x", "samples": 3, "guard": True}
    result = Suite(parse_tasks([block]), tokenizer="none").run(types.SimpleNamespace(max_length=9), name="m", quiet=True)
    assert [(list(one.context), list(one.continuation)) for one in asked[:2]] == [([0, 1], [2]), ([0, 1, 2, 3], [4, 5])]
    assert [one.context[0] for one in asked[::2]] == [0, 30, 40]
    losses = [2.0, 2.0, 3.0]
    assert result.watched == {"loss_answers": losses, "answers/right": [1.0, 0.0, 0.0]}
    values = {"loss": np.mean(losses), "loss_stderr": np.std(losses, ddof=1) / 3**0.5, "right": 1 / 3, "samples": 3}
    assert result.tasks["answers"] == pytest.approx(values)
    none = Suite(parse_tasks([block]), tokenizer="none").run(types.SimpleNamespace(max_length=5), name="m", quiet=True)
    assert none.errors["answers"] == "ValueError: no conversation fits 5 tokens; the shortest has 6"


def test_a_corpus_of_just_enough_long_documents_is_drawn_from_them_alone():
    assert choose_documents(np.array([9, 5, 9, 9]), 9, 3).tolist() == [0, 2, 3]
    assert choose_documents(np.array([9, 5, 9, 2, 1]), 9, 4).tolist() == [0, 1, 2, 3]
    assert choose_documents(np.array([3, 3, 3]), 9, 2).tolist() == [0, 1]  # of equals the first
