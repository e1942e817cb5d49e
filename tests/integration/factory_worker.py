"""A run through a nemo_run factory on a CPU, at tiny sizes. factory_worker.py CORPUS OUTPUT NAME OVERRIDES [break | stock]"""

import json
import sys

import lightning.pytorch as pl
import torch

TINY = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 2}
TINY["vocab_size"] = 300
CPU = ["trainer=cpu", "trainer.tensor_model_parallel_size=1", "trainer.context_parallel_size=1", "trainer.num_nodes=1"]
CPU += ["trainer.sequence_parallel=false", "trainer.val_every_tokens=0", "checkpoint.every_tokens=0"]
CPU += ["optimizer.distributed=false", "optimizer.warmup_tokens=0"]
CPU += ["curriculum.tokens_per_step=512", "curriculum.total_tokens=1536"]


class ReplaceRope(pl.Callback):
    """What a tool or a checkpoint may do to a live model behind a config's back."""

    def on_train_start(self, trainer, pl_module):
        from nemo_longctx.adapters.nemo.model.config import mcore_modules

        for module in mcore_modules(trainer.strategy.megatron_parallel):
            module.rotary_pos_emb.inv_freq = torch.mul(module.rotary_pos_emb.inv_freq, 2)


def stock(run, recipes, corpus, output, name, asked):
    """NeMo's own recipe of Llama 2 7B, cut to the size of this machine, then made long by `extend_recipe`."""
    import nemo.lightning as nl
    from nemo.collections import llm

    recipe = llm.llama2_7b.pretrain_recipe(dir=output, name=name, num_nodes=1, num_gpus_per_node=1)
    for key, value in TINY.items():
        setattr(recipe.model.config, key, value)
    recipe.trainer.accelerator, recipe.trainer.plugins = "cpu", run.Config(nl.MegatronMixedPrecision, precision="32")
    recipe.trainer.strategy.tensor_model_parallel_size = 1
    recipe.trainer.strategy.ckpt_async_save = recipe.trainer.strategy.ckpt_parallel_load = False
    recipe.trainer.strategy.ddp.overlap_grad_reduce = recipe.trainer.strategy.ddp.overlap_param_gather = False
    recipe.optim.config.use_distributed_optimizer, recipe.optim.config.bf16 = False, False
    recipe.optim.lr_scheduler.warmup_steps, recipe.trainer.log_every_n_steps = 0, 1
    return recipes.extend_recipe(
        recipe, **{"data": {"mix": {"sources": [{"path": corpus}]}, "cache_dir": f"{output}/order"}, **asked}
    )


def main(corpus, output, name, overrides, *more):
    from nemo_longctx.adapters.megatron import cpu

    cpu.install()

    import fiddle as fdl
    import nemo_run as run

    from nemo_longctx.adapters.nemo import recipes

    if more == ("stock",):
        task = stock(run, recipes, corpus, output, name, json.loads(overrides))
        with cpu.stock_configs():
            task = fdl.build(task)
        task()
        return
    data = ["data=corpus", f"data.mix.sources=[{{path:{corpus}}}]", "data.validation=[]", f"data.cache_dir={output}/order"]
    partial = recipes.pretrain_partial("llama2", "7b", " ".join([*CPU, *data, overrides]), output, name)
    for key, value in TINY.items():
        setattr(partial.model.config, key, value)
    if more == ("break",):
        partial.trainer.callbacks.insert(0, run.Config(ReplaceRope))
    with cpu.stock_configs():
        task = fdl.build(partial)
    task()


if __name__ == "__main__":  # the checkpoint writer is a spawned process, which imports this file
    main(*sys.argv[1:])
