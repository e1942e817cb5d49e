"""The joint to NVIDIA NeMo 2.7 and Lightning, in folders by job: model, data, checkpoint, evaluation, launch.

`recipes` is what nemo_run's command line and Python import. What knows Megatron-Core alone is in `adapters/megatron`.

Importing anything here puts the exporters in place that keep a checkpoint's RoPE (`checkpoint/exporter.py`), and lets the names
resolve that modules had before they were sorted into folders: contexts of checkpoints hold them.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

# Where it was in 0.1 -> where it is.
MOVED = {
    f"{__name__}.{name}": f"nemo_longctx.adapters.{room}.{name}"
    for room, names in {
        "megatron": "activations attention cpu loss memory_trial position rope_guard rope_module rope_scale self_test "
        "self_test_parallel steps",
        "nemo.model": "lora rope",
        "nemo.data": "data_module instruct_data_module sampler",
        "nemo.checkpoint": "exporter hf_verify hf_weights",
        "nemo.evaluation": "demo_report",
        "nemo.launch": "callbacks executors instruct_run parts run throughput",
    }.items()
    for name in names.split()
} | {
    f"{__name__}.eval_callback": f"{__name__}.evaluation.callback",
    f"{__name__}.inference": f"{__name__}.checkpoint.load",
}


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a moved module under its old name: the same module, not a copy, so that classes stay one class."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(_MovedFinder())

from nemo_longctx.capability import check_host  # noqa: E402

check_host()

from nemo_longctx.adapters.nemo.checkpoint import exporter  # noqa: E402  below the finder, which it may need

exporter.register()
