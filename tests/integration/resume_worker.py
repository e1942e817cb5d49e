"""Starts of one run, each in a process of its own that has the host imported already: `resume_worker.py STARTS.json`.

STARTS is a list of `{"overrides": [...], "stop": step or null, "log": path}`; a start ends after `stop` as a kill would.
`remove` names a file that is gone by then.
"""

import json
import os
import sys
from pathlib import Path

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.recipe import load_recipe


def start(overrides: list[str], stop: int | None) -> None:
    from lightning.pytorch.callbacks import Callback

    from nemo_longctx.adapters.nemo.launch.run import build_run

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            groups = trainer.optimizers[0].param_groups
            decays = sorted({group["weight_decay"] for group in groups})
            print("step", json.dumps([trainer.global_step + 1, groups[0]["lr"], decays, groups[0]["betas"][0]]), flush=True)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == stop:
                os._exit(9)

    run = build_run(load_recipe(compose(overrides)))
    run.trainer.callbacks.append(Watch())
    run.fit()


def main() -> None:
    import nemo_longctx.adapters.nemo.launch.run  # noqa: F401  once for all

    for each in json.loads(Path(sys.argv[1]).read_text()):
        if each.get("remove"):
            os.remove(each["remove"])
        child = os.fork()
        if not child:
            with open(each["log"], "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            try:
                start(each["overrides"], each["stop"])
            except ConfigError as error:
                print(f"error: {error}", flush=True)
                os._exit(2)
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
