"""Every key of `eval`: what is measured, when, and what the guard watches; types, defaults and checks without torch or host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_longctx.config import ConfigError, build, did_you_mean
from nemo_longctx.eval import probes
from nemo_longctx.eval.guard import GuardConfig

OWN_POLICIES = ("left", "middle")  # of lm-eval's own tasks, which do not say what in their prompts is the question
MOST_BINS = 1_000_000  # sums and counts of each are kept for each document


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionTask:
    """Loss by position over documents of an indexed corpus.

    Attributes:
        corpus: prefix of a `.bin/.idx` pair, or a directory of shards.
        seq_length: tokens of each document that are predicted.
        documents: how many, evenly spaced among those long enough; the longest ones where too few are.
        bins: equal bins; 0 for bins that grow with the position, as the fit of L(c) wants them.
        guard: watch the mean loss of these documents against the first evaluation.
        label: tells tasks of one length apart, say by their corpus.
    """

    kind: str = dataclasses.field(default="position", init=False)

    corpus: str
    seq_length: int
    documents: int = 32
    bins: int = 64
    guard: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("seq_length", "documents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name}", getattr(self, name), "give a positive number")
        if not 0 <= self.bins <= MOST_BINS:
            raise ConfigError("eval.bins", self.bins, f"give up to {MOST_BINS:,} bins, or 0 for bins that grow")

    @property
    def name(self) -> str:
        return "_".join(["position", *([self.label] if self.label else []), str(self.seq_length)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextTask:
    """Loss on fixed targets against the context before them (`nemo_longctx.eval.context`).

    Attributes:
        corpus: prefix of a `.bin/.idx` pair of held-out documents, or a directory of shards.
        contexts: tokens before the targets; documents shorter than the longest and the targets are not read.
        targets: tokens predicted at each context, the last ones of a block.
        documents: how many, evenly spaced among those long enough.
        blocks: at most so many blocks of targets a document, side by side; the document stays the unit of intervals.
        short: the context that gains are counted from, the old length's; None: the shortest.
        key_threshold: fall of a token's loss from `short` to the longest context that makes it a key token, nats.
        label: tells tasks of one longest context apart.
    """

    kind: str = dataclasses.field(default="context", init=False)

    corpus: str
    contexts: tuple[int, ...]
    targets: int = 64
    documents: int = 64
    blocks: int = 1
    short: int | None = None
    key_threshold: float = 2.0
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("targets", "documents", "blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name}", getattr(self, name), "give a positive number")
        if len(self.contexts) < 2 or min(self.contexts) < 1 or list(self.contexts) != sorted(set(self.contexts)):
            raise ConfigError(
                "eval.contexts", self.contexts, "give at least two rising numbers of tokens: [192, 448, 960, 1984]"
            )
        if self.short is None:
            object.__setattr__(self, "short", self.contexts[0])
        if self.short not in self.contexts or self.short == self.contexts[-1]:
            raise ConfigError(
                "eval.short", self.short, f"name one of the contexts below the longest: {list(self.contexts[:-1])}"
            )
        if not self.key_threshold > 0:
            raise ConfigError("eval.key_threshold", self.key_threshold, "give a fall of the loss above 0, in nats")

    @property
    def needed(self) -> int:
        """Tokens of the longest input and the targets."""
        return self.contexts[-1] + self.targets

    @property
    def name(self) -> str:
        return "_".join(["context", *([self.label] if self.label else []), str(self.contexts[-1])])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """Things hidden in ordinary text, and asked for.

    Attributes:
        text: a JSONL file (`text` field), a plain text file, or the prefix of an indexed corpus.
        probes: which ones.
        cache: folder in which probes are kept for the next evaluation; None: they are made anew.
    """

    kind: str = dataclasses.field(default="probes", init=False)

    text: str
    probes: probes.ProbeConfig = dataclasses.field(default_factory=probes.ProbeConfig)
    cache: str | None = None

    @property
    def name(self) -> str:
        return "probes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersTask:
    """Loss on the answers of held-out conversations, read with all that stands before them.

    Attributes:
        conversations: JSONL file, {"messages": [...]} a line, as instruction tuning reads.
        template: `tokenizer`, `llama2`, or the path of a Jinja file; what the model was or will be tuned with.
        samples: how many, evenly spaced among those that the model can read; fewer where there are fewer.
        guard: watch the mean loss of these answers against the first evaluation.
        label: tells tasks of several files apart.
    """

    kind: str = dataclasses.field(default="answers", init=False)

    conversations: str
    template: str = "tokenizer"
    samples: int = 64
    guard: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError("eval.samples", self.samples, "give a positive number")

    @property
    def name(self) -> str:
        return f"answers_{self.label}" if self.label else "answers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """lm-eval tasks: ours, its own (`include_defaults`, which takes it some seconds to index), or from `include_path`.

    Attributes:
        tasks: names of tasks or groups.
        limit: samples of each; None: all.
        num_fewshot: shots in place of the tasks' own; None: theirs.
        include_path: folder of task files of your own.
        include_defaults: whether lm-eval's own tasks are looked for too.
        metadata: passed to the tasks' loaders, say {data: folder}.
        apply_chat_template: ask as a user in the tokenizer's chat template, shots as turns of the conversation.
        allow_code_execution: let tasks run the code that the model wrote (HumanEval, MBPP); only in a sandbox.
        guard: watch the samples' scores against the first evaluation.
        label: tells blocks of the same tasks apart, say by their `max_prompt`; results are named task@label.
        policy: where prompts of lm-eval's own tasks that are too long are cut, `left` or `middle`; ours say it themselves.
        max_prompt: tokens of those prompts at most; None: what the model reads. Of ours: `metadata: {max_prompt: N}`.
    """

    kind: str = dataclasses.field(default="lm_eval", init=False)

    tasks: tuple[Any, ...]  # of texts; checked below
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    include_defaults: bool = False
    metadata: Any = dataclasses.field(default_factory=dict)
    apply_chat_template: bool = False
    allow_code_execution: bool = False
    guard: bool = False
    label: str = ""
    policy: str = "left"
    max_prompt: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in OWN_POLICIES:
            raise ConfigError("eval.policy", self.policy, f"unknown policy, {did_you_mean(str(self.policy), OWN_POLICIES)}")
        if self.max_prompt is not None and self.max_prompt < 1:
            raise ConfigError("eval.max_prompt", self.max_prompt, "give at least 1 token, or leave it out")
        if isinstance(self.tasks, str) or not self.tasks:
            raise ConfigError("eval.tasks", self.tasks, "give a list of lm-eval task names")
        if any(not isinstance(name, str) for name in self.tasks):
            raise ConfigError("eval.tasks", self.tasks, "each is the name of an lm-eval task")
        if self.limit is not None and self.limit < 1:
            raise ConfigError("eval.limit", self.limit, "give 1 or more samples, or none of it for all")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError("eval.num_fewshot", self.num_fewshot, "give 0 or more shots")
        if not isinstance(self.metadata, Mapping):
            raise ConfigError("eval.metadata", self.metadata, "give keys and values, say {data: folder}")

    @property
    def name(self) -> str:
        return self.labelled("+".join(self.tasks))

    def labelled(self, name: str) -> str:
        return f"{name}@{self.label}" if self.label else name


Task = PositionTask | ContextTask | ProbeTask | AnswersTask | HarnessTask
TASKS: dict[str, type[Task]] = {task.kind: task for task in (PositionTask, ContextTask, ProbeTask, AnswersTask, HarnessTask)}


def parse_tasks(blocks: Sequence[Mapping[str, Any] | Task]) -> list[Task]:
    """Tasks from YAML blocks, each {kind: position | context | probes | answers | lm_eval, ...}.

    Raises:
        ConfigError: an unknown kind or key.
    """
    if isinstance(blocks, (str, bytes, Mapping)) or not isinstance(blocks, Sequence):
        raise ConfigError("eval.tasks", blocks, f"must be a list of blocks {{kind: {' | '.join(TASKS)}, ...}}")
    tasks = []
    for number, block in enumerate(blocks):
        if isinstance(block, Task):
            tasks.append(block)
            continue
        if not isinstance(block, Mapping):
            raise ConfigError(f"eval.tasks[{number}]", block, f"give a block {{kind: {' | '.join(TASKS)}, ...}}")
        values: dict[str, Any] = {str(key): value for key, value in block.items()}
        kind = values.pop("kind", None)
        if not isinstance(kind, str) or kind not in TASKS:
            raise ConfigError(f"eval.tasks[{number}].kind", kind, f"unknown kind, {did_you_mean(str(kind), TASKS)}")
        tasks.append(build(TASKS[kind], values, where=f"eval.tasks[{number}]"))
    return tasks


def longest_input(tasks: Sequence[Task]) -> int:
    """Tokens of the longest sequence that position, context and probe tasks read; 0 without them."""
    needs = [task.seq_length + 1 for task in tasks if isinstance(task, PositionTask)]
    needs += [task.needed for task in tasks if isinstance(task, ContextTask)]
    for task in tasks:
        if isinstance(task, ProbeTask):
            needs.append(max(task.probes.lengths) + max(task.probes.max_new_tokens, 128))
    return max(needs, default=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured while a model trains.

    Attributes:
        tasks: blocks {kind: position | context | probes | answers | lm_eval, ...}; none measures nothing.
        every: optimizer steps between evaluations; 0 for none in the middle.
        at_start: whether to evaluate before the first step.
        at_end: whether to evaluate after the last step.
        time_budget: seconds of one evaluation; tasks not expected to end within it are skipped and reported.
        guard: when a change of the tasks with `guard: true` since the first evaluation is a loss of ability; None watches none.
        tokenizer: Hugging Face tokenizer's name or path; None for the model's own.
        max_length: tokens the model may be asked to read; None: the longest of the tasks and the model's own length.
        results_cache: file of lm-eval results to reuse, keyed by weights, step and requests.
    """

    tasks: tuple[Any, ...] = ()
    every: int = 0
    at_start: bool = True
    at_end: bool = True
    time_budget: float | None = None
    guard: GuardConfig | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    results_cache: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(parse_tasks(self.tasks)))
        if self.every < 0:
            raise ConfigError("eval.every", self.every, "give a number of steps, or 0 for no evaluation in the middle")
        if self.time_budget is not None and self.time_budget <= 0:
            raise ConfigError("eval.time_budget", self.time_budget, "give seconds, or leave it out for no limit")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError("eval.max_length", self.max_length, "give at least 2 tokens, or leave it out")
        for name in ("tokenizer", "results_cache"):
            if (said := getattr(self, name)) is not None and not said.strip():
                raise ConfigError(f"eval.{name}", said, "names nothing; leave it out, or name one")
        names = [task.name for task in self.tasks]
        if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
            mend = "two tasks of this name; give each a `label` (probes: put them in one block)"
            raise ConfigError("eval.tasks", twice, mend)
        if self.tasks and not (self.every or self.at_start or self.at_end):
            mend = "nothing is then measured at any time; set it true, or eval.every above 0, or leave all out with eval=none"
            raise ConfigError("eval.at_end", False, mend)
        if self.guard and self.tasks and not any(getattr(task, "guard", False) for task in self.tasks):
            raise ConfigError(
                "eval.guard", dataclasses.asdict(self.guard), "no task is watched: set guard: true in at least one"
            )
