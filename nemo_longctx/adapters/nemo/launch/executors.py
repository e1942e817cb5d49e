"""Where a recipe runs, for nemo_run's command line: `run.executor=longctx_slurm run.executor.account=me run.executor.nodes=8`.

Each factory gives a `run.Config` of nemo_run's own executor; all its fields are set on the command line, since nemo_run takes
no arguments for an executor's factory there. `nodes` and processes a node must be those of the recipe's trainer
(`trainer.num_nodes`, `trainer.devices`): Lightning refuses to start where they are not.

Annotations must not be postponed here (`from __future__ import annotations`): nemo_run parses arguments by their types.
"""

import os

import nemo_run as run
import torch

GPUS_PER_NODE = 8  # of every machine that conf/trainer/ names


@run.cli.factory
def longctx_local() -> run.Config[run.LocalExecutor]:
    """This machine, by torchrun: a process a GPU, or one without any; `run.executor.ntasks_per_node=2` for two."""
    return run.Config(run.LocalExecutor, ntasks_per_node=max(1, torch.cuda.device_count()), launcher="torchrun")


@run.cli.factory
def longctx_slurm() -> run.Config[run.SlurmExecutor]:
    """A Slurm cluster, from one of its nodes: whole nodes, a task a GPU.

    The account is that of SLURM_ACCOUNT, or `run.executor.account=me`. Where this package is not installed on the nodes,
    `run.executor.container_image=...` names an image that has it (Pyxis).
    """
    return run.Config(
        run.SlurmExecutor,
        account=os.environ.get("SLURM_ACCOUNT", ""),
        time="04:00:00",
        ntasks_per_node=GPUS_PER_NODE,
        gpus_per_node=GPUS_PER_NODE,
        exclusive=True,
        mem="0",
        tunnel=run.Config(run.LocalTunnel, job_dir=os.path.abspath("runs/slurm")),
        packager=run.Config(run.Packager),  # nothing is sent along: the package is installed where it runs
    )


@run.cli.factory
def longctx_kubernetes() -> run.Config[run.Executor]:
    """A Kubernetes cluster with Kubeflow's trainer, by this user's kubeconfig: `run.executor.image=...`.

    The image has NeMo and this package installed. Needs `pip install nemo-longctx[kubernetes]`.
    """
    return run.Config(
        run.KubeflowExecutor,
        nprocs_per_node=GPUS_PER_NODE,
        gpus_per_node=GPUS_PER_NODE,
        launcher="torchrun",
        packager=run.Config(run.Packager),
    )
