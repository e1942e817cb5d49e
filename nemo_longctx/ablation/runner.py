"""Run a study: data once, then base and arms of each seed one after the other, each resumable, and the page after each.

Every run is the command that a user would type. A run that is done leaves a record of its command; the same study started again
runs what has no record, or another command than it had. A run that was killed goes on from its last checkpoint by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_longctx.ablation.drawn import context_section, decay_section, law_section, retrieval_section, training_section
from nemo_longctx.ablation.measured import last_result, of_result, table
from nemo_longctx.ablation.page import write_study
from nemo_longctx.ablation.study import BASE, Measure, Run, Scale, Study, filled
from nemo_longctx.config import ConfigError
from nemo_longctx.files import write_text
from nemo_longctx.report.html import Section
from nemo_longctx.versions import versions_of

PATIENCE = 50  # tenths of a second
PROBES = ("passkey", "first_sentence", "code")  # drawn by length, where they were asked
Execute = Callable[[list[str], Path], int]
Say = Callable[[str], None]


def execute(command: list[str], log: Path) -> int:
    """Run one command of ours in a process of its own, its output in `log`; its exit status."""
    if command[0] == "nemo-longctx":
        command = [sys.executable, "-m", "nemo_longctx.cli", *command[1:]]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=file).returncode


class Runner:
    """One study at one scale.

    Args:
        out: folder of the scale; data and runs lie in it, the page and its tables in `page`.
        text: what prepares' {text} stands for: paths, quoted for a shell. executor: of nemo_run; empty: as the scale says.
        run: how a command is run; tests hand in their own.
    """

    def __init__(
        self, study: Study, scale: str, out: Path, *, text: str, executor: str = "", run: Execute = execute, say: Say = print
    ):
        self.study, self.name, self.out, self.text, self.say, self.execute = study, scale, out, text, say, run
        self.scale: Scale = study.scale(scale)
        self.executor = "" if study.tuned else executor or self.scale.executor
        self.runs: list[Run] = study.runs(scale, out)
        self.record = out / f"{study.name}.done.json"
        if out.exists() and not out.is_dir():
            raise ConfigError("--out", str(out), "is a file; name a folder")
        self.done: dict[str, dict[str, Any]] = self._read_record()
        self.barred: dict[str, str] = {}  # probe kind -> why no claim is judged by it

    def commands(self) -> list[tuple[str, list[str]]]:
        """All commands of the study in order, with names: preparation, then runs."""
        prepared = [(f"data {n}", ["nemo-longctx", *self._words(line)]) for n, line in enumerate(self.scale.prepare, start=1)]
        return prepared + [(run.name, run.command(self.executor)) for run in self.runs]

    def _words(self, line: str) -> list[str]:
        """The words of a line of preparation; which files of a folder to take is nothing that a file of the user's is asked."""
        words = shlex.split(filled(line, self.scale, out=self.out, text=self.text))
        if any("://" not in text and Path(text).is_dir() for text in shlex.split(self.text)):
            return words
        globs = {place for place, word in enumerate(words) if word == "--glob"}
        return [word for place, word in enumerate(words) if place not in globs and place - 1 not in globs]

    def __call__(self) -> Path | None:
        """Run what is not done yet; the page, or None where a command failed.

        Raises:
            ConfigError: another process runs this study in the same folder.
        """
        with self._alone():
            return self._go()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / f"{self.study.name}.lock").open("w") as lock:
            for _ in range(PATIENCE):  # the runs of a study that was killed end a moment after it
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
            else:
                mend = f"another process runs {self.study.name} there; wait for it, or name another folder"
                raise ConfigError("--out", str(self.out), mend)
            # What that process did since this one looked is done.
            self.done = self._read_record()
            yield

    def _read_record(self) -> dict[str, dict[str, Any]]:
        if not self.record.exists():
            return {}
        try:
            return json.loads(self.record.read_text(encoding="utf-8"))
        except ValueError as error:
            mend = f"is damaged ({error}); delete it: runs that have ended are found, and not trained again"
            raise ConfigError("--out", str(self.record), mend) from None

    def _go(self) -> Path | None:
        began, commands = time.monotonic(), self.commands()
        left = [name for name, command in commands if not self._is_done(name, command)]
        for number, (name, command) in enumerate(commands, start=1):
            if name in left and not self._one(name, command, number, len(commands), began, left):
                return None
            failed = self._gate(name)
            for kind, said in failed.items():
                self.say(said)
                self.barred.setdefault(kind, said)
            if failed and self.scale.gate_ends == "study":
                ended = f"The study ends here: {' '.join(failed.values())} Whatever its arms did could not be told from chance."
                self.say(ended)
                return self.write(ended)
        return self.write()

    def _is_done(self, name: str, command: Sequence[str]) -> bool:
        return self.done.get(name, {}).get("command") == shlex.join(command)

    def _one(self, name: str, command: list[str], number: int, of: int, began: float, left: list[str]) -> bool:
        place, start = left.index(name), time.monotonic()
        rest = f", about {(start - began) / place * (len(left) - place) / 60:.0f} min left" if place else ""
        log = self.out / "logs" / f"{self.study.name}-{name.replace(', ', '-').replace(' ', '-')}.log"
        self.say(f"[{number}/{of}] {name}{rest}: {shlex.join(command)}\n    log: {log}")
        status = self.execute(command, log)
        if status:
            tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
            self.say("\n".join([*tail, f"{name} ended with status {status}; the same command goes on from here"]))
            return False
        seconds = round(self.done.get(name, {}).get("seconds", 0) + time.monotonic() - start, 1)
        self.done[name] = {"command": shlex.join(command), "seconds": seconds, "commit": commit()}
        write_text(self.record, json.dumps(self.done, indent=1) + "\n")
        return True

    def _gate(self, name: str) -> dict[str, str]:
        """Probe kind -> how the run of this name, a base, fails the gate in it; empty for an arm, or where nothing failed."""
        run = next((r for r in self.runs if r.name == name and r.arm == BASE), None)
        if run is None or self.scale.gate_ends == "nothing":
            return {}
        result = last_result(run)
        if result is None and self.executor:  # handed to a cluster, whose end nobody waits for here
            return {}
        length, failed = self.scale.values.get("short"), {}
        for kind, needed in self.study.gate.items():
            if result is None:
                failed[kind] = f"{run.name} was not measured, so nobody knows whether it can do {kind}."
                continue
            score = float(of_result(f"probes/{kind}/{length}", result, run.name)[0])
            if not score >= needed:
                failed[kind] = (
                    f"The base ({run.name}) scores {score:.2f} on {kind} at its own {length} tokens, and needs {needed}."
                )
        return failed

    def found(self) -> dict[str, dict[str, Any]]:
        """Measure -> arm -> values [S, D], of what is done."""
        arms = [arm for arm in self.study.arms if arm in {run.arm for run in self.runs}]
        values: dict[str, dict[str, Any]] = {}
        for name, measure in self._measures().items():
            have = [r for r in self.runs if self._is_done(r.name, r.command(self.executor))]
            whole = [arm for arm in arms if sum(r.arm == arm for r in have) == len(self.scale.seeds)]
            values[name] = {}
            for arm in whole:
                try:
                    values[name] |= table(measure, have, [arm], self.scale.seeds)
                except ValueError as error:  # an evaluation that failed costs its arm this measure, not the page
                    self.say(f"{self.study.name}: {measure.text}: {arm} is left out, {error}")
        return values

    def _measures(self) -> Mapping[str, Measure]:
        from dataclasses import replace

        return {n: replace(m, path=filled(m.path, self.scale)) for n, m in self.study.measures.items()}

    def write(self, ended: str = "") -> Path:
        """The page of what is done."""
        seconds = {name: values["seconds"] for name, values in self.done.items()}
        provenance = {
            "study": self.study.name,
            "scale": self.name,
            "seconds since each run's last start": seconds | {"all": round(sum(seconds.values()), 1)},
            "commands": {name: shlex.join(command) for name, command in self.commands()},
            "versions": versions_of("nemo-longctx", "torch", "nemo_toolkit", "megatron-core", "numpy"),
            "commit": " ".join(dict.fromkeys(each["commit"] for each in self.done.values() if each.get("commit"))),
        }
        return write_study(
            self.out / "page" / self.study.name,
            self.study,
            self.found(),
            scale=self.name,
            provenance=provenance,
            ended=ended,
            barred=self.barred,
            paths={name: measure.path for name, measure in self._measures().items()},
            more=self._drawn(self.out / "page" / self.study.name),
        )

    def _drawn(self, directory: Path) -> list[Section]:
        """Figures beside the measures, of the arms that every seed has."""
        values, asked = self.scale.values, self.study.figures
        arms: dict[str, list[Run]] = {}
        for run in self.runs:
            arms.setdefault(run.arm, []).append(run)
        whole = {arm: runs for arm, runs in arms.items() if all(self._is_done(r.name, r.command(self.executor)) for r in runs)}
        came_from = {BASE: whole[BASE]} if BASE in whole else {}  # drawn too, last, where it was measured
        whole = {arm: runs for arm, runs in whole.items() if arm in self.study.arms}
        with_base = whole | came_from
        sections: list[Section | None] = []
        if "training_curve" in asked:
            sections.append(training_section(whole, directory))
        if "context_curve" in asked:
            sections.append(context_section(with_base, values["task"], directory))
        if "retrieval" in asked:
            sections += [retrieval_section(with_base, kind, directory) for kind in PROBES]
        if "score_decay" in asked:
            first = [runs[0] for arm, runs in arms.items() if arm in self.study.arms]
            sections.append(decay_section(first, directory, short=values["short"], distances=values["twice"]))
        if "context_law" in asked:
            sections.append(law_section(whole, values["task"], directory))
        return [section for section in sections if section is not None]


def commit() -> str:
    """The commit of the checkout that this package lies in; empty for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()
