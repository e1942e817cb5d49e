"""An eval block with a slip is refused before anything is loaded."""

import json

import pytest

from nemo_longctx import dry_run
from nemo_longctx.config import ConfigError
from nemo_longctx.eval.checks import check_eval
from nemo_longctx.eval.config import EvalConfig


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
