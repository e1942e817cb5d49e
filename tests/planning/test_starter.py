"""What `init` decides, number by number, and what it says to type next."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from nemo_longctx.config import ConfigError
from nemo_longctx.planning import starter
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.models import MODELS, ModelShape
from nemo_longctx.planning.planner import Candidate, Job, search
from nemo_longctx.planning.starter import Source, learning_rate, next_commands, plan_starter, starter_yaml
from nemo_longctx.rope.analysis import smallest_base
from nemo_longctx.rope.variants import AbfRope, YarnRope

TINY = ModelShape(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=512, seq_length=256)


def source(model=TINY, *, base=10_000.0, path="model", hugging_face=True):
    return Source(path=Path(path), hugging_face=hugging_face, model=model, rope=AbfRope(base=base))


def planned(target=1024, model=TINY, **given):
    return plan_starter(source(model), target=target, data="books", name="run", **given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target": 256}, "--target=256: the checkpoint is trained at 256 tokens already; give a longer target"),
        ({"target": 2**24 + 1}, "--target=16777217: is longer than any context: 16,777,216 tokens at most"),
        ({"gpus": 0}, "--gpus=0: must be 1 or more; leave it out for a CPU"),
    ],
)
def test_what_no_run_can_be_is_refused(given, says):
    with pytest.raises(ConfigError) as error:
        planned(**given)
    assert str(error.value) == says
    assert planned(target=257).target == 257


@pytest.mark.parametrize(("tokens", "steps"), [(None, 200), (1, 1), (4095, 1), (4096, 1), (8191, 1), (8192, 2)])
def test_a_laptop_s_step_is_four_windows(tokens, steps):
    run = planned(tokens=tokens)
    (stage,) = run.curriculum.stages
    assert (stage.until, stage.seq_length, stage.micro_batch_size) == (1.0, 1024, 1)
    assert (run.curriculum.tokens_per_step, run.curriculum.total_tokens) == (4096, 4096 * steps)
    assert (run.layout, run.gpu) == (None, "cpu")


@pytest.mark.parametrize(("tokens", "total"), [(None, 2_000_000_000), (100_000_000, 100_000_000), (5, 4_194_304)])
def test_a_cluster_s_steps_are_the_paper_s_tokens(monkeypatch, tokens, total):
    monkeypatch.setattr(starter, "_base", lambda source, target: 5e5)  # of eight million tokens it takes seconds
    run = planned(target=32_768, model=MODELS["llama2_7b"], gpu="h200", gpus=4, tokens=tokens)
    assert run.curriculum.tokens_per_step == 4_194_304
    assert run.curriculum.total_tokens == max(1, total // 4_194_304) * 4_194_304
    job = Job(
        model=MODELS["llama2_7b"], gpu=starter.gpu_by_name("h200"), seq_length=32_768, tokens_per_step=4_194_304,
        steps=run.curriculum.total_steps,
    )  # fmt: skip
    assert run.layout == search([job], Layout(gpus=4, loss="chunked", sharding="optimizer"))[0]
    long = planned(target=2**23, gpu="h100", gpus=1)
    assert long.curriculum.tokens_per_step == 2**23  # a window at least


def test_windows_are_shared_by_as_many_copies_as_divide_the_gpus():
    for about in range(1, 40):
        for gpus in range(1, 40):
            shared = [n for n in range(1, 40) if gpus % n == 0 and n <= about][-1]
            nearest = min((k * shared for k in range(1, 80)), key=lambda n: abs(n - about))
            found = starter._windows(about, gpus)
            assert found % shared == 0
            assert abs(found - about) == abs(nearest - about)


def test_a_base_is_a_published_model_s_or_the_smallest_that_keeps_the_bound():
    assert starter._base(source(), 32_768) == 500_000.0
    wide = dataclasses.replace(TINY, kv_channels=32)
    for model in (TINY, wide):
        own = starter._base(source(model, base=4e8), 2**17)
        assert own == float(f"{smallest_base(2**17, model.head_dim, at_least=4e8):.3g}")
        assert own >= 4e8


def test_shares_of_a_run_are_whole_steps():
    run = planned()  # 200 steps of 4,096
    assert [run.steps(share) for share in (0.0, 0.001, 0.02, 0.1, 1.0)] == [4096 * n for n in (1, 1, 4, 20, 200)]


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [(1, 1e-3), (2_800_000, 1e-3), (28e6, 3.2e-4), (1.75e9, 4e-5), (7e9, 2e-5), (13e9, 2e-5), (15e9, 2e-5), (15e9 + 1, 1e-5)],
)
def test_learning_rates_fall_with_the_root_of_the_size(parameters, rate):
    assert learning_rate(parameters) == pytest.approx(rate)


@pytest.mark.parametrize("there", [(), ("books",), ("books", "books_holdout")])
def test_a_holdout_is_looked_for_beside_a_corpus_that_is_there(there, monkeypatch):
    monkeypatch.setattr(starter, "is_corpus", there.__contains__)
    run = planned()
    assert run.holdout == (len(there) != 1)
    recipe = yaml.safe_load(starter_yaml(run))
    looks = recipe["data"]["validation"]
    assert [(look["name"], look["path"], look["seq_length"], look["micro_batch_size"], look["samples"]) for look in looks] == (
        [("long", "books_holdout", 1024, 1, 16), ("short", "books_holdout", 256, 1, 16)] if run.holdout else []
    )
    assert recipe.get("trainer") == ({"val_every_tokens": 20 * 4096} if run.holdout else None)


def test_a_laptop_s_recipe_says_each_choice():
    text = starter_yaml(planned())
    recipe = yaml.safe_load(text)
    assert text.startswith("# @package _global_\n# Written by `nemo-longctx init`: model from 256 to 1,024 tokens.\n")
    assert {"override /trainer": "cpu"} in recipe["defaults"]
    assert (recipe["name"], recipe["restore_from"]) == ("run", "checkpoints/model")
    assert recipe["data"]["mix"] == {"sources": [{"path": "books"}]}
    assert recipe["curriculum"] == {
        "stages": [{"until": 1.0, "seq_length": 1024, "micro_batch_size": 1}], "tokens_per_step": 4096, "total_tokens": 819_200
    }  # fmt: skip
    assert recipe["optimizer"] == {"lr": 1e-3, "min_lr": 1e-4, "warmup_tokens": 4 * 4096, "distributed": False}
    assert recipe["checkpoint"] == {"every_tokens": 20 * 4096}
    assert f"# nemo-longctx rope advise --from 256 --to 1024 --base 10000\nrope: {{base: {recipe['rope']['base']}}}" in text
    assert "\n# 200 steps of 4,096 tokens. A laptop's minutes" in text
    assert "whose place this takes" not in text
    scaled = Source(
        path=Path("m"), hugging_face=True, model=TINY, rope=YarnRope(factor=4.0, original_max_position_embeddings=64)
    )
    said = starter_yaml(plan_starter(scaled, target=1024, data="books", name="run"))
    assert "# To keep it, take out `override /rope` and `rope`" in said


def cluster(gpus, gpu="h100"):
    run = planned(target=32_768, model=MODELS["llama2_7b"], gpu=gpu, gpus=4)
    layout = Layout(gpus=gpus, tensor_model_parallel_size=2, loss="chunked", micro_batch_size=2)
    chosen = Candidate(layout=layout, memory_gib=41.6, seconds=1.0, tokens_per_second_per_gpu=1.0, verdict="fastest", reason="")
    return dataclasses.replace(run, layout=chosen)


@pytest.mark.parametrize(("gpus", "devices", "nodes"), [(4, 4, 1), (8, 8, 1), (32, 8, 4)])
def test_a_cluster_s_recipe_and_commands_fill_its_nodes(gpus, devices, nodes):
    run = cluster(gpus)
    text = starter_yaml(run)
    recipe = yaml.safe_load(text)
    assert (recipe["trainer"]["devices"], recipe["trainer"]["num_nodes"]) == (devices, nodes)
    assert recipe["trainer"]["val_every_tokens"] == recipe["checkpoint"]["every_tokens"] == run.steps(0.1)
    assert recipe["optimizer"]["distributed"] is True
    assert recipe["curriculum"]["stages"] == [{"until": 1.0, "seq_length": 32_768, "micro_batch_size": 2}]
    assert {"override /trainer": "gpu"} in recipe["defaults"]
    assert f"# The planner's fastest layout on {gpus} x h100: 42 GiB a GPU." in text
    assert "The paper's 4 Mi tokens a step" in text
    last = next_commands(run, "r.yaml", inputs=None)[-1]
    assert f"--nproc-per-node {devices} " in last
    assert (f"--nnodes {nodes} " in last) == (f"on each of the {nodes} nodes" in last) == (nodes > 1)


def test_commands_are_those_that_are_still_to_do():
    run = planned()
    imported = "nemo-longctx import model checkpoints/model"
    prepared = "nemo-longctx prepare texts --output books --tokenizer model --holdout 0.05"
    assert next_commands(run, "r.yaml", inputs="texts") == [imported, prepared, "nemo-longctx train recipe=r.yaml"]
    assert next_commands(run, "r.yaml", inputs=None) == [imported, "nemo-longctx train recipe=r.yaml"]
    nemo = dataclasses.replace(run, source=source(path="ckpt", hugging_face=False))
    assert nemo.source.nemo_path == Path("ckpt")
    wanted = [prepared.replace(" model ", " TOKENIZER "), "nemo-longctx train recipe=r.yaml"]
    assert next_commands(nemo, "r.yaml", inputs="texts") == wanted
