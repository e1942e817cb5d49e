"""A study as a file: a base, arms as overrides of recipes, what is measured, and the claims with their tests.

`conf/ablation/NAME.yaml`. A scale of a study (`smoke`, `laptop`, `gpu`, `paper`) says how large its runs are, with how many
seeds, and which arms it has; the arms, measures and claims are the same at every scale.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.ablation.verdict import Claim
from nemo_longctx.compose import CONF_DIR, compose
from nemo_longctx.config import ConfigError, build, did_you_mean
from nemo_longctx.recipe import RunConfig, load_instruct_recipe, load_recipe

SCALES = ("smoke", "laptop", "gpu", "paper")
FOLDER = CONF_DIR / "ablation"
BASE = "base"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One number a run, or one a document.

    Args:
        text: what it is, for tables.
        path: where it lies in the last evaluation of a run: `context/TASK/READ`, each document's loss after a read of so many
            tokens; `gain/TASK`, what the longest context takes off it; `watched/NAME`, each document's loss;
            `probes/KIND/LENGTH`, the score, depths averaged; `answers/KIND/LENGTH`, the loss of the answer's own tokens, which
            tells of a small model what the score does not; `training/loss`, the mean of the last tenth of the run;
            `training/hours` and `training/processor_hours`, its time on the clock and on the processor, which are never
            twice the same; `training/flops`, its operations as the plan counts them.
        paper: arm -> the paper's number, printed beside ours. paper_text: what that number is.
    """

    text: str
    path: str
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    paper_text: str = ""

    def __post_init__(self) -> None:
        root = self.path.partition("/")[0]
        if root not in ROOTS:
            raise ConfigError("measures.path", self.path, f"begins with one of its roots, {did_you_mean(root, ROOTS)}")

    @property
    def probe(self) -> str:
        """The kind of probe that it is the score of; empty for another measure."""
        root, _, rest = self.path.partition("/")
        return rest.partition("/")[0] if root == "probes" else ""

    @property
    def timed(self) -> bool:
        """Whether it is a time, which the machine's other work changes: told, and no ground for a claim."""
        return self.path in TIMES


TIMES = ("training/hours", "training/processor_hours")
FIGURES = ("training_curve", "context_curve", "retrieval", "score_decay", "context_law")
GATE_ENDS = ("study", "scores", "nothing")
ROOTS = ("context", "gain", "watched", "probes", "answers", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the runs of a study are.

    Args:
        seeds: of weights and stream.
        before: name -> overrides of runs ahead of the base, or of the arms where there is none, each beginning from the one
            before it, the first from random weights; studies that name such a run alike and share a folder share it.
        base, arm: overrides of the base run (none: arms begin from the last of `before`, or from random weights) and of every
            arm; {base} is the folder that an arm begins from.
        arms: which arms this scale has; none: all.
        prepare: arguments of `nemo-longctx` that make the data, once; {out} is the study's folder, {text} the user's text.
        values: what {names} in overrides stand for at this scale, besides {out}.
        executor: of nemo_run, for clusters; none: here, one run after another.
        gate_ends: what a base ends that fails the study's gate: the `study`; only claims on `scores` of the probes that it
            failed, while losses tell their part; or `nothing`, for a scale that only shows that the parts work.
        hours: what the whole is expected to take, as text.
    """

    seeds: tuple[int, ...]
    arm: tuple[str, ...]
    before: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    base: tuple[str, ...] | None = None
    arms: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    executor: str = ""
    gate_ends: str = "study"
    hours: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 1 or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("scales.seeds", self.seeds, "give different whole numbers of at least 1")
        if BASE in self.before:
            raise ConfigError("scales.before", BASE, f"call no run ahead of the base {BASE}; give that one as `base`")
        if self.gate_ends not in GATE_ENDS:
            raise ConfigError("scales.gate_ends", self.gate_ends, did_you_mean(str(self.gate_ends), GATE_ENDS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of the paper.

    Args:
        name, title, paper: what it is and where in the paper. arms: name -> overrides. measures: by name. claims: in order.
        gate: probe kind -> score that the base must reach at its own length; below it the study ends there, or what the scale
            says (`gate_ends`).
        tuned: whether arms are runs of instruction tuning (`nemo-longctx sft`, conf/sft.yaml) from the base; they are started
            here, since nemo_run has no entry point for them.
        figures: what is drawn beside the measures: `training_curve`, `context_curve`, `retrieval` (passkeys and first
            sentences by length), `score_decay` of the arms' position encodings (Figure 4), `context_law` of each (Figure 1).
    """

    name: str
    title: str
    paper: str
    arms: Mapping[str, tuple[str, ...]]
    measures: Mapping[str, Any]
    claims: tuple[Any, ...]
    scales: Mapping[str, Any]
    gate: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tuned: bool = False
    figures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"ablation/{self.name}"
        measures = {name: build(Measure, values, where=f"{where}.measures.{name}") for name, values in self.measures.items()}
        claims = tuple(build(Claim, values, where=f"{where}.claims[{n}]") for n, values in enumerate(self.claims))
        scales = {name: build(Scale, values, where=f"{where}.scales.{name}") for name, values in self.scales.items()}
        for figure in self.figures:
            if figure not in FIGURES:
                raise ConfigError(f"{where}.figures", figure, did_you_mean(str(figure), FIGURES))
        for name in scales:
            if name not in SCALES:
                raise ConfigError(f"{where}.scales", name, did_you_mean(name, SCALES))
        for number, claim in enumerate(claims):
            for key, value, known in (("measure", claim.measure, measures), ("first", claim.first, self.arms),
                                      ("second", claim.second, self.arms)):  # fmt: skip
                if value not in known:
                    raise ConfigError(f"{where}.claims[{number}].{key}", value, did_you_mean(value, known))
            if measures[claim.measure].timed:
                mend = "no claim rests on a time, which the machine's other work changes; training/flops counts operations"
                raise ConfigError(f"{where}.claims[{number}].measure", claim.measure, mend)
        for name, scale in scales.items():
            if scale.gate_ends != "study" and not self.gate:
                raise ConfigError(f"{where}.scales.{name}.gate_ends", scale.gate_ends, "the study has no gate; leave it out")
            for run in set(scale.before) & set(self.arms):
                raise ConfigError(f"{where}.scales.{name}.before", run, "is the name of an arm too; give it another")
            for arm in scale.arms:
                if arm not in self.arms:
                    raise ConfigError(f"{where}.scales.{name}.arms", arm, did_you_mean(arm, self.arms))
        object.__setattr__(self, "measures", measures)
        object.__setattr__(self, "claims", claims)
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "arms", {name: tuple(overrides) for name, overrides in self.arms.items()})

    def scale(self, name: str) -> Scale:
        """The scale of this name.

        Raises:
            ConfigError: the study has none.
        """
        if name not in self.scales:
            raise ConfigError("--scale", name, f"the study {self.name} has no such scale; it has {', '.join(self.scales)}")
        return self.scales[name]

    def runs(self, scale: str, out: Path) -> list[Run]:
        """All runs of a scale in order: for each seed what comes before the base, the base, then its arms from it."""
        size = self.scale(scale)
        arms = size.arms or tuple(self.arms)
        made = []
        for seed in size.seeds:
            common = (f"output_dir={out}", f"seed={seed}")
            after: tuple[str, ...] = ()
            base: Path | None = None
            # Studies of one scale that begin from the same base share it: position and mix do, instruct has its own.
            own = f"{self.name}_{BASE}" if self.tuned else BASE
            for ahead, overrides in (*size.before.items(), *([(BASE, size.base)] if size.base is not None else [])):
                name = f"{own if ahead == BASE else ahead}-{seed}"
                base = out / name
                line = tuple(filled(o, size, base=base) for o in (*overrides, *common, *after, f"name={name}"))
                made.append(Run(arm=ahead, seed=seed, folder=base, overrides=line))
                after = (f"restore_from={base}",)
            for arm in arms:
                name = f"{arm}-{seed}"
                overrides = tuple(
                    filled(o, size, base=base) for o in (*size.arm, *self.arms[arm], *common, *after, f"name={name}")
                )
                made.append(Run(arm=arm, seed=seed, folder=out / name, overrides=overrides, tuned=self.tuned))
        return [dataclasses.replace(run, overrides=tuple(filled(o, size, out=out) for o in run.overrides)) for run in made]


def filled(line: str, scale: Scale, **more: Any) -> str:
    """`line` with the scale's values in place of their names in braces; other braces stay (YAML has them too)."""
    for name, value in {**scale.values, **more}.items():
        line = line.replace("{" + name + "}", str(value))
    return line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study: an arm, or the base that arms begin from."""

    arm: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    tuned: bool = False  # instruction tuning, of conf/sft.yaml

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def command(self, executor: str = "") -> list[str]:
        """What a user would type: the example script here, or nemo_run's executor on a cluster."""
        if executor:
            return ["nemo", "longctx", "train", *self.overrides, f"run.executor={executor}"]
        return ["nemo-longctx", "sft" if self.tuned else "train", *self.overrides]

    def recipe(self) -> RunConfig:
        """What it runs, composed and checked.

        Raises:
            ConfigError: a key or value that no recipe takes.
        """
        if self.tuned:
            return load_instruct_recipe(compose(self.overrides, config_name="sft"))
        return load_recipe(compose(self.overrides))

    def told(self, executor: str = "") -> str:
        return shlex.join(self.command(executor))


def studies() -> list[str]:
    """Names of the studies in conf/ablation."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_study(name: str, folder: Path = FOLDER) -> Study:
    """The study of this name, checked.

    Raises:
        ConfigError: no such study, or a key, arm or measure that does not exist.
    """
    import yaml

    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError("study", name, did_you_mean(name, [file.stem for file in folder.glob("*.yaml")]))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ConfigError("study", str(path), "must be a mapping: title, paper, arms, measures, claims, scales")
    return build(Study, {"name": name} | values, where=f"ablation/{name}")
