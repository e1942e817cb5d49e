"""Retrieval text: exact in length, seeded, in its shares, and of nothing that a probe asks for."""

import json
import random
import re
import string

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.retrieval_text import KINDS, SYLLABLES, Maker, RetrievalConfig, draw_code, is_held_out

PROSE = (
    "The smith opened his door to the street before six. Nobody in the town had ever seen such a machine at work! What would "
    "the council say about it when they met? The river had risen during the night and taken the bridge. "
) * 8
TEXTS = [PROSE, PROSE[300:] + "\nThey waited for the ferry until noon.\n" * 9]


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
