"""Memory and time: how they move with the layout, and the published rows within the stated errors."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.planning import memory, override, timing
from nemo_longctx.planning.gpus import GIB, GPUS
from nemo_longctx.planning.layout import Layout, layout_faults
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import MODELS
from nemo_longctx.planning.timing import rates_for, step_time

MODEL = MODELS["llama2_70b"]
BASE = Layout(gpus=64, tensor_model_parallel_size=8, pipeline_model_parallel_size=4)


def plan(layout, seq_length=16_384, batch=256, **kwargs):
    return memory_plan(MODEL, layout, seq_length=seq_length, global_batch_size=batch, **kwargs)


def published():
    path = Path(__file__).parents[2] / "benchmarks" / "plan_published.py"
    spec = importlib.util.spec_from_file_location("plan_published", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED = published()


@pytest.mark.parametrize("row", PUBLISHED.comparisons(), ids=lambda row: f"{row['peer']}: {row['what']}")
def test_published_rows_are_met_within_the_stated_error(row):
    """Conventions within 0.2 %, memory and speed within 10 %; torchtitan's CP 4 and 8 lose speed that no plan explains.

    Those rows are not met: their error is stated beside the others', and the planner must not be quietly better or worse.
    """
    if row["beyond"]:
        assert timing.STATED_ERROR < row["ratio"] - 1 <= timing.STATED_ERROR_ACROSS_CP
    else:
        assert row["ratio"] == pytest.approx(1, abs=PUBLISHED.STATED[row["of"]])


def test_only_torchtitans_wide_context_parallelism_is_beyond_the_planner():
    beyond = [row for row in PUBLISHED.comparisons() if row["beyond"]]
    assert {row["peer"] for row in beyond} == {"torchtitan H100"}
    assert all("131072" in row["what"] or "262144" in row["what"] for row in beyond)
    assert len(beyond) == 3


def test_what_nvidia_found_impossible_does_not_fit_and_its_context_parallel_row_does():
    """NeMo's long sequence table: Llama 3 8B at 1,024k cannot run on B200s without CP, at any TP, with full recomputation.

    At TP 8 it misses by less than the stated error.
    """
    model, room = MODELS["llama3_8b"], GPUS["b200"].memory_gib * GIB
    for tensor in (1, 2, 4, 8):
        layout = Layout(gpus=256, tensor_model_parallel_size=tensor, recompute="full", precision="fp8")
        total = memory_plan(model, layout, seq_length=2**20, global_batch_size=256 // tensor).total
        assert total * (1 + (memory.STATED_ERROR if tensor == 8 else 0)) > room
    ran = Layout(gpus=256, tensor_model_parallel_size=4, context_parallel_size=16, recompute="full")
    assert memory_plan(model, ran, seq_length=2**20, global_batch_size=4).total < room


def test_every_layout_that_nvidia_ran_fits():
    for peer in ("nemo_h100", "nemo_b200"):
        gpu = GPUS[PUBLISHED.PEERS[peer]["gpu"]]
        for record in PUBLISHED._records(peer):
            layout = PUBLISHED._layout(record, recompute="full")
            length, batch = record["seq_length"], record["global_batch_size"]
            model = MODELS[PUBLISHED.PEERS[peer]["model"]]
            assert not layout_faults(model, layout, length, batch)
            total = memory_plan(model, layout, seq_length=length, global_batch_size=batch).total
            assert total < gpu.memory_gib * GIB, record


def test_parts_add_up_to_the_weights_of_the_whole_model():
    """Over all GPUs of one replica the weights are the parameters, each norm counted once a TP rank."""
    one = plan(Layout(gpus=1, sharding="none"), batch=1)
    assert one.weights == 2 * MODEL.parameters
    assert one.gradients == 4 * MODEL.parameters
    assert one.optimizer == 12 * MODEL.parameters


def test_distributed_optimizer_divides_over_data_and_context_parallel_ranks():
    sharded = plan(replace(BASE, gpus=256, context_parallel_size=2))
    whole = plan(replace(BASE, gpus=256, context_parallel_size=2, sharding="none"))
    assert sharded.optimizer == pytest.approx(whole.optimizer / 8)
    fsdp = plan(Layout(gpus=64, sharding="full", precision="fsdp_bf16"))
    assert fsdp.weights == pytest.approx(4 * MODEL.parameters / 64)


@pytest.mark.parametrize("kernel", ["flash", "scores"])
def test_recomputation_orders_activations_and_costs_time(kernel):
    totals, seconds = [], []
    for recompute in ("none", "block:10", "full"):
        layout = replace(BASE, recompute=recompute, attention_kernel=kernel)
        totals.append(plan(layout).activations)
        seconds.append(step_time(MODEL, layout, GPUS["h100"], seq_length=16_384, global_batch_size=256).total)
    assert totals == sorted(totals, reverse=True)
    assert seconds == sorted(seconds)
    assert totals[-1] < totals[0] / 8


def test_selective_recomputation_drops_the_scores_or_else_the_mlps_and_nothing_else():
    flash = plan(BASE).activations
    scores = replace(BASE, attention_kernel="scores")
    assert plan(scores).activations > 8 * flash
    assert plan(replace(scores, recompute="selective")).activations == pytest.approx(flash)
    mlps = 16_384 * 3 * MODEL.ffn_hidden_size / 8 * 2 * MODEL.num_layers  # 4 stages of a quarter, 4 microbatches in flight
    assert plan(replace(BASE, recompute="selective")).activations == pytest.approx(flash - mlps)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("context", [1, 2])
def test_offload_moves_what_was_kept_and_costs_time(recompute, context):
    sizes = {"gpus": 64 * context, "context_parallel_size": context, "pipeline_model_parallel_size": 1}
    here = replace(BASE, **sizes, recompute=recompute)
    kept, away = plan(here), plan(replace(here, offload="full"))
    half = plan(replace(here, offload="block:40"))
    assert kept.offloaded == 0 < half.offloaded < away.offloaded
    assert away.activations + away.offloaded == pytest.approx(kept.activations)
    assert half.offloaded == pytest.approx(away.offloaded / 2)
    assert kept.total - away.total == pytest.approx(away.offloaded)
    # What attention saves stays under context parallelism, but where the layer is run again anyway.
    assert (away.activations < kept.activations / 10) == (context == 1 or recompute == "full")
    times = [
        step_time(MODEL, replace(here, offload=offload), GPUS["h100"], seq_length=16_384, global_batch_size=256)
        for offload in ("none", "full")
    ]
    assert times[0].offload == 0
    moved = 2 * away.offloaded / (GPUS["h100"].host_gb_s * 1e9 * timing.LINK_EFFICIENCY)
    assert times[1].offload == pytest.approx(32 * moved)  # 256 sequences over 8 data-parallel ranks
    assert times[1].total > times[0].total


def test_context_parallelism_halves_what_grows_with_the_sequence():
    one, two = plan(BASE), plan(replace(BASE, gpus=128, context_parallel_size=2))
    assert two.activations == pytest.approx(one.activations / 2)
    assert plan(BASE, seq_length=32_768).activations == pytest.approx(2 * one.activations)


def test_sequence_parallel_shards_the_residual():
    assert plan(BASE).activations < plan(replace(BASE, sequence_parallel=False)).activations


def test_interleaving_keeps_more_and_waits_less():
    interleaved = replace(BASE, virtual_pipeline_model_parallel_size=5)
    assert plan(interleaved).activations > plan(BASE).activations
    times = [step_time(MODEL, x, GPUS["h100"], seq_length=16_384, global_batch_size=256) for x in (BASE, interleaved)]
    assert times[1].bubble == pytest.approx(times[0].bubble / 5)


def test_chunked_loss_needs_less_and_its_chunk_is_the_codes_own():
    from nemo_longctx.attention import loss  # imports torch

    assert loss.CHUNK_LIMITS == memory.LOSS_CHUNK_LIMITS
    model, one = MODELS["llama3_8b"], Layout(gpus=1)
    sizes = [
        memory_plan(model, replace(one, loss=name), seq_length=32_768, global_batch_size=1).logits
        for name in ("chunked", "vocab_parallel", "eager")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] / 4


def test_kv_cache_counts_only_where_it_is_the_peak():
    small, large = plan(BASE, eval_length=1024), plan(BASE, eval_length=2**24)
    assert small.total == plan(BASE).total
    assert large.kv_cache == 2**24 * 20 * 2 * MODEL.kv_width / 8 * 2
    assert large.total - large.kv_cache == pytest.approx(
        large.weights + large.gradients + large.optimizer + large.communication + large.framework
    )


def test_assumed_rates_say_so_and_fp8_needs_the_hardware():
    assert rates_for(GPUS["h200"], "bf16").source.startswith("assumed")
    with pytest.raises(ConfigError, match="no fp8"):
        rates_for(GPUS["a100"], "fp8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tensor_model_parallel_size": 16}, "key/value heads"),
        ({"pipeline_model_parallel_size": 64, "tensor_model_parallel_size": 1}, "layers"),
        ({"gpus": 96}, "global batch"),
        ({"virtual_pipeline_model_parallel_size": 5, "micro_batch_size": 64}, "multiple of PP"),
    ],
)
def test_layouts_that_megatron_refuses(changes, says):
    changes = {"gpus": 64, "pipeline_model_parallel_size": 4, **changes}
    faults = layout_faults(MODEL, replace(BASE, **changes), 16_384, 256)
    assert any(says in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"gpus": 63}, "gpus"),
        ({"recompute": "some"}, "recompute"),
        ({"offload": "selective"}, "offload"),
        ({"precision": "fp4"}, "precision"),
        ({"gpus": 0}, "gpus"),
    ],
)
def test_bad_layouts_name_the_key(changes, key):
    with pytest.raises(ConfigError, match=key):
        replace(BASE, **changes)


def test_a_stage_keeps_the_micro_batches_in_flight_and_no_more_than_there_are():
    """1F1B: stage s of pp holds min(pp - s, micro batches); interleaved, the chunks of its warm-up (Narayanan et al. 2021)."""

    def kept(layout, stage, microbatches):
        layer = memory._layer_activations(MODEL, layout, 4096)
        batch = microbatches * layout.micro_batch_size * layout.data_parallel_size
        return memory._kept_elements(MODEL, layout, stage, layer, batch)[0]

    middle = [kept(BASE, stage, 64) for stage in (1, 2)]
    assert middle[0] / middle[1] == pytest.approx(3 / 2)
    assert kept(BASE, 1, 1) == pytest.approx(middle[0] / 3)
    assert kept(BASE, 1, 2) == pytest.approx(middle[1])
    assert kept(BASE, 1, 3) == kept(BASE, 1, 64)
    interleaved = replace(BASE, virtual_pipeline_model_parallel_size=2)
    assert kept(interleaved, 1, 64) / kept(interleaved, 1, 1) == pytest.approx(((4 - 1 - 1) * 2 + 4 + 1) / 2)


def test_the_tables_lie_on_the_first_and_the_last_stage_and_once_where_they_are_one():
    plain = replace(BASE, tensor_model_parallel_size=1)
    stages = [memory.stage_parameters(MODEL, plain, stage) for stage in range(4)]
    assert sum(stages) == pytest.approx(MODEL.parameters)
    assert stages[3] - stages[1] == pytest.approx(MODEL.embedding_parameters + MODEL.hidden_size)
    one = Layout(gpus=8)
    for tied in (False, True):
        model = replace(MODEL, share_embeddings_and_output_weights=tied)
        assert memory.stage_parameters(model, one, 0) == pytest.approx(model.parameters)
    assert MODEL.parameters - model.parameters == MODEL.embedding_parameters


def test_context_parallel_ranks_take_two_chunks_each():
    layout = Layout(gpus=8, context_parallel_size=4)
    assert not layout_faults(MODEL, layout, 16_384, 8)
    assert any("2 x CP = 8 does not divide" in fault for fault in layout_faults(MODEL, layout, 16_388, 8))


def test_a_node_keeps_rings_whole():
    """36 GPUs in nodes of 8, groups of TP 2 x CP 2: nodes of 4, though 6 divide 36."""
    layout = Layout(gpus=36, tensor_model_parallel_size=2, context_parallel_size=2)
    planned = SimpleNamespace(chosen=SimpleNamespace(layout=layout), gpu=GPUS["h100"])
    devices, notes = override._devices(planned, {})
    assert devices == 4
    assert "9 nodes of 4" in notes[0]


def test_gradients_are_reduced_behind_half_of_the_last_micro_batch():
    """Half the bandwidth takes twice as long, and the same time of it is hidden."""

    def parts(gb_s):
        return step_time(MODEL, BASE, replace(GPUS["h100"], network_gb_s=gb_s), seq_length=16_384, global_batch_size=256)

    once, twice = parts(1.0), parts(0.5)
    assert 0 < once.data_parallel < twice.data_parallel
    hidden = twice.data_parallel - 2 * once.data_parallel
    assert hidden == pytest.approx(0.5 * once.compute / BASE.num_microbatches(256))
    assert parts(1e6).data_parallel == 0
