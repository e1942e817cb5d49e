"""Throughput under a curriculum: a real Lightning run whose operations add up to the plan's."""

import json
import types

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from nemo_longctx.adapters.nemo.launch.throughput import ThroughputCallback, shape_of, throughput_table
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.planning.flops import CONVENTIONS, token_flops
from nemo_longctx.planning.models import MODELS

SHAPE = MODELS["llama2_7b"]
CURRICULUM = Curriculum(
    stages=(StageConfig(until=0.5, seq_length=1024), StageConfig(until=1.0, seq_length=8192)),
    tokens_per_step=16_384,
    total_tokens=16_384 * 8,
)


class Module(pl.LightningModule):
    """A module that trains in no time and says that it is a Llama 2 7B."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.config = types.SimpleNamespace(
            num_layers=SHAPE.num_layers,
            hidden_size=SHAPE.hidden_size,
            ffn_hidden_size=SHAPE.ffn_hidden_size,
            num_attention_heads=SHAPE.num_attention_heads,
            num_query_groups=None,
            kv_channels=None,
            vocab_size=SHAPE.vocab_size,
            gated_linear_unit=True,
            share_embeddings_and_output_weights=False,
            add_qkv_bias=False,
            num_moe_experts=None,
            seq_length=8192,
        )

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.layer(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_what_could_not_be_planned_is_said_in_its_line():
    stage = {"seq_length": 1024, "steps": 2, "tokens_per_second": 10.0, "tflops_per_gpu": 1.0}
    known = stage | {"planned": {"memory_gib": 1.5}, "mfu": 0.25}
    unknown = stage | {"planned": {"unknown": "it does not fit"}}
    said = throughput_table({"convention": "c", "stages": [known, unknown], "peak_allocated_gib": None}).splitlines()
    assert said[2].split() == ["1,024", "2", "10", "-", "1.00", "25.0%", "1.50"]
    assert said[3].split() == ["1,024", "2", "10", "-", "1.00", "-", "-", "it", "does", "not", "fit"]
    assert len(said) == 4


def train(tmp_path, **kwargs):
    callback = ThroughputCallback(curriculum=CURRICULUM, path=str(tmp_path / "results" / "throughput.json"), **kwargs)
    trainer = pl.Trainer(
        max_steps=CURRICULUM.total_steps,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=3,
        num_sanity_val_steps=0,
    )
    data = DataLoader(torch.ones(64, 2), batch_size=2)
    trainer.fit(Module(), data, data)
    return json.loads((tmp_path / "results" / "throughput.json").read_text()), trainer


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("convention", ["causal", "full"])
def test_every_step_counts_at_its_own_length(tmp_path, every, convention):
    """Windows that straddle the switch after step 4 too: 3 steps at 1,024 (the first warms up), 4 at 8,192."""
    record, _ = train(tmp_path, every=every, convention=convention, peak_tflops=100.0)
    assert [(stage["seq_length"], stage["steps"]) for stage in record["stages"]] == [(1024, 3), (8192, 4)]
    for stage in record["stages"]:
        flops = token_flops(SHAPE, stage["seq_length"], CONVENTIONS[convention]).total * 16_384
        assert stage["flops"] == pytest.approx(flops * stage["steps"])
        assert stage["tflops_per_gpu"] == pytest.approx(stage["flops"] / stage["seconds"] / 1e12)
        assert stage["mfu"] == pytest.approx(stage["tflops_per_gpu"] / 100)
    assert record["convention"] == convention
    assert record["measured_steps"] == 7
    planned = record["planned_total_flops"]
    first = token_flops(SHAPE, 1024, CONVENTIONS[convention]).total * 16_384
    assert sum(stage["flops"] for stage in record["stages"]) + first == pytest.approx(planned)


@pytest.mark.parametrize(
    ("change", "kept"),
    [({}, {0: 3, 1: 4}), ({"devices": 2}, {}), ({"convention": "full"}, {}), ({"lengths": (512, 8192)}, {1: 4}),
     ({"numbers": False}, {}), ({"gone": True}, {})],
)  # fmt: skip
def test_a_run_that_goes_on_keeps_what_it_measured(tmp_path, change, kept):
    """The stages behind a restart were gone from the file, and from the table at the end."""
    path = tmp_path / "t.json"
    lengths = change.get("lengths", (1024, 8192))
    stages = [
        {"seq_length": length, "steps": n, "flops": 2.0 * n, "seconds": 1.0 * n, "mfu": 0.5}
        | ({"number": place} if change.get("numbers", True) else {})
        for place, (length, n) in enumerate(zip(lengths, (3, 4), strict=True))
    ]
    record = {"convention": change.get("convention", "causal"), "devices": change.get("devices", 1), "stages": stages}
    if not change.get("gone"):
        path.write_text(json.dumps(record))
    found = ThroughputCallback(curriculum=CURRICULUM, path=str(path))._earlier(1)
    assert {number: stage["steps"] for number, stage in found.items()} == kept
    for stage in found.values():
        assert list(stage) == ["seq_length", "steps", "flops", "seconds"]


def test_metrics_are_logged_and_without_a_known_peak_there_is_no_mfu(tmp_path):
    record, trainer = train(tmp_path, every=1)
    assert {"tokens_per_second", "tflops_per_gpu"} <= set(trainer.callback_metrics)
    if not torch.cuda.is_available():
        assert "mfu" not in record
        assert record["peak_tflops"] is None


def test_shape_of_a_config_is_the_planners():
    config = Module().config
    assert shape_of(config).parameters == SHAPE.parameters
    assert (shape_of(config).sliding_window, shape_of(config).full_layers) == (None, None)
    config.window_size = (1023, 0)
    assert (shape_of(config).sliding_window, shape_of(config).full_layers) == (1024, None)  # in every layer
    config.window_attn_skip_freq = 4  # each fourth layer sees everything
    assert (shape_of(config).sliding_window, shape_of(config).full_layers) == (1024, SHAPE.num_layers // 4)


@pytest.mark.parametrize(
    ("kwargs", "key"), [({"every": 0}, "every"), ({"convention": "mine"}, "flops"), ({"peak_tflops": -1.0}, "peak_tflops")]
)
def test_bad_settings_are_refused(tmp_path, kwargs, key):
    with pytest.raises(ConfigError, match=key):
        ThroughputCallback(curriculum=CURRICULUM, path=str(tmp_path / "t.json"), **kwargs)


def test_experts_are_refused():
    config = Module().config
    config.num_moe_experts = 8
    with pytest.raises(ConfigError, match="experts"):
        shape_of(config)
