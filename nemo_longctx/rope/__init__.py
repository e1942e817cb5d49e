"""RoPE variants and their analysis: pure functions over NumPy.

from nemo_longctx.rope import RopeVariant, YarnRope, parse

yarn = YarnRope(factor=8.0, original_max_position_embeddings=4096)      # or parse({"variant": "yarn", ...})
yarn.inv_freq(128), yarn.attention_scaling, yarn.xpos_zeta(128)
keys = yarn.to_hf(rotary_dim=128, max_position_embeddings=32_768)       # version=5 for transformers' rope_parameters
assert RopeVariant.from_hf(keys) == YarnRope.from_hf(keys) == yarn
"""

from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import (
    VARIANTS,
    AbfRope,
    DynamicNtkRope,
    Llama3Rope,
    LongRope,
    NtkByPartsRope,
    NtkRope,
    PiRope,
    Rope,
    XposRope,
    YarnRope,
    parse,
    to_dict,
)

__all__ = [
    "VARIANTS",
    "AbfRope",
    "DynamicNtkRope",
    "Llama3Rope",
    "LongRope",
    "NtkByPartsRope",
    "NtkRope",
    "PiRope",
    "Rope",
    "RopeVariant",
    "XposRope",
    "YarnRope",
    "parse",
    "to_dict",
]
