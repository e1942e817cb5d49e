"""NeMo's own recipes, cut small, made long in two lines, and trained on this machine in one process, one after another.

stock_worker.py CORPUS OUTPUT NAME...; prints `RECORD {...}` for each, and ends at the first that fails.
"""

import gc
import json
import os
import sys
from pathlib import Path

SMALL = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 2,
    "kv_channels": 16, "vocab_size": 300,
}  # fmt: skip
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
CURRICULUM = {
    "stages": [{"until": 0.5, "seq_length": 64}, {"until": 1.0, "seq_length": 128}],
    "tokens_per_step": 256,
    "total_tokens": 1024,
}


def cut(recipe):
    """A recipe for eight GPUs and more, at the size of one process."""
    for name, value in SMALL.items():
        setattr(recipe.model.config, name, value)
    for name in SIZES:
        setattr(recipe.trainer.strategy, name, 1)
    recipe.trainer.strategy.virtual_pipeline_model_parallel_size = None
    recipe.trainer.strategy.sequence_parallel = False
    recipe.trainer.devices = recipe.trainer.num_nodes = recipe.trainer.log_every_n_steps = 1
    return recipe


def forget():
    """Leave no trace of a run for the next one of this process."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    launched = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in [name for name in os.environ if name in launched or name.startswith("NVTE_")]:
        del os.environ[name]
    gc.collect()


def main(corpus, output, *names):
    import nemo_run as run
    from nemo.collections import llm

    from nemo_longctx.adapters.nemo.recipes import extend_recipe

    data = {"mix": {"sources": [{"path": corpus}]}, "cache_dir": f"{output}/order"}
    for name in names:
        stock = cut(getattr(llm, name).pretrain_recipe(dir=output, name=name))
        recipe = extend_recipe(stock, data=data, curriculum=CURRICULUM, rope={"variant": "abf", "base": 5e5})
        run.run(recipe, direct=True)
        results = Path(output) / name / "results"
        settings = json.loads((results / "settings.json").read_text())
        rows = (results / "training.csv").read_text().splitlines()[1:]
        record = {"name": name, "rows": len(rows), "verified": settings["verified"], "attention": settings["attention"]}
        print("RECORD", json.dumps(record), flush=True)
        forget()


if __name__ == "__main__":  # the checkpoint writer is a spawned process, which imports this file
    main(*sys.argv[1:])
