"""Mistyped settings through compose and schema: each ends in one sentence or is taken, none in a traceback, none hangs.

    python benchmarks/settings_fuzz.py [--settings 20000] [--seed 0] [--build] [--output settings_fuzz]

Every key of the schema, nested ones and fields of the model too, gets values of other kinds: text, NaN, infinities, negative,
zero and huge numbers, true, null, lists and mappings, and slips of its own name. Recipes are composed once; a setting is put in
as Hydra would. What is taken is listed by key and value, to be read by eye. With `--build` what the schema takes of
tiny_cpu_base is also built in the host, over a corpus that is there: model, data, trainer, logger, optimizer.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.recipe import load_instruct_recipe, load_recipe

NAN, INF = float("nan"), float("inf")
VALUES: tuple[Any, ...] = (
    None, True, False, "", "no", "off", "abc", "???", "1", "1e-4", -1, 0, 1, 2, 3, 2**31, 2**63, 10**30, -0.5, 0.5, 1.5, 1e300,
    NAN, INF, -INF, [], [1], ["a"], [None], [[1]], [{"a": 1}], {}, {"a": 1}, {"kind": "position"}, "a/b", "\0", "x" * 5000,
)  # fmt: skip
PRETRAINING = ["recipe=tiny_cpu_long", "recipe=llama2_7b", "recipe=llama3_8b", "recipe=tiny_cpu_base"]
TUNING = ["restore_from=base", "data.tokenizer=t", "data.short=[a]", "data.long=[b]", "trainer=cpu"]
MORE_KEYS = (
    "data.packing", "data.num_workers", "data.allow_change", "data.document_masking", "data.cache_dir", "data.test",
    "data.mix.long_length", "data.mix.long_share", "data.mix.max_repeats", "data.mix.balance", "data.mix.on_cap",
    "eval.every", "eval.guard", "eval.tasks", "eval.time_budget", "eval.max_length", "optimizer.epsilon", "optimizer.beta1",
    "trainer.virtual_pipeline_model_parallel_size", "trainer.context_parallel_size", "trainer.sequence_parallel",
    "trainer.recompute", "trainer.offload", "trainer.limit_val_batches", "trainer.log_every_n_steps", "rope.factor",
    "model.num_layers", "model.hidden_dropout", "model.window_size", "model.init_method_std", "model.seq_length",
    "model.forward_step_fn", "model.rotary_base", "model.add_qkv_bias", "lora", "lora.dim", "data.prompt_loss_weight",
    "data.on_too_long", "data.pretraining", "data.template", "restore_from",
)  # fmt: skip

# Why a value of another kind than the recipe's may be taken: key (fnmatch) -> reason. The first that matches counts.
REASONS = {
    "checkpoint": "an empty mapping is all defaults",
    "optimizer": "an empty mapping is all defaults",
    "trainer": "an empty mapping is all defaults",
    "eval": "an empty mapping, or null, measures nothing",
    "eval.tasks": "no task measures nothing",
    "model": "an empty mapping beside restore_from is the checkpoint's own",
    "rope": "null keeps the checkpoint's",
    "lora": "an empty mapping is all defaults; null tunes all weights",
    "resume": "an empty mapping is all defaults",
    "bad_numbers": "an empty mapping is all defaults",
    "output_dir": "a place; numbers are read as text; whether it can be written is seen when the run takes its lock",
    "restore_from": "a place; what is there is looked at before the host is imported",
    "logger*": "a choice, or fields of one",
    "name": "a folder's name; numbers are read as text",
    "seed": "any whole number from 1 on",
    "*.name": "any letters and digits; numbers are read as text",
    "*.path*": "a corpus; numbers are read as text; what is there is looked at when the run is built",
    "*.corpus": "a corpus; as *.path",
    "*.text": "a file or corpus of texts; as *.path",
    "*.label": "any text",
    "data.cache_dir": "a place, made where it is not there; null: the run chooses",
    "data.tokenizer": "a Hugging Face name or directory, which is opened when the run is built",
    "data.template": "a file; opened when the run is built",
    "data.short*": "files of conversations; opened when the run is built",
    "data.long*": "as data.short",
    "data.pretraining*": "null: none; its parts as data.mix",
    "data.after": "a base run; looked at when the run is built",
    "data.validation": "no set validates nothing",
    "data.test": "no set tests nothing",
    "*.seq_length": "any length of a token or more that divides a step, or that a held-out set is cut to",
    "*.micro_batch_size": "any number of windows that divides the batch, or that a set is filled up to",
    "*.samples": "any number; all there are where it is more; null: all",
    "*.documents": "any number; all there are where it is more",
    "*.every_tokens": "any multiple of a step; 0 and what is beyond the run: at its end alone",
    "*.val_every_tokens": "as checkpoint.every_tokens",
    "*.total_tokens": "any multiple of a step that is longer than the warm-up",
    "*.tokens_per_step": "any multiple of the windows' lengths",
    "*.until": "a share; the last is 1",
    "eval.at_*": "switches",
    "eval.every": "any interval; 0 and what is beyond the run: at its ends alone",
    "eval.max_length": "any length; tasks that need more are cut as their docs say",
    "eval.time_budget": "any time; null: no limit",
    "eval.results_cache": "a place",
    "eval.guard*": "any limit; null: no guard",
    "eval.tasks*": "sizes, shares and switches within the bounds of their task",
    "checkpoint.keep*": "any number of checkpoints; the disk is looked at before each",
    "data.mix*": "rules within their bounds, and null for none; what the corpora can give is told when the mix is planned",
    "data.*": "switches, and worker processes of one node",
    "data.blend*": "shares within bounds",
    "curriculum*": "sizes that divide each other; recomputation by its name",
    "optimizer.*": "numbers within their bounds",
    "trainer.*": "sizes that divide each other; intervals and counts of 1 or more",
    "model.*": "a field of the host's classes, of its kind and within its bounds; the class says the rest when it is made, "
    "and a checkpoint's shape is compared",
    "rope.*": "numbers within their bounds; null: the checkpoint's",
    "lora.*": "numbers within their bounds",
    "bad_numbers.*": "numbers and choices within their bounds",
    "resume.*": "a switch",
}


def reason(key: str) -> str | None:
    """Why values of this key are taken; None: nobody has said."""
    name = re.sub(r"\[\d+\]", "", key)
    return next((why for pattern, why in REASONS.items() if fnmatch.fnmatchcase(name, pattern)), None)


def table(found: dict[str, Any], command: str) -> str:
    """Counts, and what was taken with its reason, as Markdown."""
    counts = ", ".join(f"{what} {count:,}" for what, count in sorted(found["counts"].items()))
    lines = [f"`{command}`: {found['settings']:,} settings, {counts}."]
    if "build" in found:
        built = ", ".join(f"{what} {count:,}" for what, count in sorted(found["build"]["counts"].items()))
        lines.append(f"Of `tiny_cpu_base`, built in the host: {found['build']['settings']:,} settings, {built}.")
    lines += ["", "What was taken, and why that is right:", "", "| key | values | why |", "| --- | --- | --- |"]
    for key, values in found["taken"].items():
        shown = ", ".join(f"`{value[:24]}`" for value in values[:8]) + (", ..." if len(values) > 8 else "")
        lines.append(f"| `{key}` | {shown} | {reason(key) or 'NOBODY HAS SAID'} |")
    return "\n".join(lines) + "\n"


def places(values: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys and places in a composed mapping."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for name, item in inner for path in [(*key, name), *places(item, (*key, name))]]


def put(values: dict[str, Any], path: tuple[Any, ...], value: Any, rename: str | None = None) -> dict[str, Any]:
    """A copy of `values` with `value` at `path`, under another last name where `rename` is one."""
    made = copy.deepcopy(values)
    at: Any = made
    for name in path[:-1]:
        if isinstance(at, dict) and not isinstance(at.get(name), (dict, list)):
            at[name] = {}
        at = at[name]
    at[path[-1] if rename is None else rename] = value
    return made


def buildable(folder: Path) -> tuple[Any, dict[str, Any]]:
    """What loads a mapping and builds its run in the host, and the mapping of a run over a corpus in `folder`."""
    import numpy as np

    from nemo_longctx.adapters.nemo.launch.run import build_run
    from nemo_longctx.data.writer import CorpusWriter

    os.chdir(folder)  # a value may be a path
    rng = np.random.default_rng(0)
    for name in ("text", "held_out"):
        with CorpusWriter(folder / name, np.uint16) as writer:
            for _ in range(60):
                writer.add_document(rng.integers(0, 500, rng.integers(20, 3000)))
    task = f"{{kind: position, corpus: {folder}/held_out, seq_length: 64, documents: 4, bins: 4}}"
    held = f"{{name: a, path: {folder}/held_out, seq_length: 64, samples: 8}}"
    asked = [
        "recipe=tiny_cpu_base",
        f"output_dir={folder}",
        "data.tokenizer=null",
        f"data.mix.sources=[{{path: {folder}/text}}]",
    ]
    values = compose([*asked, f"data.validation=[{held}]", f"eval={{tasks: [{task}]}}", "rope=abf"])
    return lambda made: build_run(load_recipe(made)), values


def outcome(load: Any, values: dict[str, Any], seconds: int) -> str:
    """`refused`, `taken`, `hang`, or the name of what escaped."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        load(values)
    except ConfigError as error:
        return "refused" if "\n" not in str(error) else "two lines"
    except TimeoutError:
        return "hang"
    except Exception as error:  # what the fuzz looks for
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)
    return "taken"


def fuzz(settings: int | None, seed: int, seconds: int = 5, base: tuple[Any, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Try so many settings; counts, what escaped, and what was taken (key -> values).

    Args:
        settings: how many; None tries each that there is once.
        seconds: after so long a try hangs.
        base: what loads a mapping, and the mapping; None: the schema, over several recipes.
    """
    bases = [(load_recipe, compose([recipe])) for recipe in PRETRAINING]
    bases.append((load_instruct_recipe, compose(TUNING, config_name="sft")))
    bases = bases if base is None else [base]
    tries = []
    for load, values in bases:
        paths = places(values) + [tuple(key.split(".")) for key in MORE_KEYS]
        tries += [(load, values, path, value, None) for path in dict.fromkeys(paths) for value in VALUES]
        named = [path for path in paths if isinstance(path[-1], str)]
        tries += [(load, values, path, 1, f"{path[-1]}x") for path in named]
    random.Random(seed).shuffle(tries)
    settings = settings or len(tries)
    counts: Counter[str] = Counter()
    escaped: list[dict[str, Any]] = []
    taken: dict[str, set[str]] = {}
    for load, values, path, value, rename in (tries * (settings // len(tries) + 1))[:settings]:
        found = outcome(load, put(values, path, value, rename), seconds)
        counts[found if found in ("refused", "taken", "hang") else "escaped"] += 1
        key = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, [*path[:-1], rename or path[-1]])))
        if found == "taken":
            taken.setdefault(key, set()).add(repr(value)[:40])
        elif found != "refused":
            escaped.append({"key": key, "value": repr(value)[:60], "what": found})
    return {
        "settings": settings,
        "distinct": len(tries),
        "counts": dict(counts),
        "escaped": escaped,
        "taken": {key: sorted(of) for key, of in sorted(taken.items())},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", action="store_true", help="also build in the host what the schema takes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    began, output = time.monotonic(), args.output.absolute() if args.output else None
    found = fuzz(args.settings, args.seed)
    if args.build:
        with tempfile.TemporaryDirectory() as folder:
            found["build"] = fuzz(None, args.seed, seconds=60, base=buildable(Path(folder)))
            os.chdir("/")
        found["escaped"] += found["build"]["escaped"]
        print(f"of one recipe, built in the host: {found['build']['counts']}")
    if output:
        output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(table(found, "python benchmarks/settings_fuzz.py"), encoding="utf-8")
    print(f"{args.settings} settings in {time.monotonic() - began:.0f} s: {found['counts']}")
    for each in found["escaped"][:40]:
        print(f"  {each['key']}={each['value']}: {each['what']}")
    return 1 if found["escaped"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
