"""What the recipes are in the host: built on the meta device with two layers, and as nemo_run configs. One JSON line a recipe.

recipes_worker.py NAME...
"""

import json
import sys

import torch

from nemo_longctx.adapters.megatron import cpu

cpu.install()

import fiddle as fdl  # noqa: E402
import nemo_run as run  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer  # noqa: E402

from nemo_longctx.adapters.megatron.attention import attention_summary  # noqa: E402
from nemo_longctx.adapters.nemo import recipes  # noqa: E402
from nemo_longctx.compose import compose  # noqa: E402

LAYERS = 2
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()

for name in sys.argv[1:]:
    print("NAME", name, flush=True)
    family, _, size = name.partition("_")
    partial = recipes.pretrain_partial(family, size, "", None, None)
    assert isinstance(partial, run.Partial)
    serializer = ZlibJSONSerializer()
    same = serializer.deserialize(serializer.serialize(partial)) == partial
    shared = partial.model.restore is partial.resume.restore_config
    partial.model.config.num_layers = LAYERS
    restore_from = partial.model.restore.path if partial.model.restore else None
    partial.model.restore = None  # no checkpoint is at hand
    with cpu.stock_configs():
        model = fdl.build(partial.model)
    with torch.device("meta"):
        module = model.config.configure_model(tokenizer=None)
    throughput = fdl.build(partial.trainer.callbacks[1])
    optim = fdl.build(partial.optim)
    record = {
        "name": name,
        "serialises": same,
        "parameters": sum(p.numel() for p in module.parameters()),
        "devices": sorted({p.device.type for p in module.parameters()}),
        "attention": attention_summary(module),
        "class": type(model).__name__,
        "seq_length": model.config.seq_length,
        "rope": compose([f"recipe={name}"])["rope"]["variant"],
        "rotary_base": model.config.rotary_base,
        "max_steps": partial.trainer.max_steps,
        "warmup_steps": optim.lr_scheduler.warmup_steps,
        "lr": optim.config.lr,
        "min_lr": optim.lr_scheduler.min_lr,
        "tokens_per_step": throughput.curriculum.tokens_per_step,
        "restore_from": restore_from,
        "one_restore": shared,
        "callbacks": [callback.__fn_or_cls__.__name__ for callback in partial.trainer.callbacks],
        "verifies": model.long_context_start.variant.variant,
    }
    print("RECORD", json.dumps(record), flush=True)
