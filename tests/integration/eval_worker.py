"""Train a tiny recipe, with an evaluation callback or without: eval_worker.py SETTINGS.json. Prints the weights' digest."""

import json
import sys
from pathlib import Path

import torch


def main():
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    from nemo_longctx.adapters.nemo.launch.run import build_run
    from nemo_longctx.adapters.nemo.model.config import mcore_modules
    from nemo_longctx.eval.results_cache import weights_digest
    from nemo_longctx.recipe import load_recipe

    run = build_run(load_recipe(settings["recipe"]))
    if settings["eval"]:
        from nemo_longctx.adapters.nemo.evaluation.callback import LongContextEvalCallback

        run.trainer.callbacks.append(LongContextEvalCallback(**settings["eval"]))
    run.fit()
    (module,) = mcore_modules(run.trainer.strategy.megatron_parallel)
    print("DIGEST", weights_digest(module.named_parameters()), flush=True)


if __name__ == "__main__":  # the checkpoint writer is a spawned process, which imports this file
    main()
