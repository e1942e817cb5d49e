"""What `lifecycle_worker.py` does. Apart from it: processes that a save starts import the main script again."""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from nemo_longctx.adapters.megatron import cpu

cpu.install()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from megatron.core import num_microbatches_calculator, parallel_state  # noqa: E402
from megatron.core.tensor_parallel import get_cuda_rng_tracker  # noqa: E402

from nemo_longctx.adapters.nemo.launch.run import build_run  # noqa: E402
from nemo_longctx.adapters.nemo.model.config import mcore_modules  # noqa: E402
from nemo_longctx.checkpoints import checkpoints  # noqa: E402
from nemo_longctx.compose import compose  # noqa: E402
from nemo_longctx.launch import exit_status, fit_unless_finished  # noqa: E402
from nemo_longctx.recipe import load_recipe  # noqa: E402


class Killed(BaseException):
    """The process is gone."""


class Acts(pl.Callback):
    """Does what the plan says, at a step of a hook, and hashes what the run ends with."""

    def __init__(self, act):
        self.act, self.digest = act, None

    def _at(self, hook, trainer):
        if not self.act or trainer.sanity_checking or self.act[:2] != [hook, trainer.global_step]:
            return
        if self.act[2] == "kill":
            raise Killed
        os.kill(os.getpid(), getattr(signal, self.act[2]))

    def on_train_start(self, trainer, pl_module):
        self._at("start", trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._at("step", trainer)

    def on_validation_start(self, trainer, pl_module):
        self._at("validation", trainer)

    def on_train_end(self, trainer, pl_module):
        self._at("end", trainer)
        digest = hashlib.sha256()
        for module in mcore_modules(trainer.strategy.megatron_parallel):
            for name, tensor in sorted(module.named_parameters()):
                digest.update(name.encode() + tensor.detach().numpy().tobytes())
        for each in trainer.optimizers[0].mcore_optimizer.chained_optimizers:
            for state in each.optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq", "step"):
                    digest.update(torch.as_tensor(state[name]).numpy().tobytes())
        self.digest = digest.hexdigest()


def leave():
    """No process group, generator or calculator of the run stays for the next one."""
    get_cuda_rng_tracker().reset()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def one(entry):
    recipe, acts = load_recipe(compose(entry["overrides"])), Acts(entry.get("act"))
    if entry.get("tear"):
        files = [path for path in (checkpoints(recipe.directory)[0].path / "weights").iterdir() if path.suffix == ".distcp"]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)

    def fit():
        run = build_run(recipe)
        run.trainer.callbacks.insert(0, acts)
        run.fit()

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = exit_status(lambda: fit_unless_finished(recipe, fit))
        except Killed:
            status = "killed"
        except Exception:
            status = traceback.format_exc()
        leave()
    found = {each.path.name: each.step for each in checkpoints(recipe.directory)}
    return {"status": status, "printed": printed.getvalue()[-6000:], "digest": acts.digest, "checkpoints": found}


def main():
    """Make the runs of the plan, one after the other."""
    torch.set_num_threads(1)
    results = {}
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        results[entry["name"]] = one(entry)
        Path(sys.argv[2]).write_text(json.dumps(results, indent=1))
