"""An eval block with a slip is refused before anything is loaded."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import byte_tokenizer
from tokenizers import processors

from nemo_longctx import dry_run
from nemo_longctx.config import ConfigError
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.eval import checks, task_names
from nemo_longctx.eval.checks import check_eval
from nemo_longctx.eval.config import ContextTask, EvalConfig, HarnessTask, PositionTask, parse_tasks
from nemo_longctx.eval.task_names import check_spelling


@pytest.fixture
def folder(tmp_path):
    for name in ("held_out.idx", "held_out.bin", "essays.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "tok").mkdir()
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa" / "squad.json").write_text(json.dumps({"data": []}))
    return tmp_path


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"kind": "position", "corpus": "{root}/heldout", "seq_length": 8}, r"tasks\[0\]\.corpus=.*did you mean '.*held_out'"),
        ({"kind": "context", "corpus": "{root}/no/x", "contexts": [1, 2]}, r"tasks\[0\]\.corpus=.*is not there either"),
        ({"kind": "probes", "text": "{root}/essay.txt"}, r"tasks\[0\]\.text=.*did you mean '.*essays\.txt'"),
        ({"kind": "probes", "text": "{root}/essays.txt", "probes": {"data": "{root}/q"}}, r"probes\.data=.*no such file"),
        (
            {"kind": "probes", "text": "{root}/essays.txt", "probes": {"suite": "ruler", "data": "{root}/qa"}},
            r"holds none of hotpotqa\.json.*ruler_qa_2",
        ),
        ({"kind": "lm_eval", "tasks": ["leval"], "metadata": {"data": "{root}/quality"}}, r"metadata\.data=.*no such file"),
        ({"kind": "lm_eval", "tasks": ["leval"], "include_path": "{root}/tusks"}, r"include_path=.*no such file"),
    ],
)
def test_paths_with_a_slip(folder, task, said):
    def filled(value):
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        return value.format(root=folder) if isinstance(value, str) else value

    with pytest.raises(ConfigError, match=said):
        check_eval(EvalConfig(tasks=(filled(task),)))


def test_a_directory_of_shards_is_a_corpus(folder):
    (folder / "kept").mkdir()
    tasks = [
        {"kind": "position", "corpus": str(folder / "kept"), "seq_length": 8},
        {"kind": "context", "corpus": str(folder / "kept"), "contexts": [1, 2]},
        {"kind": "probes", "text": str(folder / "kept")},
    ]
    for task, said in zip(tasks, (r"kept\.idx is missing", r"kept\.idx is missing", r"holds no \.idx"), strict=True):
        with pytest.raises(ConfigError, match=said):
            check_eval(EvalConfig(tasks=(task,)))
    (folder / "kept" / "shard-00000.idx").write_text("x")
    check_eval(EvalConfig(tasks=tuple(tasks)))


def test_what_is_there_passes(folder):
    tasks = (
        {"kind": "probes", "text": f"{folder}/held_out"},
        {"kind": "position", "corpus": f"{folder}/held_out", "seq_length": 8},
    )
    check_eval(EvalConfig(tasks=tasks))
    check_eval(None)
    with pytest.raises(ConfigError, match=r"eval\.tokenizer=.*holds none of tokenizer\.json"):
        check_eval(EvalConfig(tasks=tasks, tokenizer=f"{folder}/tok"))
    with pytest.raises(ConfigError, match=r"eval\.tokenizer=.*did you mean '.*tok'"):
        check_eval(EvalConfig(tasks=tasks, tokenizer=f"{folder}/tk"))


def test_names_of_lm_evals_tasks_are_looked_up_before_training():
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="no such task, did you mean 'longctx_qmsum'"):
        dry_run.check_evaluation(EvalConfig(tasks=({"kind": "lm_eval", "tasks": ["longctx_qmsun"]},)))


def test_a_name_that_no_file_of_tasks_has_is_told_without_lm_eval(folder, monkeypatch):
    """`eval --tasks nope` took 15 seconds of a processor for lm-eval's index."""
    tasks = folder / "lm_eval" / "tasks"
    (tasks / "arc").mkdir(parents=True)
    (folder / "lm_eval" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tasks / "arc" / "easy.yaml").write_text("include: _shared\ntask: arc_easy\ndoc_to_text: nope_ not-nope\n")
    (tasks / "arc" / "_shared").write_text("tag:\n  - arc_all\n")
    (tasks / "groups.yaml").write_text("group: 'grouped'\ntask:\n- arc_easy\n- task: inline\n")
    (tasks / "README.md").write_text("nope\n")
    monkeypatch.setattr(task_names, "module_folder", lambda name: folder / name)

    def check(*names, **more):
        check_spelling(HarnessTask(tasks=names, include_defaults=more.pop("include_defaults", True), **more))

    check("arc_easy", "arc_all", "grouped", "inline", "longctx_qmsum")
    with pytest.raises(ConfigError, match=r"eval\.tasks='nope': no such task, none of \d+ is like it$"):
        check("arc_easy", "nope")
    with pytest.raises(ConfigError, match=r"eval\.tasks='arc_esy': no such task, did you mean 'arc_easy'\?$"):
        check("arc_esy")
    with pytest.raises(ConfigError, match=r"'arc_all': no such task, .*; for lm-eval's own set include_defaults: true$"):
        check("arc_all", include_defaults=False)
    check("arc_all", include_defaults=False, include_path=str(tasks))
    monkeypatch.setattr(task_names, "module_folder", lambda name: None)  # its import says what to install
    check("nope")


def test_an_unknown_task_is_told_before_the_index_is_made(folder, monkeypatch, capsys):
    from nemo_longctx.cli import main

    monkeypatch.setitem(sys.modules, "nemo_longctx.adapters.harness", None)
    monkeypatch.setattr("nemo_longctx.adapters.pretrained.check_source", lambda *_: None)
    monkeypatch.setattr(task_names, "module_folder", lambda name: folder)
    (folder / "tasks").mkdir()
    assert main(["eval", str(folder), "--tasks", "leval,nope"]) == 2
    assert "eval.tasks='nope': no such task" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"eval\.tasks='nope': no such task"):
        dry_run.check_evaluation(EvalConfig(tasks=({"kind": "lm_eval", "tasks": ["nope"]},)))


def test_a_bad_folder_and_a_bad_task_are_told_together(folder, capsys, monkeypatch):
    """The folder alone was told, and the task once that was mended."""
    from nemo_longctx.cli import main

    monkeypatch.setattr(task_names, "module_folder", lambda name: folder)
    probes = ["--probes", str(folder / "no text.txt")]
    assert main(["eval", str(folder / "nothing"), str(folder / "nor this"), "--tasks", "leval,nope", *probes]) == 2
    said = capsys.readouterr().err
    places = [said.index(part) for part in ("nothing'", "nor this'", "no text.txt'", "eval.tasks='nope': no such task")]
    assert places == sorted(places)
    checks.told_together(lambda: None)
    with pytest.raises(ConfigError, match=r"^a=1: b; and c=2: d$"):  # one mistake is told once
        checks.told_together(*(partial(fail, *error) for error in (("a", 1, "b"), ("c", 2, "d"), ("a", 1, "b"))))


def fail(*error):
    raise ConfigError(*error)


def test_what_is_asked_without_the_chat_template_is_told():
    probes, chat = ({"text": "t", "probes": {"kinds": ["passkey"], "chat": chat}} for chat in (False, True))
    tasks = parse_tasks([{"kind": "probes", **probes}, *({"kind": "lm_eval", "tasks": [n]} for n in ("arc", "boolq", "leval"))])
    base, tuned = SimpleNamespace(chat_template=None), SimpleNamespace(chat_template="{{ messages }}")
    dated = SimpleNamespace(chat_template="{{ strftime_now('%d') }}")
    assert checks.plainly_asked(tasks, base) == checks.plainly_asked(tasks, None) == []
    (said,) = checks.plainly_asked(tasks, tuned)
    assert said.startswith(
        "the tokenizer has a chat template, and probes, arc, boolq and 1 more asked without it, in plain text"
    )
    asked = parse_tasks([{"kind": "probes", **chat}, {"kind": "lm_eval", "tasks": ["arc"], "apply_chat_template": True}])
    assert checks.plainly_asked(asked, tuned) == []
    assert checks.plainly_asked(asked, dated) == [
        "the chat template writes the day, which is 26 Jul 2024 in all that is asked here"
    ]
    assert len(checks.plainly_asked(tasks, dated)) == 1


def test_a_bare_name_with_a_slip_is_no_hub_error(folder, monkeypatch):
    from nemo_longctx.data import tokenization
    from nemo_longctx.eval.checks import check_name

    def unreachable(*_):
        raise OSError

    monkeypatch.chdir(folder)
    monkeypatch.setattr(tokenization.socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(tokenization.urllib.request, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=r"checkpoint='tokk'.*did you mean 'tok' here\?"):
        check_name("checkpoint", "tokk")


def test_what_is_neither_a_path_nor_a_name_is_not_asked_of_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder)
    asked = []
    monkeypatch.setattr(checks, "check_hub_name", lambda key, name: asked.append(name))
    for name in ("tok", "./tok", "essays.txt", "some/model", "model"):
        checks.check_name("k", name)
    assert asked == ["some/model", "model"]
    for name, said in (
        ("./nothing", "no such file or directory, . holds 5 others"), ("~/tok", "~ is not there either"),
        ("/no/tok", "/no is not there either"), ("a/b/c", "a/b is not there either"),
        ("tok/model", "tok holds 0 others, none like it"), ("./tk", "did you mean 'tok'"),
        ("qa/squad", "did you mean 'qa/squad.json'"), ("~/x/y/z", "~/x/y is not there either"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^k='{name}': .*{said}"):
            checks.check_name("k", name)
    assert len(asked) == 2


def test_a_name_that_the_hub_has_not_is_told_what_is_here(folder, monkeypatch):
    def unknown(key, name):
        raise ConfigError(key, name, "is not on the hub")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(checks, "check_hub_name", unknown)
    with pytest.raises(ConfigError, match=r"k='tokk': is not on the hub; did you mean 'tok' here\?$"):
        checks.check_name("k", "tokk")
    with pytest.raises(ConfigError, match=r"k='llama': is not on the hub$"):
        checks.check_name("k", "llama")


def written(prefix, documents):
    with CorpusWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    return str(prefix)


def test_text_without_the_token_that_begins_each_text_is_told(tmp_path):
    with_bos, without = byte_tokenizer(["a text"]), byte_tokenizer(["a text"])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos.backend_tokenizer.post_processor = template
    bare, begun, some = (
        written(tmp_path / name, docs)
        for name, docs in (("bare", [[5, 6], [7]]), ("begun", [[0, 6], [0]]), ("some", [[0, 6], [7, 8], [9, 0]]))
    )
    position = [PositionTask(corpus=path, seq_length=8, label=path) for path in (bare, begun, some)]
    context = [ContextTask(corpus=begun, contexts=(4, 8), targets=2)]
    told = checks.without_bos([*position, *position, *context], with_bos)
    assert [line.partition(" documents")[0] for line in told[:2]] == [f"{bare}: 2 of 2", f"{some}: 2 of 3"]
    assert "do not begin with <s>" in told[0]
    assert told[2].startswith(f"{begun}: fixed targets are read after text from inside documents, without the <s>")
    assert len(told) == 3
    assert checks.without_bos([*position, *context], without) == []  # it has one, and begins no text with it


def test_a_suffix_is_left_out_of_the_advice(folder):
    with pytest.raises(ConfigError, match=r"held\.idx is missing, did you mean '.*/held_out'\?"):
        checks.check_there("k", str(folder / "held"), suffix=".idx")
    with pytest.raises(ConfigError, match=r"zzz\.idx is missing, .* holds 1 others, none like it"):
        checks.check_there("k", str(folder / "zzz"), suffix=".idx")
    with pytest.raises(ConfigError, match=r"k='.*zzz': no such text, .* holds 5 others, none like it"):
        checks.check_there("k", str(folder / "zzz"), what="no such text")
    checks.check_there("k", str(folder / "held_out"), suffix=".idx")


def test_each_file_that_a_task_reads_is_looked_up(folder):
    names = []
    harness = {"kind": "lm_eval", "tasks": ["leval"], "metadata": {"data": None}, "include_path": str(folder)}
    check_eval(EvalConfig(tasks=(harness,)), check_names=lambda task: names.append(task.name))
    assert names == ["leval"]
    for kinds in (["ruler_qa_1"], ["passkey"]):  # squad.json is there, hotpotqa.json is not
        probes = {"kinds": kinds, "data": str(folder / "qa")}
        check_eval(EvalConfig(tasks=({"kind": "probes", "text": str(folder / "essays.txt"), "probes": probes},)))
    with pytest.raises(ConfigError, match=r"tasks\[1\]\.conversations=.*no such file"):
        check_eval(EvalConfig(tasks=(harness, {"kind": "answers", "conversations": str(folder / "none")})))
    (folder / "qa" / "icl.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ConfigError, match="row 1 is no"):
        check_eval(EvalConfig(tasks=({"kind": "probes", "text": str(folder / "essays.txt"), "probes": probes},)))
    (folder / "tok" / "tokenizer.json").write_text("{}")
    check_eval(EvalConfig(tokenizer=str(folder / "tok")))
