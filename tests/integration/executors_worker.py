"""Our executors by nemo_run's command line parser, and the jobs it would submit. executors_worker.py FOLDER"""

import os
import sys

os.environ["NEMORUN_HOME"] = sys.argv[1]
os.chdir(sys.argv[1])

import nemo_run as run  # noqa: E402
from nemo_run.cli.api import RunContext  # noqa: E402

from nemo_longctx.adapters.nemo import recipes  # noqa: E402

EXECUTORS = {
    "longctx_local": ["executor.ntasks_per_node=2"],
    "longctx_slurm": ["executor.account=me", "executor.partition=batch", "executor.nodes=8", "executor.time=12:00:00"],
}
for name, arguments in EXECUTORS.items():
    context = RunContext(name="longctx")
    context.parse_args([f"executor={name}", *arguments])
    with run.Experiment("longctx", executor=context.executor) as experiment:
        experiment.add(run.Partial(recipes.train, recipe="llama2_7b"), name="train")
        print("JOB", name, flush=True)
        experiment.dryrun(delete_exp_dir=True)

# Kubeflow's executor opens a connection when it is built; its config is what the command line would build.
print("JOB", "longctx_kubernetes", repr(recipes.executors.longctx_kubernetes()), flush=True)
