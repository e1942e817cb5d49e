"""What commands hand to the host and print, with the host stood in for: each option arrives where it belongs."""

import argparse
import contextlib
import io
import json
import sys
import types

import pytest

from nemo_longctx import capability, runs
from nemo_longctx.cli import main
from nemo_longctx.commands import generate, instruct, prepare, train
from nemo_longctx.config import ConfigError
from nemo_longctx.eval.requests import Generation
from nemo_longctx.instruct.client import ClientConfig


def stand_in(monkeypatch, name, **parts):
    """A module of this name that holds these parts."""
    module = types.ModuleType(name)
    module.__dict__.update(parts)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def converter(monkeypatch):
    """What was converted, with nothing looked up before."""
    calls = []

    def export_hf(*paths, **options):
        calls.append((*map(str, paths), options))
        return types.SimpleNamespace(variant="abf", notes=["one note", "another"])

    def import_hf(*paths, **options):
        calls.append((*map(str, paths), options))
        return "pi"

    stand_in(monkeypatch, "nemo_longctx.adapters.nemo.checkpoint.convert", export_hf=export_hf, import_hf=import_hf)
    monkeypatch.setattr("nemo_longctx.hf.files.check_target", lambda *paths: calls.append(("target", *map(str, paths))))
    monkeypatch.setattr("nemo_longctx.hf.directory.check_directory", lambda path: calls.append(("directory", str(path))))
    monkeypatch.setattr("nemo_longctx.planning.models.nemo_context", lambda path: path)
    monkeypatch.setattr(runs, "leaves_nothing", lambda path: calls.append(("leaves", str(path))) or contextlib.nullcontext())
    return calls


def test_export_hands_on_each_option_and_says_what_was_made(converter, capsys):
    assert main(["export", "a", "b"]) == 0
    options = {"verify": True, "verify_tokens": None, "max_position_embeddings": None, "tokenizer": None}
    assert converter == [("target", "b", "a/weights"), ("leaves", "b"), ("a", "b", options)]
    assert capsys.readouterr().out == (
        "b: transformers model of a, RoPE abf, verified by loading it again\n  one note\n  another\n"
    )
    words = ["--no-verify", "--verify-tokens", "7", "--max-position-embeddings", "99", "--tokenizer", "t"]
    assert main(["export", "a", "b", *words]) == 0
    found = converter[-1][-1]
    assert (found.pop("tokenizer").name, found) == (
        "t", {"verify": False, "verify_tokens": 7, "max_position_embeddings": 99}
    )  # fmt: skip
    assert "RoPE abf, not verified" in capsys.readouterr().out


def test_import_hands_on_each_option_and_says_what_was_made(converter, capsys):
    assert main(["import", "a", "b"]) == 0
    assert converter == [
        ("target", "b", "a"), ("directory", "a"), ("leaves", "b"), ("a", "b", {"verify": True, "verify_tokens": None})
    ]  # fmt: skip
    assert main(["import", "a", "b", "--no-verify", "--verify-tokens", "9"]) == 0
    assert converter[-1] == ("a", "b", {"verify": False, "verify_tokens": 9})
    assert capsys.readouterr().out.splitlines() == [
        "b: NeMo checkpoint of a, RoPE pi, verified by loading it again", "b: NeMo checkpoint of a, RoPE pi, not verified"
    ]  # fmt: skip


@pytest.mark.parametrize(("passed", "status"), [([True, True], 0), ([True, False], 1)])
def test_a_self_test_is_of_the_recipe_with_its_overrides(monkeypatch, capsys, passed, status):
    found, built = [capability.Capability(name=str(n), available=one, detail="d") for n, one in enumerate(passed)], []
    for one, ok in zip(found, passed, strict=True):
        object.__setattr__(one, "passed", ok)

    def self_test(model, config, **options):
        assert (model, config) == ("model", "config")
        built.append(options)
        return found

    def build_for_test(recipe, *, load_weights):
        built.append((recipe.optimizer.lr, recipe.restore_from, load_weights))
        return "model", "config"

    stand_in(
        monkeypatch, "nemo_longctx.adapters.megatron.self_test", self_test=self_test, findings_text=lambda f: f"{len(f)} found"
    )
    stand_in(monkeypatch, "nemo_longctx.adapters.nemo.checkpoint.load", build_for_test=build_for_test)
    monkeypatch.setattr("nemo_longctx.dry_run.check_base", lambda recipe: built.append("checked"))
    command = ["doctor", "--model", "tiny_cpu_base", "optimizer.lr=0.5", "data.document_masking=true"]
    assert main(command) == status
    assert built == [(0.5, None, False), {"seq_length": built[1]["seq_length"], "document_masking": True}]
    assert built[1]["seq_length"] > 0
    assert capsys.readouterr().out == "2 found\n"
    assert main([*command, "--checkpoint", "c", "--json"]) == status
    assert built[2:4] == ["checked", (0.5, "c", True)]
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["0", "1"]


def test_doctor_refuses_what_has_no_effect_and_no_recipe(capsys):
    for words, said in (
        (["--checkpoint", "c"], "--checkpoint='c': has no effect without --model RECIPE"),
        (["optimizer.lr=1"], "has no effect without --model RECIPE"),
        (["--model", "tiny_cpu_bas"], "--model='tiny_cpu_bas': no such recipe, did you mean 'tiny_cpu_base'"),
    ):
        assert main(["doctor", *words]) == 2
        assert said in capsys.readouterr().err


def test_train_and_sft_look_or_launch(monkeypatch, capsys):
    from nemo_longctx import launch, launch_sft

    for module, status in ((launch, 5), (launch_sft, 6)):
        monkeypatch.setattr(module, "main", lambda overrides, status=status: (print(overrides), status)[1])
    assert (main(["train", "a=1", "b=2"]), main(["sft", "c=3"])) == (5, 6)
    assert capsys.readouterr().out == "['a=1', 'b=2']\n['c=3']\n"
    monkeypatch.setattr("nemo_longctx.explain.explained", lambda overrides, config_name: f"{overrides} {config_name}")
    assert [
        main([command, "a=1", *look]) for command in ("train", "sft") for look in (["--print-config"], ["--cfg", "job"])
    ] == [0] * 4
    assert capsys.readouterr().out == "['a=1'] config" * 2 + "['a=1'] sft" * 2


@pytest.mark.parametrize(
    ("command", "name", "load"), [("train", "config", "load_recipe"), ("sft", "sft", "load_instruct_recipe")]
)
def test_a_dry_run_ends_by_what_it_found(monkeypatch, capsys, command, name, load):
    checked = types.SimpleNamespace(lines=["one", "two"], errors=[])
    monkeypatch.setattr(train, "compose", lambda overrides, config_name: (overrides, config_name))
    monkeypatch.setattr(f"nemo_longctx.recipe.{load}", lambda composed: ("recipe", *composed))
    monkeypatch.setattr("nemo_longctx.dry_run.check", lambda recipe: print(recipe) or checked)
    monkeypatch.setattr("nemo_longctx.launch.exit_status", lambda run: run())
    monkeypatch.setattr("nemo_longctx.launch.rehearse", lambda recipe: 7)
    said = f"('recipe', ['a=1'], '{name}')\none\ntwo\n"
    for words in (["--dry-run", "a=1"], ["a=1", "--dry-run"], ["a=1", "--dry-run", "files"]):
        assert main([command, *words]) == 0
        out = capsys.readouterr().out
        assert out.startswith(said)
        assert "all of this holds; nothing was loaded" in out
    assert main([command, "a=1", "--dry-run=full"]) == 7
    assert capsys.readouterr().out == said
    checked.errors = ["x"]
    assert main([command, "a=1", "--dry-run", "full"]) == 2
    assert capsys.readouterr().out == said


def test_the_keys_of_a_run_are_those_of_its_schema_each_with_its_default():
    from nemo_longctx.recipe import InstructRecipe, RecipeConfig

    of_train, of_sft = train.keys(RecipeConfig).splitlines(), train.keys(InstructRecipe).splitlines()
    assert of_train[0] == of_sft[0] == "groups (group=choice):"
    own = ("  sft ", "  recipe ")  # each is a group of one of the two alone
    assert [line.split()[0] for line in of_train if line.startswith(own)] == ["recipe"]
    assert [line.split()[0] for line in of_sft if line.startswith(own)] == ["sft"]
    assert "keys (key=value; [] is any place in a list):" in of_train
    assert any(line.startswith("  name  (") and line.endswith("has to be set)") for line in of_train)
    assert "  optimizer.beta1  (number; default 0.9)" in of_train
    assert max(map(len, of_train[of_train.index("") :])) <= 130
    assert all(line.startswith(("  ", "      ")) for line in of_train[of_train.index("") + 2 :])


class Letters:
    """A tokenizer of characters."""

    eos_token_id, chat_template = 0, None

    def encode(self, text, add_special_tokens=False):
        return [ord(letter) for letter in text]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(token) for token in tokens if token)


class Echo:
    """A scorer that says the last letter of the prompt, as often as it may."""

    def __init__(self, max_length=40):
        self.model = types.SimpleNamespace(max_length=max_length)
        self.asked = []

    def generate(self, requests):
        self.asked += requests
        return [[one.context[-1]] * min(3, one.max_new_tokens) for one in requests]


def test_answers_are_written_beside_the_prompts_and_cut_ones_counted(monkeypatch, tmp_path, capsys):
    scorer, opened = Echo(), []

    def open_model(args):
        opened.append((args.checkpoint, args.tokenizer, args.max_length))
        return scorer, Letters(), None, "group"

    def run_shared(with_scorer, asked, *, group, what, quiet):
        assert (with_scorer, group, what) == (scorer, "group", "generation")
        opened.append(quiet)
        return scorer.generate(asked)

    monkeypatch.setattr(generate, "open_model", open_model)
    monkeypatch.setattr("nemo_longctx.eval.sharing.run_shared", run_shared)
    (tmp_path / "p.txt").write_text("ab\ncd\n")
    command = ["generate", "model", "--prompts", str(tmp_path / "p.txt")]
    assert main([*command, "--max-new-tokens", "2", "--tokenizer", "t", "--max-length", "40"]) == 0
    assert opened == [("model", "t", 40), False]
    out = tmp_path / "p.answers.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["response"], row["finish_reason"], row["prompt_tokens"]) for row in rows] == [
        ("1", "bb", "length", 2), ("2", "dd", "length", 2)
    ]  # fmt: skip
    assert capsys.readouterr().out == f"wrote {out}: 2 answers, 2 of them cut, the longest at 2\n"
    words = ["--stop", "bbb", "--stop", "ddd", "--out", str(tmp_path / "new" / "folder" / "o.jsonl"), "--temperature", "0.5"]
    assert main([*command, *words, "--top-p", "0.9", "--top-k", "4", "--seed", "8"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'new' / 'folder' / 'o.jsonl'}: 2 answers\n"
    last = scorer.asked[-1]
    assert (last.max_new_tokens, last.temperature, last.top_p, last.top_k, last.seed) == (38, 0.5, 0.9, 4, 8)
    monkeypatch.setenv("RANK", "1")
    out.unlink()
    assert main(command) == 0  # another rank works and writes nothing
    assert opened[-1] is True
    assert not out.exists()


def test_a_talk_remembers_its_turns_until_an_empty_line(monkeypatch, capsys):
    scorer = Echo(max_length=16)
    monkeypatch.setattr("nemo_longctx.commands.chat.open_model", lambda args: (scorer, Letters(), None, None))
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nc\n\nd\n" + "x" * 15 + "\ne\n"))
    assert main(["chat", "model", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["bb", "cc", "dd", "ee"]
    assert ["".join(map(chr, one.context)) for one in scorer.asked] == ["ab", "abbbc", "d", "ddde"]
    assert "has 18 tokens" in said.err  # the long turn is taken back
    template = Letters()
    template.apply_chat_template = lambda turns, **_: "".join(f"[{t['role'][0]}]{t['content']}" for t in turns)
    monkeypatch.setattr("nemo_longctx.commands.chat.open_model", lambda args: (Echo(99), template, "T", None))
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nc\n"))
    turns = []
    monkeypatch.setattr(Echo, "generate", lambda self, asked: turns.append("".join(map(chr, asked[0].context))) or [[121]])
    assert main(["chat", "model", "--system", "S"]) == 0
    assert turns == ["[s]S[u]ab", "[s]S[u]ab[a]y[u]c"]


def test_a_model_is_opened_with_its_own_tokenizer_and_template_or_those_of_the_options(monkeypatch):
    opened = []
    tokenizer = types.SimpleNamespace(chat_template="own")
    stand_in(
        monkeypatch, "nemo_longctx.adapters.pretrained",
        check_source=lambda *args: opened.append(args),
        load_checkpoint=lambda path, *, max_length: opened.append((path, max_length)) or ("model", 1, "its own", "group"),
        hf_tokenizer=lambda name: opened.append(name) or tokenizer,
    )  # fmt: skip
    monkeypatch.setattr("nemo_longctx.data.sft_instances.chat_template", lambda name, of: f"{name} file")
    monkeypatch.setattr("nemo_longctx.eval.scoring.Scorer", lambda model: f"scorer of {model}")
    parser = argparse.ArgumentParser()
    generate.add_options(parser)
    for words, name, template in (
        ([], "its own", "own"), (["--tokenizer", "t", "--template", "none"], "t", None),
        (["--template", "llama2", "--system", "S", "--max-length", "9"], "its own", "llama2 file"),
    ):  # fmt: skip
        opened.clear()
        args = parser.parse_args(["ckpt", *words])
        assert generate.open_model(args) == ("scorer of model", tokenizer, template, "group")
        assert opened == [("ckpt", args.tokenizer), ("ckpt", args.max_length), name]
    with pytest.raises(ConfigError, match="--system='S': needs a chat template"):
        generate.open_model(parser.parse_args(["ckpt", "--system", "S", "--template", "none"]))
    sampling = generate.sampling_of(parser.parse_args(["ckpt", "--seed", "3"]), stop=("x",))
    assert (sampling.seed, sampling.stop, sampling.max_new_tokens) == (3, ("x",), None)
    assert Generation(context=[1], max_new_tokens=1, stop=bool).seed == 0


REPORT = {
    "yield": {
        "documents": 1200, "documents_empty": 1, "asked": 9, "question_unanswered": 2, "parsed": 7, "kept": 6, "kept_short": 1,
    },
    "calls": {"made": 1000, "replayed": 234, "prompt_tokens": 12345, "completion_tokens": 678, "cost": 1.23456},
}  # fmt: skip


def test_the_yield_is_a_line_a_step():
    assert instruct.yield_table(REPORT).splitlines() == [
        "documents read                                1,200",
        "  without text                                    1",
        "questions asked for                               9",
        "  without an answer so far                        2",
        "parsed                                            7",
        "kept                                              6",
        "  with a short answer                             1",
        "replies that this rests on                    1,234  (12,345 prompt + 678 completion tokens, cost 1.2346)",
    ]
    calls = REPORT["calls"]
    free = instruct.yield_table(REPORT | {"calls": calls | {"cost": 0.0}})  # no price was given: 0.0000 would pass for one
    assert free.endswith("(12,345 prompt + 678 completion tokens)")
    uncounted = instruct.yield_table(REPORT | {"calls": calls | {"prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}})
    assert uncounted.endswith("1,234  (the server counts no tokens, so nothing is known of their cost)")


def test_a_run_with_calls_that_got_no_answer_ends_with_status_1(monkeypatch, tmp_path, capsys):
    asked = []

    async def generated(args, config, prompts, prices):
        asked.append((config, prompts.version, prices))
        return REPORT if config.seed == 1234 else {**REPORT, "yield": {"kept": 6}}

    monkeypatch.setattr(instruct, "_generate", generated)
    command = ["instruct", "generate", "d.jsonl", "--output", str(tmp_path), "--tokenizer", "t", "--endpoint", "http://h"]
    assert main([*command, "--model", "m", "--price-input", "2", "--price-output", "3"]) == 1
    said = capsys.readouterr()
    assert said.err == "2 calls got no answer; the same command asks for them again\n"
    names = [str(tmp_path / name) for name in ("instances.jsonl", "dropped.jsonl", "report.json")]
    assert said.out.endswith(f"wrote {', '.join(names)}\n")
    assert main([*command, "--model", "m", "--seed", "5"]) == 0
    (config, _, prices), (other, _, free) = asked
    assert (config.model, config.seed, other.seed, str(config.documents)) == ("m", 1234, 5, "d.jsonl")
    assert (prices.input, prices.output, free.input, free.output) == (2.0, 3.0, 0.0, 0.0)


def test_who_answers_is_a_server_a_checkpoint_or_rules(monkeypatch):
    made = []
    stand_in(monkeypatch, "nemo_longctx.instruct.local", LocalCheckpoint=lambda path, *, template: ("local", path, template))
    monkeypatch.setattr("nemo_longctx.instruct.client.ChatClient", lambda config, *, api_key: made.append((config, api_key)))
    args = argparse.Namespace(rules=False, checkpoint="c", template="llama2")
    assert instruct._completer(args) == ("local", "c", "llama2")
    args = argparse.Namespace(
        rules=False, checkpoint=None, endpoint="http://h", concurrency=3, api_key_env="MY_KEY", timeout_s=None
    )
    monkeypatch.setenv("MY_KEY", " sk ")
    instruct._completer(args)
    assert made == [(ClientConfig(endpoint="http://h", concurrency=3, api_key_env="MY_KEY"), "sk")]
    assert type(instruct._completer(argparse.Namespace(rules=True))).__name__ == "Rules"


def test_a_report_of_prepare_tells_splits_and_the_first_records_left_out(tmp_path, capsys):
    output = str(tmp_path / "c")
    lines = [f"f.jsonl\t{n}\twhy {n}\tmore\n" for n in range(7)]
    (tmp_path / "c.rejected.tsv").write_text("".join(lines))
    made = {
        "documents": {"train": 1200, "holdout": 0}, "tokens": {"train": 34567, "holdout": 0}, "dtype": "uint16",
        "bad_records": 4, "empty_records": 3, "held_out_from_end": 1000,
    }  # fmt: skip
    prepare._print_report(output, made)
    assert capsys.readouterr().out.splitlines() == [
        f"{output}: 1,200 documents, 34,567 tokens (uint16)",
        "no document fell to the holdout by its share, there are too few: the last 1,000 tokens are held out",
        f"left out: 4 bad and 3 empty records, listed in {output}.rejected.tsv",
        *(f"  f.jsonl:{n}: why {n}\tmore" for n in range(5)),
        "  ... and 2 more",
    ]
    made |= {"documents": {"train": 1, "holdout": 2}, "tokens": {"train": 3, "holdout": 4}, "bad_records": 2}
    del made["held_out_from_end"]
    prepare._print_report(output, made)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"{output}: 1 documents, 3 tokens (uint16)", f"{output}_holdout: 2 documents, 4 tokens (uint16)"]
    assert len(said) == 3 + 5  # of five none is left over
    prepare._print_report(output, made | {"bad_records": 0, "empty_records": 0})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_bar_counts_documents_and_tokens_of_its_own_stretch(monkeypatch):
    notes = []

    class Recorded:
        elapsed = 2.0

        def __init__(self, **options):
            notes.append((options["total"], options["desc"], options["unit"], options["unit_scale"]))

        def note(self, text):
            notes.append(text)

        def update(self, count):
            notes.append(count)

        def close(self):
            notes.append("closed")

    monkeypatch.setattr("nemo_longctx.bars.ProgressBar", Recorded)
    bars = prepare.Bar("judging", "characters")
    bars.close()
    step = bars.open(100)
    step(10, 1000, 3000)
    step(20, 234, 1000)
    bars.open(50)(5, 1, 8)
    bars.close()
    assert notes == [
        (100, "judging", "B", True), "1,000 docs, 1,500 characters/s", 10, "1,234 docs, 2,000 characters/s", 20, "closed",
        (50, "judging", "B", True), "1 docs, 4 characters/s", 5, "closed",
    ]  # fmt: skip
    assert prepare.Bar()._what == "tokenizing"
