"""What the options of the commands take: one list of all that is no text, beside the parsers' own."""

import argparse
import importlib
from pathlib import Path

from nemo_longctx.cli import COMMANDS

WHOLE = """
init --gpus
prepare --train-tokenizer --seed --workers
inspect --seed --show
curate --workers
synth --facts --seed
export --verify-tokens --max-position-embeddings
import --verify-tokens
rope.show --head-dim
rope.plot --pair --positions --head-dim
rope.advise --head-dim
plan --steps --gpus --tp --pp --cp --vp --micro-batch-size --search
eval --limit --max-length --tensor-parallel --pipeline-parallel
fit-context --bootstrap --seed
generate --max-new-tokens --top-k --seed --max-length
chat --max-new-tokens --top-k --seed --max-length
instruct.generate --concurrency --max-retries --target-length --chunk-tokens --max-chunks-per-document --template-tokens
instruct.generate --max-answer-tokens --form-attempts --stop-after-malformed --seed
compare --seed
"""
SIZES = """
rope.show --seq-length
rope.plot --seq-length
rope.advise --from --to
plan --tokens-per-step --eval-length
prepare --train-tokenizer-bytes --max-input-bytes --max-file-bytes --shard-bytes
inspect --seq-length --total-tokens --at
curate --min-length --max-length --shard-bytes
synth --length --tokens
init --target --tokens
"""
FRACTIONS = """
prepare --holdout
inspect --prompt-loss-weight
curate --near-duplicates --max-repeated-lines --max-repeated-words --max-boilerplate
synth --filler
rope.show --spread --rotary-percent
rope.plot --rotary-percent
rope.advise --base --new-base --bases
plan --mfu --price
fit-context --min-context --confidence
generate --temperature --top-p
chat --temperature --top-p
instruct.generate --price-input --price-output --requests-per-minute --timeout-s --temperature --near-duplicate
"""
PATHS = """
init --checkpoint --output
export source target --tokenizer
import source target
rope.plot --out
rope.advise --png
eval --suite --out
fit-context csv --out
generate --prompts --out
instruct.generate documents --output --prompts --checkpoint
ablate --out
compare a b --output --votes --table
"""
LISTS = """
prepare --keys
synth --keys
curate --keys --split-lengths --gzip-band --languages
"""


def named(text):
    return {(line.split()[0], option) for line in text.strip().splitlines() for option in line.split()[1:]}


def actions(parser, name):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from actions(inner, f"{name}.{word}")
        else:
            yield name, action


def taken(action, text):
    """What the option makes of a text; an error is None."""
    try:
        return (action.type or str)(text)
    except (ValueError, argparse.ArgumentTypeError):
        return None


def options():
    for command in COMMANDS:
        parser = argparse.ArgumentParser(prog=command)
        importlib.import_module(f"nemo_longctx.commands.{command.replace('-', '_')}").configure(parser)
        for name, action in actions(parser, command):
            if action.nargs != 0 and not action.choices:
                yield (name, (action.option_strings or [action.dest])[-1]), action


def test_every_option_says_what_it_is_for():
    silent = []
    for command in COMMANDS:
        parser = argparse.ArgumentParser(prog=command)
        importlib.import_module(f"nemo_longctx.commands.{command.replace('-', '_')}").configure(parser)
        silent += [(name, action.dest) for name, action in actions(parser, command) if not (action.help or "").strip()]
    assert silent == []


def test_every_option_takes_what_it_is_for():
    found = {"whole": set(), "size": set(), "fraction": set(), "path": set(), "list": set(), "json": set()}
    for key, action in options():
        if isinstance(taken(action, "12"), Path):
            found["path"].add(key)
        elif isinstance(taken(action, "12"), tuple):
            found["list"].add(key)
        elif isinstance(taken(action, "{}"), dict):
            found["json"].add(key)
        elif taken(action, "word") is None and taken(action, "1.5") == 1.5:
            found["fraction"].add(key)
        elif taken(action, "16k") == 16_000:
            found["size"].add(key)
        elif taken(action, "word") is None and taken(action, "1.5") is None and taken(action, "12") == 12:
            found["whole"].add(key)
    assert found == {
        "whole": named(WHOLE), "size": named(SIZES), "fraction": named(FRACTIONS), "path": named(PATHS), "list": named(LISTS),
        "json": {("eval", "--metadata")},
    }  # fmt: skip


def test_a_default_is_what_its_option_would_take():
    for key, action in options():
        defaults = action.default if isinstance(action.default, list | tuple) else [action.default]
        for default in defaults:
            if action.type is not None and default not in (None, argparse.SUPPRESS):
                assert taken(action, str(default)) == default, key
