"""`nemo-longctx`: one command a job. A command's module is imported only when it runs, so that `--help` needs no torch."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from nemo_longctx.capability import missing_extra, package_versions
from nemo_longctx.config import did_you_mean

# name -> what `--help` says of it. The module is nemo_longctx.commands.NAME and has
# configure(parser: ArgumentParser) -> None and run(args: Namespace) -> int (the exit status).
COMMANDS = {
    "init": "a commented recipe of your own from a checkpoint, a target length, data and a machine, and the next commands",
    "train": "continual pretraining at a longer context: compose a recipe, check it, run it through NeMo's trainer",
    "sft": "instruction tuning of an extended model on short conversations and generated long ones",
    "prepare": "JSONL, Parquet or text files -> Megatron's .bin/.idx, in parallel and resumable; trains a tokenizer if asked",
    "inspect": "documents, tokens, lengths, what windows cut and what a mix will deliver, from the index alone",
    "curate": "documents worth training on: rules, exact and near duplicates, long documents assembled; each drop is listed",
    "synth": "training text that can only be predicted by looking back: passkeys, records, copies; JSONL that prepare takes",
    "export": "a NeMo checkpoint -> a Hugging Face directory, RoPE variant and tokenizer included, verified by reloading",
    "import": "a Hugging Face directory -> a NeMo checkpoint, RoPE variant and tokenizer included",
    "rope": "frequencies, score decay, granularity and wavelengths of RoPE variants; advice for a target length",
    "plan": "FLOPs, memory, time, the fastest layout and the longest length of a run, before it is paid for",
    "doctor": "versions, what this machine can use, what each missing part costs and how to get it",
    "eval": "loss by position, probes and lm-eval tasks of NeMo or Hugging Face checkpoints, as tables, figures and one page",
    "fit-context": "fit the context scaling law L(c) = (alpha/c)^beta + gamma to a table of losses, with intervals and figure",
    "generate": "a checkpoint's answers to a file of prompts, in the form that compare reads",
    "chat": "talk to a NeMo or Hugging Face checkpoint on the terminal",
    "instruct": "make long question-answer data from unlabelled documents by a short-context model (job: generate)",
    "ablate": "the paper's comparisons, run again: encodings, mix, curriculum, instruction data, scaling; pages of verdicts",
    "compare": "a page for blind side-by-side votes on two models' answers, and the table with 95 % intervals from the votes",
    "completion": "a script that lets bash, zsh or fish complete commands, options and settings",
}

RESUMED = frozenset({"train", "sft", "prepare", "curate", "instruct", "ablate"})  # their work is kept as it is done


class _Parser(argparse.ArgumentParser):
    """Suggests the option that was meant, or the form of a setting, where argparse only says that it knows none."""

    def error(self, message):
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        word = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        option, _, value = word.partition("=")
        if word != message and option.startswith("--"):
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.85)
            if near and near[0] != option:
                message += f"; did you mean {near[0]}?"
            elif any(action.metavar == "KEY=VALUE" for action in self._actions):
                message += f"; a setting is written without dashes: {option.removeprefix('--')}={value or 'VALUE'}"
        super().error(message)


class _Version(argparse.Action):
    """Finds the versions only when asked, since that reads the metadata of every installed package."""

    def __call__(self, parser, namespace, values, option_string=None):
        found = package_versions()
        print(f"nemo-longctx {found.pop('nemo-longctx') or 'not installed'}")
        print("  ".join(f"{name} {version or 'not installed'}" for name, version in found.items()))
        parser.exit()


def _sentence(error: Exception) -> str:
    """What an error says; the system's own without its number."""
    if isinstance(error, OSError) and error.filename and error.strerror and error.filename2 is None:
        return f"{os.fsdecode(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)


def _at_home(word: str) -> str:
    """`--output=~/x` and a quoted `~/x` as the shell reads `~/x`: else a folder called `~` would be made."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{os.path.expanduser(value)}" if value.startswith("~/") else word


def _arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Of `COMMAND ...`: inputs may stand on both sides of an option, as in `prepare a --output b c`."""
    command, *rest = argv
    rest = [_at_home(word) for word in rest]
    if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):  # what argparse cannot intermix
        args = parser.parse_args(rest)
    else:
        separate = parser.get_default("separate") or (lambda arguments: arguments)
        args = parser.parse_intermixed_args(separate(rest))
    args.command = command
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A user's mistake (ValueError, a missing file, a full disk) ends in one sentence and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal or log of another encoding loses a letter, not the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated")  # torch's, of a package that the host brings
    name = next((a for a in argv if not a.startswith("-")), None)
    parser = _Parser(prog="nemo-longctx", description="Long-context continual pretraining for NVIDIA NeMo.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions that a result depends on, and exit")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, line in COMMANDS.items():
        command_parser = sub.add_parser(command, help=line.replace("%", "%%"), description=line)  # argparse formats help alone
        if command == name:
            module = importlib.import_module(f"nemo_longctx.commands.{command.replace('-', '_')}")
            module.configure(command_parser)
    if name is not None and name not in COMMANDS:
        parser.error(f"no command {name!r}: {did_you_mean(name, COMMANDS)}")
    args = _arguments(sub.choices[name], argv) if argv and argv[0] == name else parser.parse_args(argv)
    try:
        return module.run(args)
    except BrokenPipeError:  # the reader (`| head`) has seen enough; nothing is left to say, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if os.environ.get("NEMO_LONGCTX_DEBUG") or (sentence := missing_extra(error)) is None:
            raise
        print(f"nemo-longctx {args.command}: error: {sentence}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if os.environ.get("NEMO_LONGCTX_DEBUG"):
            raise
        print(f"nemo-longctx {args.command}: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        next_time = "goes on from here" if name in RESUMED else "begins anew"
        print(f"interrupted; the same command {next_time}", file=sys.stderr)
        return 130
    except BaseException as error:
        from nemo_longctx.checkpoints import failed_checkpoint

        if os.environ.get("NEMO_LONGCTX_DEBUG") or (sentence := failed_checkpoint(error)) is None:
            raise
        print(f"nemo-longctx {args.command}: error: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
