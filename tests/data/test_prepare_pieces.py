"""A document encoded in pieces has the tokens of the whole, whatever the tokenizer; and memory does not grow with it."""

import json
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from nemo_longctx.data.pieces import PieceEncoder

PROSE = "The old dog's 12 friends, who can't run, walk over 1,234 hills.\n"
PROSE += 'They re-read: (x_1 = y) "yes"; é ü 汉字，中国 🎉\n\n  end. '
# As in Llama 3, Qwen 2 and DeepSeek: contractions, words with one sign before them, up to three digits, signs with line ends.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bpe(pre=None, normalizer=None, byte_fallback=False, **options):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if byte_fallback else None, byte_fallback=byte_fallback, fuse_unk=True))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = [] if byte_fallback else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))] if byte_fallback else ["<eod>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **options
    )
    words = PROSE * 6 if pre is not None else PROSE.split(" ") * 6  # no token spans words
    tokenizer.train_from_iterator(words if isinstance(words, list) else [words], trainer)
    return tokenizer


def byte_level(**options):
    return bpe(pre_tokenizers.ByteLevel(**options))


def llama3():
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    return bpe(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), normalizers.NFC()
    )


def llama2():
    """No split at all: a normalizer writes a mark before the text and for each space."""
    return bpe(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), byte_fallback=True)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([PROSE] * 6, trainer)
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        [PROSE] * 6, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    )
    return tokenizer


def word_level():
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([PROSE], trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


def added():
    """Added tokens that a text spells, one with a space in it."""
    tokenizer = byte_level(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken("who can"), AddedToken("end", lstrip=True, rstrip=True)])
    return tokenizer


MAKERS = {
    "gpt2": lambda: byte_level(add_prefix_space=False),
    "prefix space": lambda: byte_level(add_prefix_space=True),
    "llama3": llama3,
    "llama2": llama2,
    "unigram": unigram,
    "word piece": word_piece,
    "word level": word_level,
    "added": added,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    made = MAKERS[request.param]()
    made.encode_special_tokens = True
    return made


SOME = st.one_of(
    st.sampled_from(
        [PROSE, " ", "\n", "  ", "\n\n", "a", "The ", "who can", "'s", "1", "_", "，", "汉字", "<eod>", "\u0301", "🎉"]
    ),
    st.text(max_size=12),
)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(SOME, max_size=60), piece=st.integers(40, 200), step=st.integers(1, 90))
@example(parts=[PROSE] * 20, piece=100, step=1000)
@example(parts=["a" * 3000], piece=100, step=64)
@example(parts=[" " * 3000, "b"], piece=100, step=64)
@example(parts=["汉字，" * 300], piece=100, step=64)
def test_pieces_give_the_tokens_of_the_whole(tokenizer, parts, piece, step):
    text = "".join(parts)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    encoder = PieceEncoder(tokenizer, piece=piece, around=60)
    found = [ids.tolist() for ids in encoder.encode(text[start : start + step] for start in range(0, len(text), step))]
    assert [number for ids in found for number in ids] == whole


def test_prose_is_cut_and_each_piece_is_small(tokenizer):
    encoder = PieceEncoder(tokenizer, piece=400, around=100)
    pieces = list(encoder.encode([PROSE] * 60))
    assert len(pieces) > 60 * len(PROSE) / 700
    assert max(ids.size for ids in pieces) <= 700
    assert np.concatenate(pieces).tolist() == tokenizer.encode(PROSE * 60, add_special_tokens=False).ids


def test_text_without_a_safe_place_stays_whole():
    tokenizer = byte_level(add_prefix_space=False)
    assert len(list(PieceEncoder(tokenizer, piece=50, around=20).encode(["a" * 40] * 50))) == 1


@pytest.mark.slow
def test_a_document_of_any_size_takes_little_memory(tmp_path):
    """16 MB in one line; the peak of a fresh process, above that of one document of 100 KB, stays far below its 2.1 GB."""
    import subprocess
    import sys

    byte_level(add_prefix_space=False).save(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    words = [PROSE[i : i + 9] for i in range(100)]
    code = """
import resource, sys
from pathlib import Path
from nemo_longctx.data.readers import split_file
from nemo_longctx.data.shards import ShardJob, tokenize_shard
directory, path = sys.argv[1:]
for name in ("train", "holdout", "reports"):
    Path(directory, name).mkdir(exist_ok=True)
job = ShardJob(number=0, parts=tuple(split_file(path, "jsonl", 1 << 40)), directory=directory, keys=("text",), bos_id=None,
    eod_id=0, dtype="int32", skip_bad=False, replace=False, holdout=0.5, seed=1)
tokenize_shard(job, lambda *steps: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    peaks = []
    for size in (100_000, 16_000_000):
        path = tmp_path / f"{size}.jsonl"
        path.write_text(json.dumps({"text": " ".join(rng.choices(words, k=size // 10))}) + "\n")
        command = [sys.executable, "-c", code, str(tmp_path), str(path)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 150
