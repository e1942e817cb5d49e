"""Mutated Hugging Face directories, by number: what the checks let pass must load, and rotate as transformers reads it.

`python tests/hf/mutations.py 10000` tries so many and prints what came out; the tests try some hundreds.
"""

import collections
import contextlib
import copy
import json
import logging
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from hf_files import config_of, word_tokenizer, write_safetensors

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.directory import check_directory, write_copy
from nemo_longctx.hf.tokenizer import load_hf_tokenizer

JUNK = [
    None, True, False, 0, 1, -1, 2, 3, 16, 64, 128, 512, 513, 4096, 10**12, 10**400, 0.0, 0.5,
    1.0, 1.5, -2.0, 128.0, 1e-30, 1e30, 1e308, float("nan"), float("inf"), "", "x", "128", "1e4", "yarn", "default", "silu",
    "llama", "true", "float16", "torch.bfloat16", [], [1], [1, 0, 1, 1], ["full_attention"] * 4,
    ["sliding_attention", "full_attention"] * 2, {}, {"a": 1}, {"rope_type": "linear"}, [None],
]  # fmt: skip
FACTORS = [1.0 + 0.1 * i for i in range(8)]
TRAINED = {"original_max_position_embeddings": 128}
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED},
    {"rope_type": "yarn", "factor": 4.0, **TRAINED, "beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": FACTORS, **TRAINED},
]  # fmt: skip
KEYS = (
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "max_position_embeddings", "head_dim",
    "partial_rotary_factor", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers",
    "no_rope_layer_interval", "torch_dtype", "dtype", "tie_word_embeddings", "quantization_config", "pad_token_id", "auto_map",
    "hidden_act", "attention_dropout", "architectures", "id2label", "num_labels", "problem_type", "attn_implementation",
)  # fmt: skip
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "temperature": 0.9,
    "top_p": 0.6,
    "max_length": 4096,
    "top_k": 50,
    "num_beams": 1,
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": {"content": "w2", "special": True},
    "model_max_length": 512, "extra_special_tokens": ["w5"], "added_tokens_decoder": {"1": {"content": "w1", "special": True}},
    "chat_template": "{{ messages }}",
}  # fmt: skip


def mutated(values, keys, chance):
    """A copy of a mapping with one to three changes: a value replaced, dropped or added, at the top or one level down."""
    made = copy.deepcopy(values)
    for _ in range(chance.choice((1, 1, 2, 3))):
        inner = [value for value in made.values() if isinstance(value, dict)]
        place = chance.choice(inner) if inner and chance.random() < 0.5 else made
        key = chance.choice([*place, *(keys if place is made else ())] or ["x"])
        if chance.random() < 0.15:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(chance.choice(JUNK))
    return made


def write_mutation(folder, number):
    """Directory `number`: one file of it is changed. Returns its raw config, or None where its text is damaged."""
    chance = random.Random(number)
    family = chance.choice(("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "starcoder2"))
    config = config_of(family, rope_scaling=chance.choice(SCALINGS), pad_token_id=None)
    if chance.random() < 0.3:
        scaling = config.pop("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = scaling | {"rope_theta": config.pop("rope_theta")}
    files = {
        "config.json": config,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER,
        "tokenizer.json": word_tokenizer(),
    }
    name = chance.choice(
        ("config.json", "config.json", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    )
    files[name] = mutated(files[name], KEYS if name == "config.json" else (), chance)
    for each, content in files.items():
        (folder / each).write_text(json.dumps(content))
    if chance.random() < 0.03:
        text = (folder / name).read_bytes()
        at = chance.randrange(len(text))
        (folder / name).write_bytes(
            text[:at] + chance.choice((b"", b"\xff", b"]", b'"')) + (text[at + 1 :] if chance.random() < 0.5 else b"")
        )
    with contextlib.suppress(ValueError):
        return json.loads((folder / "config.json").read_text(errors="replace"))
    return None


def frequencies(config, length):
    """What transformers rotates by at `length` tokens, float32 [rotary_dim / 2], and its attention factor."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.tensor([[length - 1]]))
    return rotary.inv_freq.numpy(), rotary.attention_scaling


def try_mutation(folder, number):
    """What became of directory `number`: "refused for KEY" or "taken".

    Raises:
        AssertionError: frequencies that are not transformers', or a refusal that is no sentence.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig

    raw = write_mutation(folder, number)
    table = np.zeros((100, 4), np.float32)
    write_safetensors(folder / "model.safetensors", {"model.embed_tokens.weight": table, "lm_head.weight": table})
    try:
        found = check_directory(folder)
        made = write_copy(found, folder / "copy")
        load_hf_tokenizer(made, named=folder)
    except ConfigError as error:
        return f"refused for {error.key.partition('[')[0]}"
    config = AutoConfig.from_pretrained(made)
    generation = GenerationConfig.from_pretrained(made)
    generation.save_pretrained(folder / "saved")
    variant, longest = found.config.variant, found.config.values["max_position_embeddings"]
    readings = [config]
    endless = type(raw.get("num_labels")) is int and raw["num_labels"] > 10**6  # transformers would name each of them
    if not raw.get("rope_parameters") and not endless:
        with contextlib.suppress(Exception):  # what transformers makes of the file as it stands, where it makes anything
            theirs = AutoConfig.from_pretrained(folder)
            frequencies(theirs, 2)
            readings.append(theirs)
    for reading in readings:
        for length in {2, min(longest, 2**20), 300}:
            with torch.no_grad(), np.errstate(all="ignore"):
                live, factor = frequencies(reading, length)
            ours, plain = variant.inv_freq(found.config.rotary_dim, length), variant.base ** -(np.arange(len(live)) / len(live))
            assert live.shape == ours.shape, (number, live.shape, ours.shape)
            assert (np.abs(live - ours.astype(np.float64)) <= 4e-6 * plain).all(), (
                number,
                length,
                live.tolist(),
                ours.tolist(),
            )
            assert abs(factor - variant.attention_scaling) <= 1e-6 * abs(factor), (number, factor, variant.attention_scaling)
    return "taken"


def main(count):
    """Try directories 0 to `count` and print how many were taken, refused, or failed, with each failure's number."""
    logging.disable(logging.WARNING)
    outcomes = collections.Counter()
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[try_mutation(Path(folder), number)] += 1
            except Exception as error:
                outcomes["failed"] += 1
                print(f"{number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if number % 500 == 499:
            print(number + 1, dict(outcomes), flush=True)
    print(dict(outcomes))
    return int(outcomes["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
