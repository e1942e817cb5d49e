"""nemo_run's executors take our recipes to this machine, Slurm and Kubernetes: what would be submitted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the worker imports NeMo


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What a dry run of each executor prints, by its name."""
    worker = Path(__file__).with_name("executors_worker.py")
    command = [sys.executable, str(worker), str(tmp_path_factory.mktemp("nemorun"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = " ".join(done.stdout.split()).split("JOB ")[1:]
    return {part.split()[0]: part for part in parts}


def test_slurm_job_asks_for_the_nodes_and_runs_the_recipe(jobs):
    script = jobs["longctx_slurm"]
    for line in (
        "--account=me",
        "--partition=batch",
        "--nodes=8",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=12:00:00",
    ):
        assert f"#SBATCH {line}" in script
    assert "srun" in script
    assert "nemo_run.core.runners.fdl_runner" in script


def test_local_job_is_torchrun(jobs):
    assert "torchrun" in jobs["longctx_local"]
    assert "'--nproc-per-node', '2'" in jobs["longctx_local"]


def test_kubernetes_job_is_kubeflows_trainer(jobs):
    assert "KubeflowExecutor" in jobs["longctx_kubernetes"]
    assert "nprocs_per_node=8" in jobs["longctx_kubernetes"]
