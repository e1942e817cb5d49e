"""Files of small Hugging Face directories, written without any model."""

import json
import struct

import numpy as np

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def config_of(model_type="llama", **changes):
    return {"model_type": model_type, **SIZES, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2} | changes


def write_safetensors(path, tensors, dtypes=None):
    """name -> array; `dtypes` names a type that NumPy has not (BF16, F8_E4M3)."""
    names = {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "int32": "I32",
        "uint16": "BF16",
        "uint8": "U8",
        "int64": "I64",
    }
    header, blob = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        dtype = (dtypes or {}).get(name, names[str(array.dtype)])
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)


def word_tokenizer(vocab=100, **added):
    """A tokenizer.json of whole words, with `added` tokens and their numbers."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": number, "content": token, "special": True} | flags for token, number in added.items()]
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocab)}, "unk_token": "w0"}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
