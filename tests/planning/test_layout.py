"""Layouts: what one is by default, what is none, and what Megatron-Core would refuse of one, in whole sentences."""

import dataclasses
import random

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.planning.layout import Layout, layout_faults
from nemo_longctx.planning.models import ModelShape

TP, PP, CP, VP = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context", "virtual_pipeline_model"))
SIZES = ("gpus", TP, PP, CP, "micro_batch_size")


def test_a_layout_of_nothing_is_one_gpu_that_keeps_all_in_mixed_precision():
    assert dataclasses.asdict(Layout()) == {
        **dict.fromkeys(SIZES, 1), VP: None, "sequence_parallel": True, "recompute": "none", "offload": "none",
        "sharding": "optimizer", "precision": "bf16", "grad_reduce_in_fp32": True, "loss": "vocab_parallel",
        "attention_kernel": "flash", "unfused": False,
    }  # fmt: skip


@pytest.mark.parametrize("value", [True, False, 0, -1, 1.0, "2", None])
def test_sizes_are_whole_numbers_of_at_least_one(value):
    for key in SIZES:
        with pytest.raises(ConfigError) as error:
            Layout(**{"gpus": 8, key: value})
        assert str(error.value) == f"layout.{key}={value!r}: must be a whole number of 1 or more"
    if value is not None:
        with pytest.raises(ConfigError) as error:
            Layout(gpus=8, **{VP: value})
        assert str(error.value) == f"layout.{VP}={value!r}: must be a whole number of 1 or more model chunks a pipeline stage"


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("sharding", "ful", "full"),
        ("loss", "chunk", "chunked"),
        ("attention_kernel", "flashy", "flash"),
        ("precision", "bf15", "bf16"),
        ("recompute", "block:0", "none, full, or block:N"),
        ("recompute", "everything", "must be selective, none, full"),
        ("offload", "selective", "must be none, full, or block:N"),
    ],
)
def test_a_choice_that_is_none_is_named_with_the_nearest(key, value, nearest):
    with pytest.raises(ConfigError, match=f"^layout.{key}='{value}': .*{nearest}"):
        Layout(**{key: value})


def test_gpus_are_whole_copies():
    with pytest.raises(ConfigError, match=r"layout\.gpus=36: must be a multiple of TP x PP x CP = 24; change one of them"):
        Layout(gpus=36, **{TP: 2, PP: 3, CP: 4})
    layout = Layout(gpus=72, **{TP: 2, PP: 3, CP: 4}, micro_batch_size=5)
    assert (layout.model_parallel_size, layout.data_parallel_size, layout.model_chunks) == (24, 3, 1)
    assert layout.num_microbatches(45) == 3
    for batch in (44, 46):
        mend = f"micro batch x DP = 15 must divide the global batch of {batch} sequences"
        with pytest.raises(ConfigError, match=f"layout.micro_batch_size=5: {mend}"):
            layout.num_microbatches(batch)
    assert (layout.residual_shards, dataclasses.replace(layout, sequence_parallel=False).residual_shards) == (2, 1)


def test_short_names_hold_what_tells_layouts_apart():
    layout = Layout(gpus=72, **{TP: 2, PP: 3, CP: 4}, micro_batch_size=5, recompute="block:2")
    assert layout.short_name() == "TP2 CP4 PP3 DP3 mb5 block:2"
    for chunks, said in ((1, ""), (2, " VP2")):
        several = dataclasses.replace(layout, **{VP: chunks}, offload="full")
        assert several.short_name() == f"TP2 CP4 PP3{said} DP3 mb5 block:2 offload full"


def plain_faults(model, layout, length, batch):
    """Each rule by itself, as a sentence."""
    tp, pp, cp, vp = (getattr(layout, name) or 1 for name in (TP, PP, CP, VP))
    together, chunks = layout.micro_batch_size * (layout.gpus // (tp * pp * cp)), pp * vp
    layers, rest = model.num_layers / chunks, length // cp

    def blocks(name):
        return int(name[6:]) if name.startswith("block:") else 0

    whole, shared = layers == int(layers), layout.sequence_parallel and tp > 1
    rules = [
        (model.num_query_groups % tp != 0, f"TP {tp} does not divide the {model.num_query_groups} key/value heads"),
        (model.num_attention_heads % tp != 0, f"TP {tp} does not divide the {model.num_attention_heads} heads"),
        (model.ffn_hidden_size % tp != 0, f"TP {tp} does not divide the MLP's {model.ffn_hidden_size}"),
        (not whole, f"PP {pp} x VP {vp} does not divide the {model.num_layers} layers"),
        *(
            (whole and blocks(name) > layers, f"{key} {name} names more than the {layers:.0f} layers of a model chunk")
            for key, name in (("recompute", layout.recompute), ("offload", layout.offload))
        ),
        (vp > 1 and pp == 1, "VP needs PP over 1"),
    ]
    if cp > 1 and length % (2 * cp):
        rules.append((True, f"2 x CP = {2 * cp} does not divide the {length} tokens"))
    else:
        said = f"sequence parallel: TP {tp} does not divide the {rest} tokens of a rank"
        rules.append((shared and rest % tp != 0, said))
    if batch % together:
        rules.append((True, f"micro batch x DP = {together} does not divide the global batch of {batch}"))
    else:
        count = batch // together
        rules.append((vp > 1 and count % pp != 0, f"VP needs the {count} microbatches to be a multiple of PP {pp}"))
    return [said for broken, said in rules if broken]


def test_what_megatron_refuses_is_said_rule_by_rule():
    draw, met = random.Random(5), []
    for _ in range(1500):
        tp, pp, cp = draw.choice((1, 2, 4)), draw.choice((1, 2)), draw.choice((1, 1, 2, 4))
        groups = draw.choice((1, 2, 4))
        model = ModelShape(
            num_layers=draw.choice((2, 4, 6)), hidden_size=32, ffn_hidden_size=draw.choice((6, 16)), vocab_size=9,
            num_attention_heads=groups * draw.choice((1, 2)), num_query_groups=groups, kv_channels=8,
        )  # fmt: skip
        layout = Layout(
            gpus=tp * pp * cp * draw.choice((1, 3)), **{TP: tp, PP: pp, CP: cp, VP: draw.choice((None, 1, 2, 3))},
            sequence_parallel=draw.random() < 0.6, micro_batch_size=draw.choice((1, 2)),
            recompute=draw.choice(("none", "selective", "full", "block:1", "block:2", "block:3")),
            offload=draw.choice(("none", "full", "block:1", "block:2")),
        )  # fmt: skip
        length, batch = draw.choice((8, 12, 15, 16, 18)), draw.choice((2, 3, 4, 6, 12))
        found = layout_faults(model, layout, length, batch)
        assert found == plain_faults(model, layout, length, batch)
        met += found or ["nothing"]
    rules = (
        "heads",
        "/value heads",
        "MLP's",
        " layers",
        "recompute",
        "offload",
        "PP over",
        "2 x CP",
        "sequence",
        "micro batch",
    )
    for rule in (*rules, "multiple of PP", "nothing"):
        assert sum(rule in said for said in met) > 20, rule
