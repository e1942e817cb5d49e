"""What an evaluation needs from the disk, looked at before anything is loaded or trained: a name with a slip costs no run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import is_corpus, open_corpus
from nemo_longctx.data.tokenization import check_hub_name
from nemo_longctx.eval.config import AnswersTask, ContextTask, EvalConfig, HarnessTask, PositionTask, ProbeTask
from nemo_longctx.eval.question_data import FILES, read_labelled
from nemo_longctx.hf.chat import day_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def check_eval(config: EvalConfig | None, *, check_names: Callable[[HarnessTask], None] | None = None) -> None:
    """Refuse an `eval` block that could not be measured.

    Args:
        check_names: refuses lm-eval tasks that do not exist; called for each of their blocks.

    Raises:
        ConfigError: a corpus, text, folder or tokenizer that is not there, with what is; or as `check_names`.
    """
    if config is None:
        return
    for number, task in enumerate(config.tasks):
        key = f"eval.tasks[{number}]"
        if isinstance(task, PositionTask | ContextTask):
            if not is_corpus(task.corpus):
                check_there(f"{key}.corpus", task.corpus, suffix=".idx")
        elif isinstance(task, ProbeTask):
            if not is_corpus(task.text):
                check_there(f"{key}.text", task.text, what="no such text, and no corpus of that prefix")
                if Path(task.text).is_dir():
                    raise ConfigError(f"{key}.text", task.text, "this directory holds no .idx; name a text file or a corpus")
            if task.probes.data:
                check_there(f"{key}.probes.data", task.probes.data)
                read_labelled(task.probes.data)
                _check_questions(f"{key}.probes.data", task.probes.data, task.probes.kinds)
        elif isinstance(task, AnswersTask):
            check_there(f"{key}.conversations", task.conversations)
        elif isinstance(task, HarnessTask):
            if task.include_path is not None:
                check_there(f"{key}.include_path", task.include_path)
            if "data" in task.metadata and task.metadata["data"] is not None:
                check_there(f"{key}.metadata.data", str(task.metadata["data"]))
            if check_names is not None:
                check_names(task)
    if config.tokenizer is not None:
        check_tokenizer("eval.tokenizer", config.tokenizer)


def _check_questions(key: str, folder: str, kinds: tuple[str, ...]) -> None:
    for kind, name in (("ruler_qa_1", "squad"), ("ruler_qa_2", "hotpotqa")):
        if kind in kinds and not any((Path(folder) / file).is_file() for file in FILES[name]):
            raise ConfigError(key, folder, f"holds none of {', '.join(FILES[name])}, which {kind} asks from")


def check_there(key: str, path: str, *, suffix: str = "", what: str = "") -> None:
    """Refuse a path where nothing is, with the likest name beside it.

    Args:
        suffix: what the file's name has beyond `path`, which is left out of the advice too. what: is not there.
    """
    if Path(path + suffix).exists():
        return
    parent = Path(path).parent
    there = [one.name for one in sorted(parent.iterdir())] if parent.is_dir() else []
    names = [name.removesuffix(suffix) for name in there if name.endswith(suffix)]
    near = difflib.get_close_matches(Path(path).name, names, n=1)  # the folder, which all share, would make any two alike
    what = what or (f"{path}{suffix} is missing" if suffix else "no such file or directory")
    where = f"{parent} holds {len(names)} others, none like it" if parent.is_dir() else f"{parent} is not there either"
    raise ConfigError(key, path, f"{what}, " + (f"did you mean {str(parent / near[0])!r}?" if near else where))


def check_name(key: str, name: str) -> None:
    """Refuse what is neither a path nor can be a name on the hub."""
    parent = Path(name).parent
    if Path(name).exists():
        return
    if name.startswith((".", "/", "~")) or len(Path(name).parts) > 2 or (len(Path(name).parts) > 1 and parent.is_dir()):
        check_there(key, name)
    near = difflib.get_close_matches(name, [one.name for one in Path(".").iterdir()], n=1)
    try:
        check_hub_name(key, name)
    except ConfigError as unknown:
        if not near:
            raise
        raise ConfigError(key, name, f"{unknown.mend}; did you mean {near[0]!r} here?") from None


def told_together(*checks: Callable[[], object]) -> None:
    """Make every check, and tell the mistakes of all in one error: who mends one at a time waits for each.

    Raises:
        ConfigError: of the first, followed by what the others say.
    """
    errors: list[ConfigError] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            errors.append(error)
    if errors:
        first, *more = errors
        told = dict.fromkeys(str(error) for error in more if str(error) != str(first))
        raise ConfigError(first.key, first.value, "; and ".join([str(first.mend), *told]))


def plainly_asked(tasks: Sequence[Any], tokenizer: Any) -> list[str]:
    """A sentence where the tokenizer has a chat template and something is asked without it: a tuned model was not taught to go
    on with plain text, and may score far below what it can.

    Args:
        tasks: of a suite. tokenizer: transformers', of the model; None asks nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    plain = [task.name for task in tasks if isinstance(task, ProbeTask) and not task.probes.chat]
    plain += [task.name for task in tasks if isinstance(task, HarnessTask) and not task.apply_chat_template]
    day = day_of(tokenizer)
    dated = [task.name for task in tasks if isinstance(task, AnswersTask | ProbeTask | HarnessTask) and task.name not in plain]
    said = [f"the chat template writes the day, which is {day} in all that is asked here"] if day and dated else []
    if plain:
        named = ", ".join(plain[:3]) + (f" and {len(plain) - 3} more" if len(plain) > 3 else "")
        said.append(
            f"the tokenizer has a chat template, and {named} asked without it, in plain text, as a base model is asked; for a "
            "tuned model set `chat: true` of probes and `apply_chat_template: true` of lm_eval (eval --chat)"
        )
    return said


LOOKED_AT = 64  # documents of a corpus


def without_bos(tasks: Sequence[Any], tokenizer: Any) -> list[str]:
    """A sentence for each corpus that lacks the token with which the tokenizer begins every text: a model that never read
    without it (Gemma, Llama 3) loses more on such text than on any other, at every length.

    Args:
        tasks: of a suite, whose corpora are there.
        tokenizer: transformers', of the model.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return []
    told = []
    for path in dict.fromkeys(task.corpus for task in tasks if isinstance(task, PositionTask)):
        corpus = open_corpus(path)
        some = [n for n in range(min(LOOKED_AT, len(corpus.lengths))) if corpus.lengths[n]]
        begun = sum(int(corpus.tokens(n, 0, 1)[0]) == bos for n in some)
        if begun < len(some):
            told.append(
                f"{path}: {len(some) - begun} of {len(some)} documents do not begin with {tokenizer.bos_token}, as every text "
                "does by this tokenizer; losses without it are higher than the model's own (prepare --bos)"
            )
    for path in dict.fromkeys(task.corpus for task in tasks if isinstance(task, ContextTask)):
        told.append(
            f"{path}: fixed targets are read after text from inside documents, without the {tokenizer.bos_token} that this "
            "tokenizer begins with; a model that never read so loses more at every context"
        )
    return told


def check_tokenizer(key: str, name: str) -> None:
    """Refuse a tokenizer's path with a slip, and a folder without one."""
    check_name(key, name)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise ConfigError(key, name, f"holds none of {', '.join(TOKENIZER_FILES)}; name a tokenizer beside it")
