"""The command line: lazy, and a mistake is one sentence."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx import capability
from nemo_longctx.cli import COMMANDS, main
from nemo_longctx.data.writer import CorpusWriter

# Commands that must answer without torch, and what they are called with.
LIGHT = [["--help"], *([name, "--help"] for name in COMMANDS), ["doctor", "--json"]]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_no_torch(arguments):
    code = (
        "import sys\nfrom nemo_longctx.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'nemo', 'megatron', 'lightning', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_doctor_reports_versions_and_what_missing_parts_cost(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"].startswith("2.")
    parts = {part["name"]: part for part in report["capabilities"]}
    assert set(parts) == {"CUDA", "bf16", "Transformer Engine", "flash-attn", "NVIDIA's apex", "gloo", "nccl"}
    for part in parts.values():
        assert part["available"] or (part["cost"] and part["remedy"] and part["detail"])


def test_doctor_tells_people_what_a_missing_part_costs(monkeypatch, capsys):
    parts = [
        capability.Capability(name="CUDA", available=False, detail="no driver", cost="a CPU's speed", remedy="a GPU"),
        capability.Capability(name="gloo", available=True, detail="of torch"),
    ]
    monkeypatch.setattr(capability, "capabilities", lambda: parts)
    monkeypatch.setattr(capability, "package_versions", lambda: {"torch": "2.7.1", "nemo_toolkit": None})
    monkeypatch.setattr(capability, "host_fault", lambda: "NeMo 9 is none that was tried")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "torch         2.7.1", "nemo_toolkit  not installed", "host          no  NeMo 9 is none that was tried",
        "CUDA          no  no driver", "                  costs: a CPU's speed", "                  get it: a GPU",
        "gloo          yes of torch",
    ]  # fmt: skip


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = [sys.executable, "-m", "nemo_longctx", "completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=300) == 0


def test_unknown_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepair"])
    assert stop.value.code == 2
    assert "did you mean 'prepare'" in capsys.readouterr().err


def test_a_users_mistake_is_one_sentence_and_status_2(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nemo-longctx inspect: error: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_versions_are_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    first, others = capsys.readouterr().out.splitlines()
    assert first.startswith("nemo-longctx 0.")
    assert "megatron-core" in others


@pytest.mark.parametrize("command", ["train", "sft"])
def test_training_is_a_command(command, capsys):
    """The example scripts are not in the wheel."""
    assert main([command, "recipe=no_such_recipe" if command == "train" else "sft=no_such_row"]) == 2
    assert "no such choice" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["nemo_longctx", "nemo_longctx.launch"])
def test_modules_under_python_m_do_not_end_in_silence(module):
    """`python -m nemo_longctx.launch recipe=x` did nothing, with status 0."""
    words = ["train", "recipe=x"] if module == "nemo_longctx" else ["recipe=x"]
    result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "no such choice" in result.stderr


def test_help_of_a_command_shows_one_percent_sign(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    out = capsys.readouterr().out
    assert "95 % intervals" in " ".join(out.split())
    assert "%%" not in out


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"nemo", "megatron", "lightning", "lm_eval", "datasets", "openai", "nemo_run"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import contextlib, io, json
from nemo_longctx.cli import main
said = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as error:
            status = error.code
        except BaseException as error:
            status = repr(error)
    said.append([status, err.getvalue()])
print(json.dumps(said))
"""

# Every command with what it would work on, and the extra whose absence ends it; None: the core is enough.
TRAIN = ["train", "recipe=tiny_cpu_base", "data.mix.sources=[{path: all}]", "data.validation=[]", "data.tokenizer=null"]
WITHOUT_EXTRAS = [
    (["init", "--checkpoint", "model", "--target", "1024", "--data", "all"], None),
    ([*TRAIN], "nemo"),
    ([*TRAIN, "--dry-run=full"], "nemo"),
    (["sft", "restore_from=checkpoint", "data.tokenizer=model", "data.short=[chat.jsonl]", "data.long=[chat.jsonl]"], "nemo"),
    (["inspect", "all"], None),
    (["export", "checkpoint", "out"], "nemo"),
    (["import", "model", "imported"], "nemo"),
    (["rope", "advise", "--from", "4096", "--to", "8192"], None),
    (["plan", "--model", "llama2_7b"], None),
    (["doctor", "--json"], None),
    (["doctor", "--model", "tiny_cpu_base"], "nemo"),
    (["eval", "model", "--tasks", "longctx_qmsum", "--out", "out"], "eval"),
    (["eval", "model", "--corpus", "all", "--out", "out"], "eval"),
    (["eval", "checkpoint", "--corpus", "all", "--out", "out"], "eval"),
    (["generate", "checkpoint", "--prompts", "prompts.txt"], "nemo"),
    (["instruct", "generate", "documents.jsonl", "--output", "made", "--checkpoint", "nowhere", "--tokenizer", "model"], None),
    (["ablate", "mix", "--scale", "smoke", "--dry-run"], None),
    (["completion", "bash"], None),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Status and last words of each command, in one process that finds no package of the extras."""
    here = tmp_path_factory.mktemp("core only")
    tiny_llama(vocab=320).save_pretrained(here / "model")
    byte_tokenizer(["a few words"]).save_pretrained(here / "model")
    with CorpusWriter(str(here / "all"), np.uint16) as writer:
        for _ in range(8):
            writer.add_document(np.arange(700) % 101)
    for name in ("weights", "context"):
        (here / "checkpoint" / name).mkdir(parents=True)
    model = "config:\n  seq_length: 512\n  num_layers: 1\n  hidden_size: 8\n  num_attention_heads: 1\n"
    (here / "checkpoint" / "context" / "model.yaml").write_text(model)
    (here / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (here / "prompts.txt").write_text("a\n")
    (here / "documents.jsonl").write_text('{"text": "a few words"}\n')
    words = json.dumps([arguments for arguments, _ in WITHOUT_EXTRAS])
    result = subprocess.run([sys.executable, "-c", WITHOUT, words], cwd=here, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(WITHOUT_EXTRAS)), ids=[" ".join(words)[:50] for words, _ in WITHOUT_EXTRAS])
def test_a_command_without_its_extra_says_what_to_install(ended, number):
    (status, said), extra = ended[number], WITHOUT_EXTRAS[number][1]
    assert "Traceback" not in said
    assert "ModuleNotFoundError" not in said
    if extra is None:
        assert "not installed: pip install" not in said
        assert status in (0, 1, 2)
    else:
        assert status == 2, said
        assert f"pip install 'nemo-longctx[{extra}]'" in said


@pytest.mark.parametrize(("command", "said"), [("prepare", "goes on from here"), ("inspect", "begins anew")])
def test_an_interrupt_promises_what_the_command_holds(command, said, monkeypatch, capsys):
    module = importlib.import_module(f"nemo_longctx.commands.{command}")

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupted)
    words = {"prepare": ["a", "--output", "b", "--tokenizer", "c"], "inspect": ["a"]}[command]
    assert main([command, *words]) == 130
    assert f"the same command {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["init", "--chekpoint", "x"], "unrecognized arguments: --chekpoint x; did you mean --checkpoint?"),
        (["train", "recipe=tiny_cpu_base", "--dryrun"], "did you mean --dry-run?"),
        (["train", "--recipe=tiny_cpu_base"], "a setting is written without dashes: recipe=tiny_cpu_base"),
        (["sft", "--optimizer.lr", "1e-4"], "a setting is written without dashes: optimizer.lr=VALUE"),
    ],
)
def test_a_misspelled_option_is_answered_with_the_one_that_was_meant(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_start_without_anything_is_no_traceback(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_recipe_s_file_that_is_named_otherwise_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    for word, said in (("mine.yaml", "write recipe=mine.yaml"), ("recipe=mine", "if the file is meant: recipe=mine.yaml")):
        assert main(["train", word, "--dry-run"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("written", ["trainer: [a, b]", "curriculum: {stages: {until: 1.0, seq_length: 512}}"])
def test_a_list_for_keys_in_one_s_own_recipe_is_told_by_its_file(tmp_path, monkeypatch, capsys, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(written)
    assert main(["train", "recipe=mine.yaml", "--dry-run"]) == 2
    assert "recipe='mine.yaml': a list stands there where keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("default", "mend"),
    [
        ("/rope: abff", "its defaults name rope/abff, which is not there: did you mean 'abf'?"),
        ("tiny_cpu_bse", "its defaults name recipe/tiny_cpu_bse, which is not there: did you mean 'tiny_cpu_base'?"),
        ("/rop: abf", "its defaults name rop/abf, which is not there: no such group; did you mean 'rope'?"),
    ],
)
def test_a_default_that_is_not_there_is_told_without_hydra_s_search_path(tmp_path, monkeypatch, capsys, default, mend):
    monkeypatch.chdir(tmp_path)
    entry = f"{{{default}}}" if ":" in default else default
    (tmp_path / "mine.yaml").write_text(f"defaults: [{entry}, _self_]\nname: x\n")
    assert main(["train", "recipe=./mine.yaml", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"recipe='./mine.yaml': {mend}" in said
    assert "search path" not in said


@pytest.mark.parametrize(
    "argv",
    [["export", "none", "out"], ["doctor", "--model", "tiny_cpu_long", "--checkpoint", "none"]],
    ids=lambda argv: argv[0],
)
def test_a_checkpoint_that_is_not_there_is_told_before_the_host_is_imported(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nemo", None)
    monkeypatch.setitem(sys.modules, "nemo_longctx.adapters.nemo", None)
    assert main(argv) == 2
    assert "'none': no finished NeMo checkpoint is there" in capsys.readouterr().err
