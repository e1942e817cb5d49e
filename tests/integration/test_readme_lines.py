"""The README's lines for one's own checkpoint, as they are printed, in order; `scale=tiny` makes the training small."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["scale=tiny", "trainer.accelerator=cpu", "trainer.precision=auto", "trainer.num_nodes=1"]
HELD_OUT = ["data.validation=[{name: holdout, path: data/long_holdout, seq_length: 128, samples: 8}]"]


def lines():
    """The words of each command of the block under "With your own NeMo checkpoint"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## With your own NeMo checkpoint\s+```bash\n(.*?)```", text, re.DOTALL).group(1)
    words = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [each for each in words if each]


def make_inputs(place):
    """Texts of many lengths, and a Llama of the small shape in Hugging Face's form, trained at 4,096 tokens / 128."""
    from tiny_models import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    (place / "papers").mkdir()
    texts = [f"It was {number} o'clock, and nobody spoke. " * (1 + number % 40) for number in range(300)]
    (place / "papers" / "one.txt").write_text(texts[39] * 3)
    plain = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    import zstandard  # as prepare reads it

    (place / "books.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.encode()))
    config = LlamaConfig(vocab_size=384, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=8, max_position_embeddings=32)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "ckpt" / "llama2_7b_hf")
    byte_tokenizer(texts).save_pretrained(place / "ckpt" / "llama2_7b_hf")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_they_run_as_printed(tmp_path):
    make_inputs(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # of one node
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    printed = {}
    for words in lines():
        typed = [word.replace("/ckpt/", f"{tmp_path}/ckpt/") for word in words[1:]]
        command = [sys.executable, "-m", "nemo_longctx", *typed]
        if words[0] == "torchrun":
            command = [*torchrun, *typed[typed.index("nemo_longctx") - 1 :], *SMALL, *HELD_OUT]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{(done.stdout + done.stderr)[-4000:]}"
        printed[words[0] if words[0] == "torchrun" else words[1]] = done.stdout
    assert list(printed) == ["prepare", "inspect", "plan", "import", "torchrun", "export"]
    assert "RoPE verified live: abf (base=500000" in printed["torchrun"]
    assert "verified by loading it again" in printed["export"]
    config = json.loads((tmp_path / "ckpt" / "llama2_7b_32k_hf" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (256, 500000)
