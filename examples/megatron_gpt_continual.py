"""Continual pretraining of a GPT model at a longer context: compose the recipe, build NeMo's parts, fit.

    python examples/megatron_gpt_continual.py recipe=tiny_cpu_base
    python examples/megatron_gpt_continual.py recipe=tiny_cpu_long restore_from=runs/tiny_cpu_base rope=abf
    torchrun --nproc-per-node 8 examples/megatron_gpt_continual.py recipe=llama2_7b restore_from=/ckpt/llama2_7b

Started again after a kill, the same command goes on from its last checkpoint. --help lists groups, choices and keys.
"""

import sys

from nemo_longctx.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], description=__doc__))
