"""Before torch and the host are imported: processes and devices that are not the layout's, and files that are not there."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nemo_longctx import dry_run, start
from nemo_longctx.compose import compose, groups
from nemo_longctx.config import ConfigError
from nemo_longctx.dry_run import refuse
from nemo_longctx.explain import explained
from nemo_longctx.recipe import TrainerConfig, load_recipe


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_NAME", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


def gpus(monkeypatch, count):
    monkeypatch.setattr(start, "cuda_devices", lambda: [("a GPU", (9, 0))] * count)


@pytest.mark.parametrize(
    ("trainer", "there", "environment", "said"),
    [
        ({"accelerator": "gpu"}, 0, {}, "no CUDA device; set trainer=cpu"),
        ({"accelerator": "gpu", "devices": 8}, 2, {}, "shows 2 CUDA devices"),
        ({"accelerator": "gpu", "num_nodes": 2}, 1, {}, "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST"),
        ({"accelerator": "cpu"}, 0, {"RANK": "0", "WORLD_SIZE": "4"}, "4 processes were started, and num_nodes x"),
        ({"accelerator": "cpu", "devices": 2}, 0, {"SLURM_NTASKS": "4"}, "4 processes were started"),
    ],
)  # fmt: skip
def test_other_processes_than_the_layout_s_are_refused(trainer, there, environment, said, monkeypatch):
    gpus(monkeypatch, there)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        start.check_start(TrainerConfig(**trainer))


@pytest.mark.parametrize(
    ("trainer", "there", "environment"),
    [
        ({"accelerator": "cpu", "devices": 2}, 0, {}),  # the trainer starts the second one itself
        ({"accelerator": "cpu", "devices": 2, "num_nodes": 2}, 0, {"RANK": "3", "WORLD_SIZE": "4"}),
        ({"accelerator": "gpu", "devices": 2}, 8, {}),
        ({"accelerator": "cpu"}, 0, {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}),  # typed in a shell of Slurm's
    ],
)
def test_the_layout_s_processes_are_let_through(trainer, there, environment, monkeypatch):
    gpus(monkeypatch, there)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start.check_start(TrainerConfig(**trainer))


@pytest.mark.parametrize("recipe", groups()["recipe"])
def test_one_word_sets_all_that_a_cpu_needs(recipe):
    made = load_recipe(compose([f"recipe={recipe}", "trainer=cpu"]))
    trainer = made.trainer
    assert (trainer.accelerator, trainer.world_size, trainer.precision, trainer.offload) == ("cpu", 1, "32", "none")
    parallel = (trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size, trainer.context_parallel_size)
    assert parallel == (1, 1, 1)
    assert not trainer.sequence_parallel
    for stage in made.curriculum.stages:
        assert {stage.tensor_model_parallel_size, stage.context_parallel_size, stage.pipeline_model_parallel_size} <= {None, 1}


def test_what_is_typed_beside_the_machine_counts():
    trainer = load_recipe(compose(["trainer.devices=2", "recipe=llama2_7b", "trainer=cpu"])).trainer
    assert (trainer.devices, trainer.num_nodes) == (2, 1)
    assert "num_nodes: 1  " in explained(["recipe=llama2_7b", "trainer=cpu"])
    assert "conf/trainer/cpu.yaml" in next(
        line for line in explained(["recipe=llama2_7b", "trainer=cpu"]).splitlines() if "num_nodes" in line
    )


def test_what_is_missing_is_said_before_torch_is_imported(tmp_path):
    code = (
        "import sys\nfrom nemo_longctx.cli import main\nstatus = main(['train', *sys.argv[1:]])\n"
        "assert not {'torch', 'nemo', 'megatron', 'lightning'} & set(sys.modules)\nsys.exit(status)"
    )
    asked = ["recipe=tiny_cpu_base", f"output_dir={tmp_path}/runs", f"data.mix.sources=[{{path: {tmp_path}/nothing}}]"]
    result = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert "nothing.idx is missing" in result.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("restore_from=HERE/hf", "is a Hugging Face directory; make a NeMo checkpoint of it: nemo-longctx import"),
        ("restore_from=HERE/none", "no finished NeMo checkpoint"),
        ("data.validation=[{name: v, path: HERE/none, seq_length: 256}]", "none.idx is missing"),
        (
            "data.mix={sources: [{path: HERE/all}], long_length: 2, long_share: 0.5}",
            "source all has no documents shorter than 2 tokens",
        ),
        ("eval.tasks=[{kind: probes, text: HERE/none.txt}]", "no such text"),
        ("eval.tasks=[{kind: position, corpus: HERE/none, seq_length: 256}]", "none.idx is missing"),
    ],
)
def test_each_input_that_is_not_there_is_named(override, said, tmp_path, tiny_corpus):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    base = ["recipe=tiny_cpu_base", f"data.mix.sources=[{{path: {tiny_corpus}}}]", "data.validation=[]", "data.tokenizer=null"]
    asked = override.replace("HERE", str(tmp_path))
    refuse(load_recipe(compose(base)))
    with pytest.raises(ConfigError, match=said):
        refuse(load_recipe(compose([*base, asked])))


@pytest.fixture
def tiny_corpus(tmp_path):
    import numpy as np

    from nemo_longctx.data.writer import CorpusWriter

    with CorpusWriter(str(tmp_path / "all"), np.uint16) as writer:
        writer.add_document(np.arange(700) % 512)
    return tmp_path / "all"


PARENT = """
import multiprocessing, os, signal, time
from multiprocessing.managers import SyncManager
from nemo_longctx.runs import STOP_SIGNALS
from nemo_longctx.start import end_with, main_hidden, signals_not_inherited

with main_hidden(), signals_not_inherited():
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with, (os.getpid(),))
[child] = multiprocessing.active_children()
for signum in STOP_SIGNALS:
    os.kill(child.pid, signum)
time.sleep(0.2)
manager.Queue().put(1)  # a broken pipe where a signal to all of a run reached it
print("started", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_run_started_ends_with_it_even_by_sigkill():
    """A manager's process waited for good, and held the pipes of whoever had started the run: this call would not return."""
    done = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "started\n"


def torch_lock(place, name):
    lock = place / name / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """Where torch builds, and quick waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(start, "WORDLESS_SECONDS", 0)
    return tmp_path / "torch_extensions" / "py311_cpu"


@pytest.mark.parametrize("asked", [True, False])
def test_a_lock_of_a_killed_import_lets_the_next_start_go_on(extensions, monkeypatch, capsys, asked):
    """A start killed while Megatron-Core was imported left torch's lock: every later one waited for good, in silence."""
    if asked:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    locks = [torch_lock(extensions, name) for name in (start.EXTENSION, "another")]
    monkeypatch.setattr(start, "_on_own_disk", lambda lock: False)  # who holds it cannot be seen: its age decides
    for lock in locks:
        os.utime(lock, (0, time.time() - start.BUILD_SECONDS - 1))
    start.remove_stale_locks()
    assert [lock.exists() for lock in locks] == [False, True]
    assert f"removed {locks[0]}" in capsys.readouterr().out


def test_a_young_lock_that_no_process_has_open_is_removed_at_once(extensions, monkeypatch, capsys):
    """Started again within two minutes of the kill, a run waited for good."""
    lock = torch_lock(extensions, start.EXTENSION)
    monkeypatch.setattr(start, "_on_own_disk", lambda lock: True)
    start.remove_stale_locks()
    assert not lock.exists()
    assert f"removed {lock}" in capsys.readouterr().out


@pytest.mark.parametrize("seen", [True, False])
def test_a_lock_that_is_held_is_waited_for_with_a_word(extensions, monkeypatch, capsys, seen):
    """Held by a builder here, or by nobody knows whom on a shared disk; its time is ahead of a clock that was set back."""
    lock = torch_lock(extensions, start.EXTENSION)
    os.utime(lock, (0, time.time() + 3600))
    monkeypatch.setattr(start, "_on_own_disk", lambda lock: seen)
    monkeypatch.setattr(start, "BUILD_SECONDS", 0.3)
    with lock.open():
        start.remove_stale_locks()
    assert f"waiting for {lock}: another process builds what Megatron-Core needs" in capsys.readouterr().out


def test_a_builder_that_ends_while_it_is_waited_for_keeps_its_lock_until_then(extensions, monkeypatch, capsys):
    lock = torch_lock(extensions, start.EXTENSION)
    monkeypatch.setattr(start, "_on_own_disk", lambda lock: True)
    with lock.open():
        ends = threading.Timer(0.25, lock.unlink)
        ends.start()
        start.remove_stale_locks()
    assert f"removed {lock}" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nodes", "devices", "words"),
    [
        (1, 1, "nemo-longctx"),
        (1, 4, "torchrun --nproc-per-node 4 -m nemo_longctx"),
        (2, 1, "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --nproc-per-node 1 -m nemo_longctx"),
        (3, 8, "torchrun --nnodes 3 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --nproc-per-node 8 -m nemo_longctx"),
    ],
)
def test_the_line_that_starts_a_run_is_of_its_nodes_and_processes(nodes, devices, words):
    assert " ".join(start.torchrun(nodes, devices)) == words
    said = f"   # on each of the {nodes} nodes; FIRST_NODE is the name of one"
    assert start.on_each_node(nodes) == (said if nodes > 1 else "")


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({}, None), ({"RANK": "0"}, None), ({"WORLD_SIZE": "4"}, None), ({"RANK": "0", "WORLD_SIZE": "4"}, 4),
        ({"SLURM_NTASKS": "8"}, 8), ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, None), ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "mine"}, 8),
        ({"RANK": "0", "WORLD_SIZE": "4", "SLURM_NTASKS": "8"}, 4),
    ],
)  # fmt: skip
def test_processes_are_counted_by_torchrun_and_else_by_slurm(monkeypatch, environment, started):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert start.started_processes() == started


@pytest.mark.parametrize("value", ["", "two", "0", "-1", "4(x2)", " "])
def test_a_number_of_processes_that_is_none_is_told_by_its_variable(monkeypatch, value):
    monkeypatch.setenv("SLURM_NTASKS", value)
    for variable in ("SLURM_NTASKS", "WORLD_SIZE"):
        with pytest.raises(ConfigError, match=f"^{variable}={re.escape(repr(value))}: must be a number of processes"):
            start.started_processes()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", value)


def test_a_disk_of_this_machine_is_the_deepest_mount_s_kind(monkeypatch, tmp_path):
    lines = ["1 0 8:1 / / rw - ext4 /dev/a rw", f"2 1 0:1 / {tmp_path} rw shared:1 - nfs4 server:/x rw",
             f"3 2 0:2 / {tmp_path}/here rw - tmpfs none rw", "4 1 broken line without a dash"]  # fmt: skip
    read = start.Path.read_text
    mounts = "/proc/self/mountinfo"
    monkeypatch.setattr(start.Path, "read_text", lambda self, *a: "\n".join(lines) if str(self) == mounts else read(self, *a))
    (tmp_path / "here").mkdir()
    assert not start._on_own_disk(tmp_path / "file")
    assert start._on_own_disk(tmp_path / "here" / "file")
    assert start._on_own_disk(start.Path("/elsewhere"))
    lines[0] = "1 0 8:1 / /other rw - ext4 /dev/a rw"
    assert not start._on_own_disk(start.Path("/elsewhere"))
    monkeypatch.setattr(start.Path, "read_text", lambda self, *a: (_ for _ in ()).throw(OSError("no /proc")))
    assert not start._on_own_disk(tmp_path / "here" / "file")


def test_pretraining_text_of_a_tuning_is_looked_at_for_its_share_of_the_run(monkeypatch):
    asked = []
    monkeypatch.setattr(dry_run, "_mix", lambda mix, total: asked.append((mix, total)) or "mixed")
    data = SimpleNamespace(short=[], long=[], pretraining="mix", blend={"pretraining": 0.25, "short": 0.75}, template="llama2")
    said = dry_run._data(SimpleNamespace(data=data, curriculum=SimpleNamespace(total_tokens=1000)))
    assert ([each() for each in said], asked) == (["mixed"], [("mix", 250)])
