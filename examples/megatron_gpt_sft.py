"""Instruction tuning of an extended model on short and long conversations: what `nemo-longctx sft` does, as a script.

    python examples/megatron_gpt_sft.py restore_from=runs/llama2_7b_32k data.tokenizer=/models/llama2_7b \\
        'data.short=[chat.jsonl]' 'data.long=[out/instances.jsonl]'
    python examples/megatron_gpt_sft.py sft=short_and_pretraining ... 'data.pretraining={sources: [{path: corpus}]}'
    python examples/megatron_gpt_sft.py ... 'lora={dim: 16}'

`sft` chooses a row of Table 9 (Xiong et al. 2023): chat_baseline, short, short_and_pretraining, self_instruct_no_prompt_loss,
self_instruct_prompt_loss. Started again after a kill, the same command goes on from its last checkpoint.
"""

import sys

from nemo_longctx.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
