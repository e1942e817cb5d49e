"""Tasks through lm-eval's own evaluator and our model: shots, metadata, guard, truncation, groups."""

import argparse
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from published import BOLD, QMSUM, STORY, needs_qmsum, published
from tiny_models import byte_tokenizer, tiny_llama

pytest.importorskip("lm_eval")
import datasets
import lm_eval

from nemo_longctx.adapters import harness
from nemo_longctx.adapters.harness import TASK_FOLDER, load_tasks, run_harness
from nemo_longctx.adapters.lm_eval import LongContextLM
from nemo_longctx.adapters.shots import _same_document
from nemo_longctx.capability import has_module
from nemo_longctx.config import ConfigError
from nemo_longctx.eval.guard import LOWER
from nemo_longctx.eval.hf import HFCausalModel
from nemo_longctx.eval.requests import Score
from nemo_longctx.eval.suite import HarnessTask
from nemo_longctx.eval.tasks import functions, loaders
from nemo_longctx.eval.truncation import UNSCORED


def tiny_lm(texts, length, **more):
    tokenizer = byte_tokenizer(texts, **more)
    return LongContextLM(HFCausalModel(tiny_llama(vocab=len(tokenizer), length=length)), tokenizer=tokenizer)


@needs_qmsum
def test_qmsum_runs_one_shot_through_the_model(tmp_path):
    # Meetings cut to a few turns, so that a tiny model reads a shot and a sample whole.
    lines = [json.loads(line) for line in QMSUM.read_text(encoding="utf-8").splitlines()[:3]]
    for line in lines:
        line["meeting_transcripts"] = line["meeting_transcripts"][:4]
        line["specific_query_list"] = line["specific_query_list"][:1]
    file = tmp_path / "qmsum.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    lm = tiny_lm([json.dumps(line) for line in lines], 4096)
    task = HarnessTask(tasks=("longctx_qmsum",), limit=4, metadata={"data": str(file), "splits": "train validation"})
    (one,) = load_tasks(task)["tasks"].values()
    prompt = one.fewshot_context(
        next(iter(one.validation_docs() if one.has_validation_docs() else one.test_docs())), num_fewshot=1
    )
    assert prompt.count("\nA:") == 2
    found = run_harness(task, lm)
    results, watched = found.tasks, found.watched
    assert 0 <= results["longctx_qmsum"]["rouge_geo"] < 0.5
    assert results["longctx_qmsum"]["not_scored"] == 0
    assert len(watched["longctx_qmsum/rouge_geo"]) == 4


def scrolls_file(path, source, documents, questions):
    """Rows of one local file: several questions about each document, every answer a word of its own."""
    rows = []
    for document in range(documents):
        for number in range(questions):
            made = published(source)
            head, _, rest = made["input"].partition("?")
            text = f"{head} {document}-{number}?{rest} Night {document}."
            rows.append(made | {"id": f"{document}-{number}", "input": text, "output": f"answer-{document}-{number}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"data": str(path)}


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"id": "1", "context": "a"}, True), ({"id": "1", "context": "b"}, True), ({"id": "2", "context": "a"}, True),
        ({"id": "2", "context": "b"}, False), ({"id": "2", "context": ""}, False),
    ],
)  # fmt: skip
def test_a_row_is_of_the_sample_s_document_by_its_name_or_its_text(row, same):
    assert _same_document(row, {"id": "1", "context": "a"}) is same
    assert _same_document({"id": "2", "context": ""}, {"id": "1", "context": ""}) is False  # rows without a document are many


@pytest.mark.parametrize("source", ["qasper", "quality", "qmsum"])
def test_shots_never_show_the_samples_own_document(source, tmp_path):
    """One local file serves for the shots and for the samples."""
    metadata = scrolls_file(tmp_path / "local.jsonl", source, documents=3, questions=4)
    (one,) = load_tasks(HarnessTask(tasks=(f"longctx_{source}",), metadata=metadata))["tasks"].values()
    shots = one.config.num_fewshot
    assert len(one.eval_docs) == 12
    for sample in one.eval_docs:
        prompt = one.fewshot_context(sample, num_fewshot=shots)
        assert sample["answers"][0] not in prompt
        assert prompt.count("answer-") == shots
        assert prompt.count(f"Night {sample['id'][0]}.") == 1


def test_one_document_leaves_nothing_to_show(tmp_path):
    metadata = scrolls_file(tmp_path / "local.jsonl", "qasper", documents=1, questions=4)
    with pytest.raises(ConfigError, match="num_fewshot=2: the data has 0 rows of other documents"):
        run_harness(HarnessTask(tasks=("longctx_qasper",), metadata=metadata), tiny_lm([STORY], 4096))


def test_shots_of_another_split_are_of_that_split(data):
    metadata = {"data": str(data / "scrolls")}
    (one,) = load_tasks(HarnessTask(tasks=("longctx_qasper",), metadata=metadata))["tasks"].values()
    prompt = one.fewshot_context(one.eval_docs[0], num_fewshot=2)
    assert prompt.count("train") == 2
    assert prompt.count("validation") == 1
    assert {row["split"] for row in one.eval_docs} == {"validation"}


ONE_BY_ONE = sorted(p.stem for p in Path(TASK_FOLDER).glob("*.yaml") if "group:" not in p.read_text(encoding="utf-8"))


def test_every_task_file_is_there():
    kinds = ("longctx_bold_", "longctx_", "zeroscrolls_", "leval_")
    counts = Counter(next(kind for kind in kinds if name.startswith(kind)) for name in ONE_BY_ONE)
    assert counts == {"longctx_": 4, "longctx_bold_": 5, "zeroscrolls_": 10, "leval_": 6}
    shots = {}
    for name in ("narrativeqa", "qasper", "quality", "qmsum"):
        text = (Path(TASK_FOLDER) / f"longctx_{name}.yaml").read_text(encoding="utf-8").replace("!function", "")
        shots[name] = yaml.safe_load(text)["num_fewshot"]
    assert shots == {"narrativeqa": 0, "qasper": 2, "quality": 2, "qmsum": 1}  # Xiong et al. 2023, section 4.1


def own_task(folder, name, metrics):
    """A task that a user wrote over a local file, with these metrics."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"Is {n} odd?", "a": n % 2}) + "\n" for n in range(4)), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "metric_list": metrics,
    }
    return task, folder / f"{name}.yaml"


def test_the_guard_watches_what_is_a_score_with_its_direction(data, tmp_path):
    lm = tiny_lm([STORY], 4096)
    metadata = {"data": str(data / "scrolls")}
    watched = run_harness(HarnessTask(tasks=("longctx_qmsum",), limit=2, guard=True, metadata=metadata), lm).watched
    assert set(watched) == {"longctx_qmsum/rouge_geo"}  # each sample's own, and no count of what was not scored
    assert all(0 <= value <= 1 for value in watched["longctx_qmsum/rouge_geo"])
    task, file = own_task(tmp_path, "my_rolling", [{"metric": "word_perplexity"}])
    task |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"}
    file.write_text(yaml.safe_dump(task))
    watched = run_harness(HarnessTask(tasks=("my_rolling",), include_path=str(tmp_path), guard=True), lm).watched
    assert set(watched) == {f"my_rolling/word_perplexity/{LOWER}"}
    assert len(watched[f"my_rolling/word_perplexity/{LOWER}"]) == 4


def test_a_guard_with_nothing_to_watch_is_an_error(tmp_path):
    task, file = own_task(tmp_path, "my_f1", [{"metric": "f1"}])
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "a"}
    file.write_text(yaml.safe_dump(task))
    guarded = HarnessTask(tasks=("my_f1",), include_path=str(tmp_path), guard=True)
    with pytest.raises(ConfigError, match=r"eval\.guard='my_f1': no metric"):
        run_harness(guarded, tiny_lm([STORY], 4096))
    assert run_harness(replace(guarded, guard=False), tiny_lm([STORY], 4096)).watched == {}


def test_metadata_that_no_task_reads_is_an_error(data, tmp_path):
    task, file = own_task(tmp_path, "my_mc", [{"metric": "acc"}])
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "a"}
    file.write_text(yaml.safe_dump(task))
    with pytest.raises(ConfigError, match=r"eval\.metadata\.max_prompt=50: has no effect on my_mc"):
        load_tasks(HarnessTask(tasks=("my_mc",), include_path=str(tmp_path), metadata={"max_prompt": 50}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("max_promt", 300, "did you mean 'max_prompt'"),
        ("polcy", "middle", "did you mean 'policy'"),
        ("policy", "midle", "did you mean 'middle'"),
        ("max_prompt", 0, "at least 1"),
        ("max_prompt", "4k", "a whole number"),
        ("max_prompt", 8192, "the model reads 4096 tokens"),
    ],
)
def test_metadata_is_checked(data, key, value, said):
    task = HarnessTask(tasks=("longctx_qasper",), limit=1, metadata={"data": str(data / "scrolls"), key: value})
    with pytest.raises(ConfigError, match=rf"eval\.metadata\.{key}={value!r}: .*{said}"):
        run_harness(task, tiny_lm([STORY], 4096))


def test_the_models_own_limit_is_told_where_it_binds(data):
    lm = tiny_lm([STORY], 4096)
    task = HarnessTask(tasks=("longctx_qasper",), limit=1, metadata={"data": str(data / "scrolls")})
    assert run_harness(task, lm).tasks["longctx_qasper"]["prompt_limit"] == 4096 - 128  # of the paper's 16,384
    short = replace(task, metadata={**task.metadata, "max_prompt": 2048})
    assert "prompt_limit" not in run_harness(short, lm).tasks["longctx_qasper"]


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_every_task_runs_on_rows_as_published(name, data):
    if name.startswith("longctx_bold") and not has_module("vaderSentiment"):
        pytest.skip("the optional vaderSentiment is not installed")
    kind = "bold" if "bold" in name else name.split("_")[0]
    folder = data / {"longctx": "scrolls", "zeroscrolls": "zero"}.get(kind, kind)
    lm = tiny_lm([STORY], 4096)
    lm._stop = lambda until: lambda made: len(made) > 7  # a tiny model never comes to an end
    task = HarnessTask(tasks=(name,), limit=2, metadata={"data": str(folder)})
    results = run_harness(task, lm).tasks
    scores = {key: value for key, value in results[name].items() if key not in ("not_scored", "cut", "sample_len")}
    assert results[name]["not_scored"] == 0
    assert any(-1 <= value <= 1 for value in scores.values() if isinstance(value, float))


@pytest.mark.parametrize(("policy", "prompt", "lost"), [("left", 60, 0), ("left", 20, 2), ("keep_question", 60, 0)])
def test_truncation_is_recorded_and_lost_questions_are_not_scored(data, policy, prompt, lost):
    lm = tiny_lm([STORY], 4096, vocab=258)  # a token a letter
    metadata = {"data": str(data / "scrolls"), "max_prompt": prompt, "policy": policy}
    found = run_harness(HarnessTask(tasks=("longctx_narrativeqa",), limit=2, metadata=metadata), lm)
    results = found.tasks
    assert results["longctx_narrativeqa"]["cut"] == 2
    assert results["longctx_narrativeqa"]["not_scored"] == lost
    assert {record.policy for record in found.truncations} == {policy}
    assert [len(record.lost) for record in found.truncations] == [int(bool(lost))] * 2
    assert all(record.tokens - record.removed == prompt for record in found.truncations)
    assert math.isnan(results["longctx_narrativeqa"]["f1"]) == bool(lost)


CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"


@pytest.mark.parametrize(("task", "policy"), [("longctx_narrativeqa", "left"), ("leval_financial_qa", "keep_question")])
def test_a_long_prompt_keeps_bos_and_chat_header(task, policy, data):
    lm = tiny_lm([STORY], 4096, vocab=258)
    lm.tokenizer.chat_template, lm.add_bos_token = "<s>" + CHAT, None
    folder = data / ("scrolls" if task.startswith("longctx") else "leval")
    asked = []
    lm._run = lambda jobs, *_args, **_more: asked.extend(jobs) or [[1]] * len(jobs)
    metadata = {"data": str(folder), "max_prompt": 90, "policy": policy}
    run_harness(HarnessTask(tasks=(task,), limit=2, metadata=metadata, apply_chat_template=True), lm)
    for job in asked:
        assert len(job.context) == 90
        text = lm.tokenizer.decode(job.context)
        assert text.startswith("<s><|user|>")
        assert re.search(r"\nQ: .*\nA:\n<\|assistant\|>$", text)


def test_zeroscrolls_is_cut_at_the_end_of_its_document(data):
    lm = tiny_lm([STORY], 4096, vocab=258)
    asked = []
    lm._run = lambda jobs, *_args, **_more: asked.extend(jobs) or [[1]] * len(jobs)
    metadata = {"data": str(data / "zero"), "max_prompt": 100}
    run_harness(HarnessTask(tasks=("zeroscrolls_qasper",), limit=1, metadata=metadata), lm)
    text = lm.tokenizer.decode(asked[0].context)
    assert len(asked[0].context) == 100
    assert text.startswith("Answer the question.\n\nAnna found the key")
    assert text.endswith("...Question: Where was the key?\n\nAnswer:")


def test_bold_says_what_it_needs(tmp_path):
    (tmp_path / "gender.jsonl").write_text(json.dumps(BOLD) + "\n", encoding="utf-8")
    if has_module("vaderSentiment"):
        lost = functions.process_sentiment({"prompt": "He is", "group": "a"}, [UNSCORED])
        assert math.isnan(lost["sentiment"])
        assert lost["not_scored"] == 1
        # VADER's own published example of a positive sentence.
        good = functions.process_sentiment({"prompt": "VADER is smart,", "group": "a"}, [" handsome, and funny."])
        assert good["sentiment"] == pytest.approx(0.8316)
        assert (good["positive"], good["negative"], good["sentiment_gap"]) == (1.0, 0.0, ("a", good["sentiment"]))
    else:
        with pytest.raises(ConfigError, match=r"longctx_bold.*pip install 'nemo-longctx\[safety\]'"):
            loaders.load("bold_gender", data=str(tmp_path), splits="train")


# Xiong et al. 2023, Table 1 and section 4: shots, by lm-eval's names.
SHORT = {
    "humaneval": 0, "mbpp": 3, "gsm8k": 8, "hendrycks_math": 4, "mmlu": 5, "nq_open": 5, "triviaqa": 5, "piqa": 0,
    "social_iqa": 0, "hellaswag": 0, "winogrande": 0, "arc_easy": 0, "arc_challenge": 0, "openbookqa": 0, "commonsense_qa": 7,
}  # fmt: skip


@pytest.mark.slow
def test_groups_over_lm_evals_own_tasks_resolve():
    """Every name exists in the lm-eval that is installed; loading the tasks themselves would need their data."""
    index = harness._index(None, True).task_index
    for group in ("longctx_short", "longctx_safety", "longctx_bold", "longctx_research", "zeroscrolls", "leval"):
        for member in yaml.safe_load((Path(TASK_FOLDER) / f"{group}.yaml").read_text(encoding="utf-8"))["task"]:
            kind, name = ("task", member) if isinstance(member, str) else next(iter(member.items()))
            assert name in index, (group, name)
            if not isinstance(member, str):  # lm-eval renames the members of a group that is given as a task
                assert (index[name].kind.name == "GROUP") == (kind == "group"), name


def test_short_tasks_have_the_papers_shots():
    members = yaml.safe_load((Path(TASK_FOLDER) / "longctx_short.yaml").read_text(encoding="utf-8"))["task"]
    assert {member.get("task") or member["group"]: member["num_fewshot"] for member in members} == SHORT


@pytest.mark.slow
def test_mmlu_has_five_shots_in_every_subject(tmp_path, monkeypatch):
    """lm-eval's own group of 57 tasks, under the paper's shots, on rows in the published layout."""
    subjects = sorted(
        p.stem.removeprefix("mmlu_") for p in Path(lm_eval.__file__).parent.glob("tasks/mmlu/default/mmlu_*.yaml")
    )
    assert len(subjects) == 57
    folder = tmp_path / "cais" / "mmlu"
    folder.mkdir(parents=True)
    rows = [{"question": f"Q{n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4, "subject": "x"} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = [{"split": split, "path": "rows.jsonl"} for split in ("test", "validation", "dev")]
    configs = {"configs": [{"config_name": name, "data_files": files} for name in subjects]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(configs)}---\n", encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "only.yaml").write_text("group: only\ntask:\n  - {group: mmlu, num_fewshot: 5}\n")
    monkeypatch.chdir(tmp_path)  # datasets takes a folder of this name before the hub
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = HarnessTask(tasks=("only",), include_defaults=True, include_path=str(tmp_path / "tasks"), limit=1)
    found = run_harness(task, tiny_lm(["Question"], 4096))
    assert len([name for name in found.tasks if "not_scored" in found.tasks[name]]) == 57
    assert 0 <= found.tasks["mmlu"]["acc"] <= 1  # the group's own mean
    for one in load_tasks(task)["tasks"].values():
        assert one.config.num_fewshot == 5
    assert one.fewshot_context(one.test_docs()[0], num_fewshot=5).count("Answer:") == 6


def test_shots_of_a_group_reach_its_members(data, tmp_path):
    """As `longctx_short` gives MMLU's: by a group within a group."""
    (tmp_path / "outer.yaml").write_text("group: outer\ntask:\n  - {group: inner, num_fewshot: 1}\n")
    (tmp_path / "inner.yaml").write_text("group: inner\ntask: [longctx_qasper, longctx_narrativeqa]\n")
    task = HarnessTask(tasks=("outer",), include_path=str(tmp_path), metadata={"data": str(data / "scrolls")})
    loaded = load_tasks(task)
    assert {name: one.config.num_fewshot for name, one in loaded["tasks"].items()} == {
        "longctx_qasper": 1,
        "longctx_narrativeqa": 1,
    }


def test_code_is_not_run_unasked(data, tmp_path):
    text = (Path(TASK_FOLDER) / "longctx_qasper.yaml").read_text(encoding="utf-8")
    (tmp_path / "risky.yaml").write_text(f"include: {TASK_FOLDER}/longctx_qasper.yaml\ntask: risky\nunsafe_code: true\n")
    assert "unsafe_code" not in text
    task = HarnessTask(tasks=("risky",), limit=1, include_path=str(tmp_path), metadata={"data": str(data / "scrolls")})
    with pytest.raises(ConfigError, match=r"risky.*allow_code_execution"):
        load_tasks(task)
    results = run_harness(replace(task, allow_code_execution=True), tiny_lm([STORY], 4096)).tasks
    assert "f1" in results["risky"]


def test_unknown_task_is_named():
    with pytest.raises(ConfigError, match="no such task, did you mean 'longctx_qmsum'"):
        load_tasks(HarnessTask(tasks=("longctx_qmsun",)))
    with pytest.raises(ConfigError, match=r"none of \d+ is like it; for lm-eval's own set include_defaults: true"):
        harness.check_names(HarnessTask(tasks=("zzz",)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["{root}/modle", "--tasks", "leval"], r"checkpoint='.*modle': no such file or directory, did you mean '.*model'"),
        (["{root}/model", "--tasks", "leval"], r"tokenizer='.*model': holds none of tokenizer\.json"),
        (
            ["{root}/model", "--tasks", "levl", "--tokenizer", "{root}/tok"],
            r"eval\.tasks='levl': no such task, did you mean 'leval",
        ),
        (["{root}/model", "--tasks", "leval", "--tokenizer", "{root}/tok", "--metadata", "[1]"], "give a JSON object"),
        (["{root}/model", "--corpus", "x", "--metadata", '{{"a": 1}}'], "has no effect without --tasks"),
    ],
)
def test_slips_are_told_before_anything_is_loaded(options, said, tmp_path, monkeypatch):
    from nemo_longctx.commands import eval as command

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    byte_tokenizer([STORY]).save_pretrained(tmp_path / "tok")
    index = harness._index(None, False)
    monkeypatch.setattr(harness, "_index", lambda *_: index)  # lm-eval's own tasks take many seconds to index
    parser = argparse.ArgumentParser()
    command.configure(parser)
    with pytest.raises(ConfigError, match=said):
        command.run(parser.parse_args([option.format(root=tmp_path) for option in options]))


def test_lengths_without_samples_are_no_scores(tmp_path):
    """RULER names its metrics by lengths and says -1 of those that it did not ask."""
    task, file = own_task(tmp_path, "my_ruler", [{"metric": "4096"}, {"metric": "8192"}])
    (tmp_path / "mine.py").write_text(
        "def process(doc, results):\n    return {'4096': float(doc['a']), '8192': -1.0}\n"
        "def mean(values):\n    kept = [v for v in values if v != -1]\n    return sum(kept) / len(kept) if kept else -1.0\n"
    )
    task |= {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "a", "metric_list": "METRICS"}
    task |= {"generation_kwargs": {"max_gen_toks": 4, "until": []}}
    metrics = "".join(
        f"\n  - metric: '{length}'\n    aggregation: !function mine.mean\n    higher_is_better: true" for length in (4096, 8192)
    )
    text = yaml.safe_dump(task).replace(
        "metric_list: METRICS", f"metric_list:{metrics}\nprocess_results: !function mine.process"
    )
    file.write_text(text)
    found = run_harness(HarnessTask(tasks=("my_ruler",), include_path=str(tmp_path), guard=True), tiny_lm([STORY], 4096))
    assert found.tasks["my_ruler"]["4096"] == 0.5
    assert found.tasks["my_ruler"]["8192"] == "no samples"
    assert {"samples", "4096_stderr"} < set(found.tasks["my_ruler"])
    assert list(found.watched) == ["my_ruler/4096"]


def scored(number, value, rule="none", **more):
    return {"doc_id": number, "filter": rule, "metrics": list(more or {"acc": 0}), "acc": value, **more}


def test_scores_stand_beside_their_samples_and_standard_error():
    """Ten samples of a benchmark looked as sure as ten thousand."""
    values = [1.0, 0.0, 1.0, 1.0]
    found = harness._spread({"acc": 0.75}, [scored(n, value) for n, value in enumerate(values)])
    assert found == {"samples": 4, "acc_stderr": pytest.approx(np.std(values, ddof=1) / 2)}
    lost = [scored(n, value) for n, value in enumerate([*values, math.nan])]
    assert harness._spread({"acc": 0.75}, lost) == {"samples": 5, "acc_stderr": found["acc_stderr"]}
    assert harness._spread({"acc": 0.75}, lost[:1]) == {"samples": 1}  # one has no spread
    assert harness._spread({"acc": 0.7}, lost) == {"samples": 5}  # no mean of the samples: it may be any aggregate
    twice = [scored(n, value, rule) for n, value in enumerate(values) for rule in ("strict", "loose")]
    two = harness._spread({"acc,strict": 0.75, "acc,loose": 0.75}, twice)
    assert two == {"samples": 4, "acc_stderr,strict": found["acc_stderr"], "acc_stderr,loose": found["acc_stderr"]}
    parts = [scored(n, value, **{"4096": value, "8192": -1, "f1": (1, 2), "not_scored": 0}) for n, value in enumerate(values)]
    made = harness._spread({"4096": 0.75, "8192": -1, "f1": 0.5, "not_scored": 0}, parts)
    assert made == {"samples": 4, "4096_stderr": found["acc_stderr"]}


def test_a_tokenizer_that_names_no_end_is_told_where_one_is_needed():
    lm = tiny_lm(["ab" * 50], 256, vocab=280)
    assert lm.prefix_token_id == lm.tokenizer.bos_token_id
    lm.tokenizer.bos_token = None
    assert lm.prefix_token_id == lm.tokenizer.eos_token_id
    lm.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="names neither a beginning nor an end of a text"):
        lm.tok_encode("ab")


def test_a_generation_ends_at_the_model_s_ends_and_is_kept_by_them(tmp_path):
    """As lm-eval's own backend: transformers stops at every end of the generation config."""
    tokenizer = byte_tokenizer(["ab" * 50], vocab=280)
    llama, path = tiny_llama(vocab=len(tokenizer), length=256), str(tmp_path / "cache.db")

    def made(ends):
        llama.generation_config.eos_token_id = ends
        more = {"results_cache": path, "identity": {"weights": "w"}}
        lm = LongContextLM(HFCausalModel(llama), tokenizer=tokenizer, max_gen_toks=5, **more)
        lm.scorer.share, kept = True, []
        run, lm._run = lm._run, lambda jobs, *rest, **named: kept.extend(run(jobs, *rest, **named)) or kept
        request = SimpleNamespace(args=("abab", {"until": []}), doc={}, task_name="t", doc_id=0)
        return lm.generate_until([request], disable_tqdm=True)[0], kept[0]

    text, tokens = made([tokenizer.eos_token_id])
    assert len(tokens) == 5
    assert made(None) == (text, tokens)
    early, cut = made([tokenizer.eos_token_id, tokens[0]])
    assert (early, cut) == ("", tokens[:1])
    assert made([tokenizer.eos_token_id]) == (text, tokens)


def test_a_template_that_lets_the_model_think_is_told_unless_it_is_told_not_to(caplog):
    """Qwen3's begins each answer by <think>, and replies of 32 tokens hold nothing else."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[a]"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% else %}<think>\n{% endif %}"
    )
    turns, said = [{"role": "user", "content": "Hi"}], "the chat template lets the model think before it answers"
    for more, end, warned in (({}, "<think>\n", 1), ({"enable_thinking": False}, "<think></think>", 0),
                              ({"enable_thinking": True, "think_end_token": "</think>"}, "<think>\n", 0)):  # fmt: skip
        caplog.clear()
        lm = tiny_lm([STORY], 256, vocab=280)
        lm = LongContextLM(lm.causal, tokenizer=lm.tokenizer, max_gen_toks=8, **more)
        lm.tokenizer.chat_template = template
        assert [lm.apply_chat_template(turns) for _ in range(2)] == [f"[user]Hi[a]{end}"] * 2
        assert caplog.text.count(said) == warned
    lm._run = lambda jobs, *_rest, **_more: [lm.tokenizer.encode("first this</think>\n then that")] * len(jobs)
    request = SimpleNamespace(args=("Hi", {"until": ["this", "that"]}), doc={}, task_name="t", doc_id=0)
    assert lm.generate_until([request]) == ["then "]


def test_a_token_across_context_and_continuation_is_scored():
    lm = tiny_lm(["ab" * 50], 256, vocab=280)
    assert len(lm.tok_encode("xab")) < len(lm.tok_encode("xa")) + 1  # "ab" is one token
    before, after = lm._encode_pair("xa", "b")
    assert before + after == lm.tok_encode("xab")
    assert len(after) == 1


def test_the_models_tokenizer_reaches_tasks_that_make_their_data(tmp_path):
    task, file = own_task(tmp_path, "my_made", [{"metric": "acc"}])
    (tmp_path / "made.py").write_text(
        "import datasets\nfrom transformers import AutoTokenizer\n"
        "def make(tokenizer, **_):\n"
        "    assert tokenizer\n"
        "    size = len(AutoTokenizer.from_pretrained(tokenizer))\n"
        "    return {'test': datasets.Dataset.from_list([{'q': str(size), 'a': 0}])}\n"
    )
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "a"}
    del task["dataset_kwargs"]
    file.write_text(yaml.safe_dump(task) + "custom_dataset: !function made.make\n")
    lm = tiny_lm([STORY], 4096)
    assert "acc" in run_harness(HarnessTask(tasks=("my_made",), include_path=str(tmp_path)), lm).tasks["my_made"]


def test_replies_are_kept_in_the_form_that_compare_reads(data, tmp_path):
    from nemo_longctx.instruct.compare import compare_files

    lm = tiny_lm([STORY], 4096, vocab=258)
    lm._stop = lambda until: lambda made: len(made) > 7
    task = HarnessTask(
        tasks=("longctx_narrativeqa",), limit=2, metadata={"data": str(data / "scrolls"), "max_prompt": 60}, label="60"
    )
    run_harness(task, lm, keep=tmp_path / "a")
    run_harness(task, lm, keep=tmp_path / "b")
    file = "samples_longctx_narrativeqa@60.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "a" / file).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    assert all(set(row["scores"]) == {"f1", "not_scored"} and row["removed_tokens"] > 0 and not row["lost"] for row in rows)
    assert len(rows[0]["prompt_sha256"]) == 64
    assert len(compare_files(tmp_path / "a" / file, tmp_path / "b" / file, seed=0).pairs) == 2


def sample(doc_id, rule, **doc):
    return {
        "doc_id": doc_id, "doc": doc, "filter": rule, "filtered_resps": [f"{rule} {doc_id}"], "arguments": [["prompt"]],
        "metrics": ["acc", "4096"], "acc": 1.0, "4096": -1,
    }  # fmt: skip


def test_kept_samples_have_one_id_each():
    """GSM8K scores a reply by two filters, and some data sets give many rows one id."""
    twice = [sample(n, rule) for n in range(2) for rule in ("strict", "flexible")]
    assert [row["id"] for row in harness.sample_rows("t", twice, [])] == ["0/strict", "0/flexible", "1/strict", "1/flexible"]
    same = harness.sample_rows("t", [sample(0, "none", id="x"), sample(1, "none", id="x")], [])
    assert [row["id"] for row in same] == ["0", "1"]
    assert [row["id"] for row in harness.sample_rows("t", [sample(0, "none", id="x")], [])] == ["x"]
    assert same[0]["scores"] == {"acc": 1.0}  # -1 is RULER's word for no samples


def test_lm_evals_own_tasks_are_cut_as_they_are_told(tmp_path):
    """LongBench v2 and InfiniteBench lose the middle of a prompt that is too long."""
    task, file = own_task(tmp_path, "my_long", [{"metric": "acc"}])
    task |= {"output_type": "multiple_choice", "doc_to_choice": ["no", "yes"], "doc_to_target": "a"}
    task |= {"doc_to_text": "First. " + STORY * 3 + "Last: {{q}}"}
    file.write_text(yaml.safe_dump(task))
    lm = tiny_lm([STORY], 4096, vocab=258)
    asked = []
    lm._run = lambda jobs, *_args, **_more: (
        asked.extend(jobs) or [Score(token_log_probs=np.zeros(1), is_greedy=True)] * len(jobs)
    )
    block = HarnessTask(tasks=("my_long",), include_path=str(tmp_path), policy="middle", max_prompt=60, limit=1)
    found = run_harness(block, lm)
    text = lm.tokenizer.decode(asked[0].context)
    assert (len(asked[0].context), text[:6], text[-5:]) == (60, "First.", " odd?")
    assert {record.policy for record in found.truncations} == {"middle"}
    with pytest.raises(ConfigError, match=r"eval\.max_prompt=9999: the model reads 4096"):
        run_harness(replace(block, max_prompt=9999), lm)
    with pytest.raises(ConfigError, match=r"eval\.policy='keep_start': unknown policy"):
        replace(block, policy="keep_start")


def test_our_tasks_are_cut_by_their_metadata(data):
    block = HarnessTask(tasks=("longctx_qasper",), policy="middle", metadata={"data": str(data / "scrolls")})
    with pytest.raises(ConfigError, match=r"eval\.policy='middle': is for lm-eval's own tasks"):
        load_tasks(block)
