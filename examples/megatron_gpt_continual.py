"""Continual pretraining of a GPT model at a longer context: what `nemo-longctx train` does, as a script.

    python examples/megatron_gpt_continual.py recipe=tiny_cpu_base
    python examples/megatron_gpt_continual.py recipe=tiny_cpu_long restore_from=runs/tiny_cpu_base rope=abf
    torchrun --nproc-per-node 8 examples/megatron_gpt_continual.py recipe=llama2_7b trainer.num_nodes=1

Started again after a kill, the same command goes on from its last checkpoint. --help lists groups, choices and keys, --dry-run
looks at all that can be seen without NeMo, --print-config says where each value comes from.
"""

import sys

from nemo_longctx.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
