"""Retrieval text: exact in length, seeded, in its shares, and of nothing that a probe asks for."""

import hashlib
import json
import random
import re
import string
from pathlib import Path

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.retrieval_text import (
    KINDS,
    SYLLABLES,
    USUAL,
    Maker,
    RetrievalConfig,
    draw_code,
    draw_number,
    is_held_out,
    report,
)

PROSE = (
    "The smith opened his door to the street before six. Nobody in the town had ever seen such a machine at work! What would "
    "the council say about it when they met? The river had risen during the night and taken the bridge. "
) * 8
TEXTS = [PROSE, PROSE[300:] + "\nThey waited for the ferry until noon.\n" * 9]


MADE = Path(__file__).parents[1] / "fixtures" / "retrieval_text.json"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from nemo_longctx.data.tokenization import train_bpe

    directory = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS * 3, 300, str(directory), {})
    return str(directory)


@pytest.fixture(scope="module")
def encode(tokenizer):
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    return lambda text: engine.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def pieces(encode):
    return [sign for sign in string.printable.strip() if len(encode(sign)) == 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [256, 1024])
def test_each_document_is_exact_and_holds_its_facts_twice(encode, pieces, kind, length):
    maker = Maker(RetrievalConfig(length=length, tokens=length * 9, shares={kind: 1.0}), TEXTS, encode, pieces=pieces)
    for number in range(6):
        made = maker.make(number, kind)
        assert len(encode(made.text)) == length - 1  # and the end of the document
        told = [fact for fact in made.facts.values() if made.text.count(fact) >= 2]
        assert told  # what the end says can be looked up
        assert maker.make(number, kind) == made  # of its seed and number alone


def test_kinds_come_in_their_shares_at_every_point():
    config = RetrievalConfig(length=64, tokens=64 * 100, shares={"passkey": 0.5, "records": 0.3, "copy": 0.2})
    kinds = list(config.kinds())
    assert {kind: kinds.count(kind) for kind in config.shares} == {"passkey": 50, "records": 30, "copy": 20}
    for n in (10, 33, 77):
        assert all(abs(kinds[:n].count(kind) - share * n) < 1 for kind, share in config.shares.items())


def test_nothing_that_a_probe_asks_for_is_told(encode):
    from nemo_longctx.eval.probes import WORDS

    maker = Maker(RetrievalConfig(length=256, tokens=2560), TEXTS, encode)
    documents = [maker.make(number, kind) for kind in ("passkey", "records") for number in range(30)]
    codes = [code for number in range(30) for code in maker.make(number, "codes").facts]
    assert not any(map(is_held_out, codes))
    assert is_held_out(draw_code(random.Random(0), held_out=True))
    numbers = [n for made in documents for n in re.findall(r"\d+", made.text)]
    assert numbers
    assert not any(map(is_held_out, numbers))
    assert not any(word in made.text for made in documents for word in WORDS)
    assert not any("pass key" in made.text or "magic number" in made.text for made in documents)
    assert len(set(SYLLABLES)) == len(SYLLABLES)


def test_other_seeds_make_other_documents(encode):
    one, two = (Maker(RetrievalConfig(length=256, tokens=256, seed=seed), TEXTS, encode) for seed in (1, 2))
    assert one.make(0, "records") != two.make(0, "records")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"length": 8}, "length=8"),
        ({"tokens": 100}, "tokens=100"),
        ({"shares": {"passkeys": 1.0}}, "did you mean 'passkey'"),
        ({"shares": {"passkey": 0.5}}, "add up to 1"),
        ({"shares": {"passkey": 1.0, "copy": 0.0}}, r"kinds\.copy"),
        ({"facts": 0}, "facts=0"),
        ({"filler": 1.0}, "filler=1.0"),
    ],
)
def test_settings_are_checked(more, message):
    with pytest.raises(ConfigError, match=message):
        RetrievalConfig(**{"length": 256, "tokens": 4096, **more})


def test_settings_at_their_bounds_and_by_default():
    plain = RetrievalConfig(length=64, tokens=64)
    assert (plain.documents, plain.facts, plain.filler, plain.seed) == (1, 3, 0.5, 1234)
    assert plain.shares == dict.fromkeys(USUAL, 0.2)
    assert RetrievalConfig(length=64, tokens=64, facts=1, filler=0).documents == 1
    assert RetrievalConfig(length=100, tokens=299, shares={"copy": 0.5 + 4e-7, "codes": 0.5}).documents == 2
    for more, told in [
        ({"length": 63, "tokens": 64}, "length=63: give at least 64 tokens a document"),
        ({"tokens": 63}, "tokens=63: give at least the 64 tokens of one document"),
        ({"facts": 0}, "facts=0: give at least 1"),
        ({"filler": 1}, "filler=1: give a share from 0 to below 1"),
        ({"filler": -0.1}, "filler=-0.1: give a share"),
        ({"shares": {"copy": 0.5, "codes": 0.5 + 4e-6}}, "shares add up to 1, these to 1"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(told)):
            RetrievalConfig(**{"length": 64, "tokens": 64, **more})


def test_the_kind_furthest_behind_comes_next_and_of_equals_the_one_of_the_larger_share():
    config = RetrievalConfig(length=64, tokens=64 * 8, shares={"copy": 0.25, "codes": 0.25, "records": 0.5})
    assert list(config.kinds()) == ["records", "copy", "codes", "records"] * 2
    uneven = RetrievalConfig(length=64, tokens=64 * 5, shares={"copy": 0.4, "records": 0.6})
    assert list(uneven.kinds()) == ["records", "copy", "records", "copy", "records"]


def test_a_text_to_hide_things_in_has_twenty_words_and_random_strings_fifteen_pieces():
    config = RetrievalConfig(length=64, tokens=64, shares={"rounds": 0.5, "repeats": 0.25, "copy": 0.25})
    letters = list(string.ascii_letters)
    Maker(config, ["word " * 20], list, pieces=letters[:15])
    with pytest.raises(ConfigError, match="inputs=2: no text of 20 words among them to hide things in"):
        Maker(config, ["word " * 19, "x"], list, pieces=letters)
    with pytest.raises(ConfigError, match=r"kinds='repeats': the tokenizer has 14 printable tokens; leave this kind out"):
        Maker(config, ["word " * 20], list, pieces=letters[:14])
    Maker(RetrievalConfig(length=64, tokens=64, shares={"codes": 1}), ["word " * 20], list)
    for ends, target in ((0, 64), (1, 63), (None, 63)):
        more = {} if ends is None else {"ends": ends}
        assert Maker(config, ["word " * 20], list, pieces=letters, **more).target == target


def test_what_is_kept_for_probes_is_a_sum_of_signs_and_the_draws_are_of_the_rest():
    assert [is_held_out(secret) for secret in ("4", "13", "AE", "Z1", "0")] == [True] * 5
    assert [is_held_out(secret) for secret in ("1", "12", "AB", "ZZ", "5", "2", "3")] == [False] * 7
    rng = random.Random(0)
    for held_out in (True, False):
        for digits in (1, 2):
            drawn = {draw_number(rng, digits, held_out=held_out) for _ in range(1500)}
            every = map(str, range(10 ** (digits - 1), 10**digits))
            assert drawn == {number for number in every if is_held_out(number) == held_out}
        codes = {draw_code(rng, held_out=held_out) for _ in range(50)}
        assert {(len(code), len(set(code)), is_held_out(code)) for code in codes} == {(8, 8, held_out)}
        assert set("".join(codes)) == set(string.ascii_uppercase)


def test_what_lies_between_head_and_tail_is_cut_to_the_token():
    """`_exact` over tokens of one sign each: every length that there is filler for, none of it included."""
    maker = Maker(RetrievalConfig(length=64, tokens=64), ["word " * 20], list)
    for head, filler, tail in [
        (63, 5, 0),
        (0, 63, 0),
        (0, 0, 63),
        (20, 500, 30),
        (0, 62, 0),
        (64, 9, 0),
        (40, 9, 24),
        (60, 3, 0),
    ]:
        made, between = maker._exact("h" * head, "f" * filler, "t" * tail), 63 - head - tail
        assert made == ("h" * head + "f" * between + "t" * tail if 0 <= between <= filler else None)


def test_a_report_counts_documents_tokens_and_shares():
    told = report(RetrievalConfig(length=100, tokens=800), {"copy": 6, "records": 2})
    kinds = {"copy": {"documents": 6, "tokens": 600, "share": 0.75}, "records": {"documents": 2, "tokens": 200, "share": 0.25}}
    assert told == {"documents": 8, "tokens": 800, "length": 100, "kinds": kinds}


def made_now():
    """Hashes of documents of every kind, whose tokens depend on their neighbours: three letters at most, or one sign."""
    encode, found = re.compile(r"\w{1,3}|\W").findall, {}
    texts = [PROSE, PROSE[300:] + "\nThey waited for the ferry until noon.\n" * 9, "no sentence here " * 40]
    for length, facts, filler, ends in ((64, 3, 0.5, 1), (200, 1, 0.0, 0), (700, 5, 0.8, 1), (3000, 3, 0.3, 1)):
        shares = dict.fromkeys(KINDS, 1 / len(KINDS))
        config = RetrievalConfig(length=length, tokens=length, shares=shares, facts=facts, filler=filler, seed=length)
        maker = Maker(config, texts, encode, ends=ends, pieces=string.ascii_letters + string.digits)
        for kind in KINDS:
            for number in range(6 if length < 1000 else 2):
                try:
                    made = maker.make(number, kind)
                    assert len(encode(made.text)) == length - ends
                    digest = hashlib.sha256(json.dumps([made.kind, made.text, made.facts]).encode()).hexdigest()[:12]
                except ConfigError as error:
                    digest = error.mend
                found[f"{kind} {number} of {length}"] = digest
    return found


def test_a_seed_makes_the_documents_that_it_always_made():
    """Else a file half made, or one to be made again elsewhere, would be another: MADE is what this file's `main` wrote."""
    assert made_now() == json.loads(MADE.read_text(encoding="utf-8"))


def test_what_the_command_writes_is_what_prepare_takes(tmp_path, tokenizer, capsys):
    from nemo_longctx.cli import main
    from nemo_longctx.data.corpus import open_corpus

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    output = tmp_path / "synth.jsonl"
    command = ["synth", str(tmp_path / "text.jsonl"), "--output", str(output), "--tokenizer", tokenizer, "--length", "256"]
    assert main([*command, "--tokens", "5120", "--kinds", "passkey=0.75,records=0.25"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"passkey +15 documents +3,840 tokens +75.0%", printed)
    stored = json.loads((tmp_path / "synth.jsonl.made").read_text())
    assert stored["kinds"]["records"]["share"] == 0.25
    first = output.read_bytes()
    assert main([*command, "--tokens", "5120", "--kinds", "passkey=0.75,records=0.25"]) == 0
    assert output.read_bytes() == first
    assert main([*command, "--tokens", "5120", "--kinds", "passkey=0.75,records=0.25", "--seed", "2"]) == 2
    assert "was made with another seed; name another file, or replace it with --force" in capsys.readouterr().err
    assert main([*command, "--tokens", "2560"]) == 2
    assert "another tokens and another kinds;" in capsys.readouterr().err
    assert output.read_bytes() == first
    assert main([*command, "--tokens", "5120", "--seed", "2", "--force"]) == 0
    assert output.read_bytes() != first
    output.unlink()  # a kill between the note and the text
    assert main([*command, "--tokens", "5120", "--kinds", "passkey=0.75,records=0.25"]) == 0
    assert output.read_bytes() == first
    assert main(["prepare", str(output), "--output", str(tmp_path / "corpus"), "--tokenizer", tokenizer, "--workers", "1"]) == 0
    assert open_corpus(str(tmp_path / "corpus")).lengths.tolist() == [256] * 20
    # Made again, it is the file that the corpus is of: a study beside another makes its data by the same lines.
    assert main([*command, "--tokens", "5120", "--kinds", "passkey=0.75,records=0.25"]) == 0
    assert main(["prepare", str(output), "--output", str(tmp_path / "corpus"), "--tokenizer", tokenizer, "--workers", "1"]) == 0
    capsys.readouterr()
    assert main([*command, "--tokens", "5120", "--kinds", "passky"]) == 2
    assert "did you mean 'passkey'" in capsys.readouterr().err


def word_piece(folder):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False))
    made.save(str(folder / "tokenizer.json"))


def sentence_pieces(folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "text").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=80, minloglevel=2
    )
    (folder / "text").unlink()


@pytest.mark.parametrize("make", [word_piece, sentence_pieces])
def test_random_strings_are_of_whole_tokens_whatever_writes_the_spaces(tmp_path, make):
    """Without their spaces the pieces of a WordPiece were one long word, [UNK]; those of a SentencePiece two or three each."""
    from tokenizers import Tokenizer

    from nemo_longctx.commands.synth import _pieces
    from nemo_longctx.data.tokenization import load_tokenizer

    (tmp_path / "tok").mkdir()
    make(tmp_path / "tok")
    engine = Tokenizer.from_str(load_tokenizer(str(tmp_path / "tok")).definition)
    encode = lambda text: engine.encode(text, add_special_tokens=False).ids  # noqa: E731
    pieces = _pieces(engine, encode)
    assert len(pieces) > 40
    assert any(piece.startswith(" ") for piece in pieces)
    assert not {"[UNK]", "<unk>"} & set(pieces)
    rng = random.Random(0)
    sizes = [len(encode("".join(rng.choices(pieces, k=24)))) for _ in range(20)]
    assert 22 <= sum(sizes) / 20 < 30
    for kind in ("rounds", "repeats", "codes"):
        maker = Maker(RetrievalConfig(length=128, tokens=1280, shares={kind: 1.0}), TEXTS, encode, ends=0, pieces=pieces)
        assert len(encode(maker.make(0, kind).text)) == 128


def test_the_command_says_what_it_reads_and_what_not(tmp_path, tokenizer, capsys, monkeypatch):
    from nemo_longctx.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        rows = [{"text": text} for text in TEXTS] + [{"other": "x"}]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["synth", "in", "--tokenizer", tokenizer, "--length", "64", "--tokens", "64", "--kinds", "copy", "--output"]
    assert main([*command, "in/c.jsonl"]) == 0
    told = capsys.readouterr().err
    assert "2 files taken, 0 passed over" in told
    assert "2 records without a text of --keys text are left out" in told
    assert "\r" not in told
    first = (tmp_path / "in" / "c.jsonl").read_bytes()
    (tmp_path / "linked").symlink_to("in")
    assert main([*command, "in/d.jsonl"]) == 0  # not hidden in retrieval text
    told = capsys.readouterr().err
    assert "not read, since synth made them: " in told
    assert "2 files taken" in told
    assert (tmp_path / "in" / "d.jsonl").read_bytes() == first
    command[1] = "linked"
    assert main([*command, "in/e.jsonl"]) == 0
    assert "2 files taken" in capsys.readouterr().err
    monkeypatch.setattr("nemo_longctx.commands.synth.TEXT", 10)
    assert main([*command, "f.jsonl"]) == 0
    assert "characters of the input are enough, up to linked/a.jsonl" in capsys.readouterr().err


if __name__ == "__main__":  # after a change that is meant to make other documents, told in the changelog
    MADE.write_text(json.dumps(made_now(), indent=0) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_that_no_kind_asked_for_takes_is_refused_by_name(kind):
    for name, value, takes in (("facts", 2, ("records", "codes")), ("filler", 0.25, ("records", "rounds"))):
        given = {"length": 64, "tokens": 64, "shares": {kind: 1.0}, name: value}
        if kind in takes:
            assert getattr(RetrievalConfig(**given), name) == value
        else:
            with pytest.raises(ConfigError, match=f"{name}={value}: has no effect on {kind}, only on {' and '.join(takes)}"):
                RetrievalConfig(**given)
        mixed = given | {"shares": {"copy": 0.5, "records": 0.5}}
        assert getattr(RetrievalConfig(**mixed), name) == value
    assert (RetrievalConfig(length=64, tokens=64, shares={kind: 1.0}).facts, RetrievalConfig(length=64, tokens=64).filler) == (
        3,
        0.5,
    )


def test_shares_of_kinds_as_they_are_written():
    from nemo_longctx.commands.synth import _shares

    assert _shares("") == {}
    assert _shares("passkey=0.5, records=0.25,,copy=0.25") == {"passkey": 0.5, "records": 0.25, "copy": 0.25}
    assert _shares("passkey,records,copy,codes") == dict.fromkeys(("passkey", "records", "copy", "codes"), 0.25)
    with pytest.raises(ConfigError, match="--kinds='passkey=half': 'half' is no share; write kind=share"):
        _shares("passkey=half")


def test_what_another_hand_wrote_is_not_written_over(tmp_path):
    from nemo_longctx.commands import synth

    output, note = tmp_path / "a.jsonl", tmp_path / "a.jsonl.made"
    settings = {"seed": 1, "asked": {"length": 64, "keys": "text"}}
    synth._keep_others(["b.jsonl"], output)
    synth._keep_made(output, settings)
    with pytest.raises(ConfigError, match="is one of the inputs and would be replaced"):
        synth._keep_others(["b.jsonl", str(output)], output)
    output.write_text("x")
    with pytest.raises(ConfigError, match="something else is there; name another file, or remove it"):
        synth._keep_others(["b.jsonl"], output)
    note.write_text("{")
    synth._keep_others(["b.jsonl"], output)
    with pytest.raises(ConfigError, match=r"a\.jsonl\.made is no note of what made it"):
        synth._keep_made(output, settings)
    note.write_text(json.dumps({"seed": 1, "asked": {"length": 64, "keys": "text"}, "documents": 9}))
    synth._keep_made(output, settings)
    for change, said in (
        ({"seed": 2}, "another seed;"),
        ({"asked": {"length": 65, "keys": "t"}}, "another length and another keys;"),
    ):
        with pytest.raises(ConfigError, match=f"was made with {said} name another file, or replace it with --force"):
            synth._keep_made(output, settings | change)
    assert [synth._printable(text) for text in ("a", " a", "", "a\n", "\ufffd")] == [True, True, False, False, False]


def test_the_note_says_all_that_made_the_text(tmp_path, tokenizer, capsys):
    from nemo_longctx.cli import main
    from nemo_longctx.data.tokenization import load_tokenizer

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS), encoding="utf-8")
    output, source = tmp_path / "new" / "o.jsonl", str(tmp_path / "in")
    command = ["synth", source, "--output", str(output), "--tokenizer", tokenizer, "--length", "64", "--tokens", "640"]
    command += ["--kinds", "records", "--keys", "body", "--facts", "2", "--filler", "0.25", "--seed", "7"]
    for more, ends in (([], 1), (["--no-append-eod", "--force", "--glob", "*.jsonl"], 0)):
        assert main([*command, *more]) == 0
        note = json.loads((tmp_path / "new" / "o.jsonl.made").read_text())
        asked = {"length": 64, "tokens": 640, "kinds": {"records": 1.0}, "keys": "body", "glob": ["*.jsonl"] if more else []}
        expected = {"inputs": [source], "tokenizer": tokenizer, "tokenizer_sha256": load_tokenizer(tokenizer).sha256, "seed": 7,
                    "facts": 2, "filler": 0.25, "appended_end_tokens": ends, "asked": asked}  # fmt: skip
        assert {key: note[key] for key in expected} == expected
        said = capsys.readouterr().out.splitlines()
        assert said[0] == f"{output}: 10 documents of 64 tokens, 640 in all"
        assert said[1] == f"  records        {10:>9,} documents{640:>15,} tokens{1:>8.1%}"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["facts", "kind", "text"]] * 10
    for words, said in (
        (["--output", str(tmp_path / "o.txt")], "name a file that ends in .jsonl, which prepare reads"),
        (["--keys", "none", "--force"], "no text was read from them; are the files and --keys right?"),
    ):
        assert main([*command, *words]) == 2
        assert said in capsys.readouterr().err
