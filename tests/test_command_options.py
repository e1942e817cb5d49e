"""What the options of the commands take, which have to be given, and their defaults: lists beside the parsers' own."""

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
TEXTS = """
init --data --gpu --name
train overrides
sft overrides
prepare inputs --output --tokenizer --glob --eod-token --engine
inspect prefixes --mix --curriculum --figure --source --tokenizer --chat-template
curate inputs --output --glob --group --order --parent --tokenizer --engine
synth inputs --output --tokenizer --kinds --glob
rope.show --variant --base --local_base --factor --original_max_position_embeddings --beta_slow --beta_fast --mscale
rope.show --mscale_all_dim --truncate --attention_factor --low_freq_factor --high_freq_factor --short_factor --long_factor
rope.show --scale_base --gamma
rope.plot --variants
plan --model --recipe overrides --curriculum --documents --flops --gpu --mfu-from --recompute --offload --precision
plan --sharding --loss --apply
doctor --model --checkpoint overrides
eval checkpoints --corpus --contexts --probes --tasks --data --max-prompt --lengths --tokenizer
generate checkpoint --template --system --tokenizer --stop
chat checkpoint --template --system --tokenizer
instruct.generate --endpoint --model --template --api-key-env --tokenizer --text-key --id-key --extra-body --omit
ablate study --text --executor
"""
# Those that take no value; of `--x --no-x` the last is named.
SWITCHES = """
init --force
train --print-config
sft --print-config
prepare --bos --no-append-eod --replace-invalid --keep-shards --force --json
inspect --no-figure --document-masking --json
curate --force --json
synth --no-append-eod --force
export --no-verify
import --no-verify
rope.show --json
rope.advise --json
plan --no-vocabulary --no-sp --longest --json
doctor --json
eval --keep-samples --chat --allow-code-execution
generate --force
instruct.generate --rules --force
ablate --dry-run
"""
CHOICES = """
train --dry-run --cfg
sft --dry-run --cfg
prepare --format --on-error
inspect --packing
curate --format --assemble
rope.plot --figures
ablate --scale
completion shell
"""
REQUIRED = """
prepare inputs --output --tokenizer
curate inputs --output
synth inputs --output --tokenizer --length --tokens
export source target
import source target
rope.show --variant
rope.advise --from --to
eval checkpoints
fit-context csv
generate --prompts checkpoint
chat checkpoint
instruct.generate documents --output --tokenizer
ablate study --scale
compare a b
completion shell
"""
DEFAULTS = {
    "synth": {"--no-append-eod": True, "--seed": 1234},
    "rope.show": {"--spread": 2.0, "--head-dim": 128, "--rotary-percent": 1.0},
    "rope.plot": {"--variants": ("rope", "pi:factor=4", "abf:base=500000", "xpos:base=500000"), "--figures": ["decay"],
                  "--out": Path("rope-figures"), "--head-dim": 128, "--rotary-percent": 1.0},
    "rope.advise": {"--base": 1e4, "--bases": (1e4, 1e5, 5e5, 1e6, 1e7), "--head-dim": 128},
    "plan": {"--flops": "causal"},
    "eval": {"--tensor-parallel": 1, "--pipeline-parallel": 1, "--out": Path("evaluation")},
    "fit-context": {"--min-context": 0, "--bootstrap": 1000, "--confidence": 0.95, "--seed": 0},
    "generate": {"--temperature": 0.0, "--top-p": 1.0, "--top-k": 0, "--seed": 0, "--template": "auto"},
    "chat": {"--temperature": 0.0, "--top-p": 1.0, "--top-k": 0, "--seed": 0, "--template": "auto"},
    "instruct.generate": {"--template": "tokenizer", "--price-input": 0.0, "--price-output": 0.0},
    "compare": {"--seed": 1234},
}  # fmt: skip


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


def every_option():
    for command in COMMANDS:
        parser = argparse.ArgumentParser(prog=command)
        importlib.import_module(f"nemo_longctx.commands.{command.replace('-', '_')}").configure(parser)
        for name, action in actions(parser, command):
            if not isinstance(action, argparse._HelpAction):
                yield (name, (action.option_strings or [action.dest])[-1]), action


def options():
    return ((key, action) for key, action in every_option() if action.nargs != 0 and not action.choices)


def test_every_option_says_what_it_is_for():
    silent = []
    for command in COMMANDS:
        parser = argparse.ArgumentParser(prog=command)
        importlib.import_module(f"nemo_longctx.commands.{command.replace('-', '_')}").configure(parser)
        silent += [(name, action.dest) for name, action in actions(parser, command) if not (action.help or "").strip()]
    assert silent == []


def test_every_option_takes_what_it_is_for():
    found = {kind: set() for kind in ("whole", "size", "fraction", "path", "list", "json", "text")}
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
        elif taken(action, "any text") == "any text":
            found["text"].add(key)
    assert found == {
        "whole": named(WHOLE), "size": named(SIZES), "fraction": named(FRACTIONS), "path": named(PATHS), "list": named(LISTS),
        "json": {("eval", "--metadata")}, "text": named(TEXTS),
    }  # fmt: skip


def test_a_default_is_what_its_option_would_take():
    for key, action in options():
        defaults = action.default if isinstance(action.default, list | tuple) else [action.default]
        for default in defaults:
            if action.type is not None and default not in (None, argparse.SUPPRESS):
                assert taken(action, str(default)) == default, key


def test_every_switch_every_choice_and_what_has_to_be_given():
    found = {"switch": set(), "choice": set(), "required": set()}
    for key, action in every_option():
        if action.choices:
            found["choice"].add(key)
        elif action.nargs == 0:
            found["switch"].add(key)
            assert action.default in (None, False) or key == ("synth", "--no-append-eod")
        if action.required and action.nargs != "*":
            found["required"].add(key)
    assert found == {"switch": named(SWITCHES), "choice": named(CHOICES), "required": named(REQUIRED)}


def test_every_default_that_is_a_value():
    found = {}
    for (command, option), action in every_option():
        if action.default not in (None, False, "", argparse.SUPPRESS, [], {}) or action.default == 0 != action.nargs:
            found.setdefault(command, {})[option] = action.default
    assert found == DEFAULTS
