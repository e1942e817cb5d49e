"""What is typed reaches the schema as it was meant: on either side of an option, beyond Hydra's grammar, with `~`."""

import contextlib
import io
import sys

import pytest

from nemo_longctx.cli import _at_home, main
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.overrides import places, readable

BASE = "recipe=tiny_cpu_base"


@pytest.mark.parametrize(
    "text", ["runs/äö", "/data/x#1", "a,b", "my run (1)", "a=b,c", "it's", "a\\'b", "x\\", "~user", "[", "{a", "50%;x"]
)
def test_plain_text_is_itself_whatever_hydra_s_grammar_says(text):
    if text[0] in "[{":
        with pytest.raises(ConfigError, match=r"restore_from='.*': cannot be read: put text .* in quotes"):
            compose([BASE, f"restore_from={text}"])
    else:
        assert compose([BASE, f"restore_from={text}"])["restore_from"] == text


def test_numbers_and_words_stay_what_they_are():
    read = compose([BASE, "optimizer.lr=1e-4", "seed=7", "data.document_masking=true", "data.tokenizer=null", "name='7'"])
    assert (read["optimizer"]["lr"], read["seed"], read["data"]["document_masking"]) == (1e-4, 7, True)
    assert read["data"]["tokenizer"] is None
    assert read["name"] == "7"
    assert readable("optimizer.lr", "0,1") == "'0,1'"  # a decimal comma is no number, and no list either


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ("a b", "a b"),
        ("50%", "50%"),
        ("${x}", "${x}"),
        ("a(b)", "'a(b)'"),
        ("a#b", "'a#b'"),
        ("a=b", "'a=b'"),
        ("[1, 2]", "[1, 2]"),
        ("[~a, b]", "['~a', b]"),
        ("{a: ~b}", "{a: '~b'}"),
        ("['x", "['x"),  # neither's: Hydra says so
    ],
)
def test_what_hydra_reads_is_left_as_it_is(value, given):
    assert readable("data.tokenizer", value) == given


@pytest.mark.parametrize(("text", "refused"), [("$HOME", True), ("$HOME/x", True), ("$HOMEx y", False), ("a/$HOME", False)])
def test_a_variable_that_no_shell_replaces_is_refused_at_the_front_alone(text, refused):
    with pytest.raises(ConfigError, match=r"oc\.env:HOME") if refused else contextlib.nullcontext():
        assert places({"a": text}) == {"a": text}


def test_lists_are_read_as_yaml_where_hydra_cannot():
    (source,) = compose([BASE, "data.mix.sources=[{path: größe/x#1, weight: 5e-1}]"])["data"]["mix"]["sources"]
    assert source == {"path": "größe/x#1", "weight": 0.5}


def test_a_home_is_a_home_and_a_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    read = compose([BASE, "output_dir=~/runs", "data.mix.sources=[{path: ~/x}]"])
    assert read["output_dir"] == f"{tmp_path}/runs"
    assert read["data"]["mix"]["sources"][0]["path"] == f"{tmp_path}/x"
    assert read["data"]["tokenizer"] == f"{tmp_path}/runs/data/tokenizer"  # made of it
    with pytest.raises(ConfigError, match=r"output_dir='\$HOME/x': .* \$\{oc.env:HOME\}"):
        compose([BASE, "output_dir=$HOME/x"])
    assert places({"template": "$5 a day"}) == {"template": "$5 a day"}


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (
            "output_dir=${HOME}/x",
            r"output_dir='\$\{HOME\}': no setting has this name; an environment variable is \$\{oc.env:HOME\}",
        ),
        ("output_dir=${oc.env:LONGCTX_NONE}", "no such environment variable"),
        ("data.validation={name: h, path: x}", "data.validation='.*': is of another kind than what it replaces"),
        ("sft=short", "sft='short': this command has no such group"),
    ],
)
def test_hydra_s_errors_name_the_override(item, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose([BASE, item])


def test_of_two_values_of_one_key_the_last_counts_wherever_an_option_stands(capsys):
    first, second = "curriculum.total_tokens=2048", "curriculum.total_tokens=4096"
    warmup, none = "optimizer.warmup_tokens=0", "data.validation=[]"
    for words in (
        [BASE, first, "--dry-run", second, warmup, none],
        [BASE, first, warmup, "--dry-run", none, second],
        ["--dry-run", BASE, first, second, warmup, none],
    ):
        main(["train", *words])
        assert "curriculum  4,096 tokens" in capsys.readouterr().out
    assert main(["train", BASE, "--print-config", none]) == 0
    assert "validation: []" in capsys.readouterr().out


def test_inputs_may_stand_behind_options(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with pytest.raises(SystemExit):
        main(["prepare", "x", "--output", "y", "--tokenizer", "z", "w", "--holdout"])
    assert main(["prepare", str(tmp_path / "a"), "--output", str(tmp_path / "y"), "--tokenizer", "z", "nowhere"]) == 2
    assert "unrecognized" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["prepare", "x.jsonl", "--output", "y", "--tokenizer", "z", "--keys", "text,text"],
            "keys='text,text': a key is named twice",
        ),
        (["curate", "x.jsonl", "--output", "y.jsonl", "--keys", "text,text"], "keys='text,text': a key is named twice"),
        (["inspect", "x", "--figure", "y.png", "--no-figure"], "figure='y.png': it has no effect with --no-figure"),
        (["inspect", "d/long", "d/long"], "PREFIX='d/long': is named twice; leave one out"),
        (["fit-context", "nowhere.csv"], "error: nowhere.csv: no such file or directory"),
        (["rope", "advise", "--from", "32Ki", "--to", "4Ki"], "--to=4096: must be above the trained length, 32768"),
    ],
)
def test_what_is_said_twice_or_in_vain_is_refused_in_a_sentence(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


def test_a_picture_is_where_it_is_said_to_be(tmp_path):
    pytest.importorskip("matplotlib")
    from nemo_longctx.report.plots import new_figure, save

    figure, _ = new_figure()
    assert save(figure, tmp_path / "lengths").is_file()
    with pytest.raises(ConfigError, match="is no kind of picture"):
        save(figure, tmp_path / "lengths.txt")


def test_a_plan_of_few_tokens_does_not_say_that_there_are_none(capsys):
    assert main(["plan", "--model", "llama2_7b", "--steps", "2", "--tokens-per-step", "8Ki", "--curriculum", "4096"]) == 0
    said = capsys.readouterr().out
    assert "0.02M" in said
    assert "0.0B" not in said


def test_retrieval_text_is_not_written_over_what_is_read_or_another_s(tmp_path, capsys):
    text, other = tmp_path / "text.jsonl", tmp_path / "other.jsonl"
    for each in (text, other):
        each.write_text('{"text": "a"}\n')
    for output, why in ((text, "is one of the inputs"), (other, "something else is there")):
        words = ["synth", str(text), "--output", str(output), "--tokenizer", "z", "--length", "1Ki", "--tokens", "4Ki"]
        assert main(words) == 2
        assert why in capsys.readouterr().err
        assert output.read_text() == '{"text": "a"}\n'


def test_an_output_of_another_encoding_loses_a_letter_and_not_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    errors = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stderr", errors)
    assert main(["inspect", "gr\u00f6\u00dfe"]) == 2
    assert b"gr\\xf6\\xdfe.idx is missing" in errors.buffer.getvalue()


@pytest.mark.parametrize("words", [["inspect", "~/x"], ["fit-context", "y.csv", "--output=~/x"]])
def test_a_home_that_the_shell_left_is_one(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _at_home(words[-1]).endswith(f"{tmp_path}/x")
    assert _at_home("--name=a~/b") == "--name=a~/b"
    if words[0] == "inspect":
        assert main(words) == 2
        assert f"corpus='{tmp_path}/x'" in capsys.readouterr().err
