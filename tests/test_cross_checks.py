from types import SimpleNamespace

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.cross_checks import (
    check_base_is_another,
    check_head,
    check_pipeline,
    check_stage_begun,
    check_validation,
    check_windowed,
    uneven_stages,
)
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.data.evaluation import EvaluationConfig
from nemo_longctx.recipe import TrainerConfig, load_instruct_recipe, load_recipe

TP, PP, CP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "x"))
CP = "context_parallel_size"
VP = "virtual_pipeline_model_parallel_size"


def refusal(see, *given, **more):
    try:
        see(*given, **more)
    except ConfigError as error:
        return str(error)
    return None


def curriculum(batch=8, *, seq_length=64, **sizes):
    stage = StageConfig(until=1.0, seq_length=seq_length, **sizes)
    return Curriculum(stages=(stage,), tokens_per_step=batch * seq_length, total_tokens=4 * batch * seq_length)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"kv_channels": 31}, "model.kv_channels=31: 31 dimensions of a head's 31 would be rotated, and RoPE turns pairs"),
        ({"kv_channels": 64, "rotary_percent": 0.01}, "model.rotary_percent=0.01: 0 dimensions of a head's 64"),
        ({"kv_channels": 6, "rotary_percent": 0.5}, "model.rotary_percent=0.5: 3 dimensions of a head's 6"),
        ({"num_attention_heads": 4, "hidden_size": 12}, "model.num_attention_heads=4: 3 dimensions of a head's 3"),
        ({"config": "Llama2Config7B", "rotary_percent": 0.99}, None),  # 126 of 128
        ({"config": "Llama2Config7B", "rotary_percent": 0.995}, "model.rotary_percent=0.995: 127 dimensions of a head's 128"),
        ({"config": "Llama2Config7B"}, None),
        ({"kv_channels": 2}, None),
        ({"kv_channels": 4, "rotary_percent": 0.5}, None),
        ({"config": "NewConfig", "rotary_percent": 0.01}, None),  # its sizes are its own
    ],
)
def test_what_is_rotated_of_a_head_is_whole_pairs(model, said):
    found = refusal(check_head, model)
    assert (found or "").startswith(said or "")
    assert (found is None) == (said is None)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"config": "LlamaConfig", "window_attn_skip_freq": 2}, "no layer has a window"),
        ({"config": "Llama2Config7B", "window_attn_skip_freq": [1] * 32}, "no layer has a window"),
        ({"config": "GemmaConfig", "window_size": None, "window_attn_skip_freq": 2}, "no layer has a window"),
        ({"config": "LlamaConfig", "window_size": [9, 0], "num_layers": 3, "window_attn_skip_freq": 4}, "none would see all"),
        ({"config": "LlamaConfig", "window_size": [9, 0], "num_layers": 3, "window_attn_skip_freq": 3}, None),
        ({"config": "GemmaConfig", "window_attn_skip_freq": 2}, None),  # may have a window of its own
        ({"config": "LlamaConfig", "window_attn_skip_freq": None}, None),
    ],
)
def test_a_choice_of_layers_with_a_window_needs_one(model, said):
    found = refusal(check_windowed, model)
    assert (found is None) if said is None else ("model.window_attn_skip_freq=" in found and said in found)


def test_an_interleaved_pipeline_evaluates_nothing_and_takes_whole_rounds_of_micro_batches():
    trainer = TrainerConfig(devices=4, **{PP: 4, VP: 2})
    model = {"num_layers": 8}
    check_pipeline(model, trainer, curriculum(8), evaluates=False)
    assert f"trainer.{VP}=2: evaluation inside a run reads whole stages" in refusal(
        check_pipeline, model, trainer, curriculum(8), evaluates=True
    )
    said = refusal(check_pipeline, model, trainer, curriculum(6), evaluates=False)
    assert said.startswith(f"trainer.{VP}=2: interleaves micro batches by 4 pipeline stages, and stage 0 has 6 of them a step")
    near = int(said.rpartition(" ")[2])
    check_pipeline(model, trainer, curriculum(near // 64), evaluates=False)
    check_pipeline(model, TrainerConfig(devices=4, **{PP: 4}), curriculum(6), evaluates=True)  # in one piece
    check_pipeline(model, trainer, curriculum(6, **{PP: 2}), evaluates=False)  # a start of its own


def test_uneven_stages_need_a_pipeline_and_are_handed_to_the_host():
    model = {"num_layers": 8, "num_layers_in_first_pipeline_stage": 2, "account_for_loss_in_pipeline_split": False}
    assert uneven_stages(model) == {"num_layers_in_first_pipeline_stage": 2}
    said = "model.num_layers_in_first_pipeline_stage=2: has no effect without a pipeline"
    assert said in refusal(check_pipeline, model, TrainerConfig(), curriculum(), evaluates=False)
    for trainer, sizes in ((TrainerConfig(devices=2, **{PP: 2}), {}), (TrainerConfig(), {PP: 2})):
        check_pipeline(model, trainer, curriculum(**sizes), evaluates=False)


@pytest.mark.parametrize(
    ("sizes", "sequence", "own", "parts"),
    [
        ({}, False, {}, 1),
        ({CP: 2}, False, {}, 4),
        ({TP: 2}, False, {}, 1),
        ({TP: 2}, True, {}, 2),
        ({TP: 2, CP: 4}, True, {}, 16),
        ({CP: 1}, False, {CP: 2}, 4),
        ({CP: 2}, False, {CP: 1}, 1),
    ],
)
def test_each_rank_has_its_part_of_a_window_of_validation(sizes, sequence, own, parts):
    trainer = TrainerConfig(devices=8, sequence_parallel=sequence, **sizes)
    for length in range(1, 40):
        sets = [EvaluationConfig(name=name, path="p", seq_length=n) for name, n in (("a", 4 * parts), ("b", length))]
        found = refusal(check_validation, sets, trainer, curriculum(**own))
        assert (found is None) == (length % parts == 0)
        if found:
            assert found.startswith(f"data.validation[1].seq_length={length}: must be a multiple of {parts}, ")
            near = int(found.rpartition(" ")[2])
            assert near % parts == 0
            assert abs(near - length) <= max(parts / 2, parts - length)


@pytest.mark.parametrize(
    ("base", "same"),
    [("runs/a", True), ("runs/a/", True), ("runs/./a", True), ("runs/a/checkpoints/x", True), ("runs/ab", False), ("a", False)],
)
def test_a_run_is_not_written_over_what_it_begins_with(base, same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(check_base_is_another, base, tmp_path / "runs" / "a", "a")
    assert (said is not None) == same
    assert not same or said.startswith(f"name='a': the run would be written to {tmp_path}/runs/a, where restore_from lies")
    check_base_is_another(None, tmp_path, "a")


def test_a_start_in_a_stage_of_another_layout_is_told_before_the_host_is_imported():
    stages = tuple(StageConfig(until=until, seq_length=64, **{CP: size}) for until, size in ((0.5, 1), (1.0, 2)))
    recipe = SimpleNamespace(
        curriculum=Curriculum(stages=stages, tokens_per_step=64, total_tokens=256), trainer=TrainerConfig(devices=2)
    )
    longer = SimpleNamespace(curriculum=recipe.curriculum, trainer=TrainerConfig(devices=2, **{CP: 2}))
    for step, number in ((None, 0), (-1, 0), (0, 0), (1, 0), (2, 1), (3, 1)):
        newest = None if step is None else SimpleNamespace(step=step)
        right, wrong = (recipe, longer) if number == 0 else (longer, recipe)
        check_stage_begun(right, newest)
        said = refusal(check_stage_begun, wrong, newest)
        assert said.startswith(
            f"curriculum.stages[{number}]={{'{CP}': {number + 1}}}: the run begins or goes on in stage {number}"
        )
        assert said.endswith(f"trainer.{CP}={number + 1}")
    for each in (recipe, longer):
        check_stage_begun(each, SimpleNamespace(step=4))  # all steps are made


def recipe(**parts):
    values = {
        "name": "a",
        "model": {"config": "LlamaConfig", "num_layers": 4},
        "data": {"mix": {"sources": [{"path": "p"}]}},
        "curriculum": {"stages": [{"until": 1.0, "seq_length": 8}], "tokens_per_step": 16, "total_tokens": 32},
    }
    return load_recipe({**values, **parts})


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": {"config": "LlamaConfig", "kv_channels": 31}}, "model.kv_channels=31"),
        ({"model": {"config": "LlamaConfig", "window_attn_skip_freq": 2}}, "model.window_attn_skip_freq=2"),
        ({"model": {}, "restore_from": "runs/a"}, "name='a': the run would be written to"),
        ({"rope": {"variant": "abf", "local_base": 1e16}}, "rope.local_base=1e+16: must be at most 1e+15"),
        ({"trainer": {"devices": 2, PP: 2, VP: 2}, "eval": {"tasks": [{"kind": "position", "corpus": "p", "seq_length": 8}]}},
         f"trainer.{VP}=2: evaluation"),
        ({"trainer": {"devices": 2, CP: 2}, "data": {"mix": {"sources": [{"path": "p"}]},
                                                     "validation": [{"name": "v", "path": "p", "seq_length": 6}]}},
         "data.validation[0].seq_length=6"),
        ({"eval": {"guard": {"loss": -1.0}}}, "eval.guard.loss=-1.0: give a change"),
        ({"eval": {"tasks": [{"kind": "probes", "text": "t", "probes": {"lengths": []}}]}}, "eval.tasks[0].probes.lengths=()"),
        ({"eval": {"tasks": [{"kind": "position", "corpus": "p", "seq_length": 0}]}}, "eval.seq_length=0"),
        ({"eval": {"tokenizer": " "}}, "eval.tokenizer=' ': names nothing"),
        ({"data": {"mix": {"sources": [{"path": "p"}]}, "test": [{"name": "t", "path": "p", "seq_length": 8, "samples": 0}]}},
         "data.test[0].samples=0"),
        ({"data": {"mix": {"sources": []}}}, "data.mix.sources=[]"),
        ({"data": {"mix": {"sources": [{"path": "p", "weight": -1.0}]}}}, "data.mix.sources.weight=-1.0"),
        ({"curriculum": {"stages": [{"until": 2.0, "seq_length": 8}], "tokens_per_step": 16, "total_tokens": 32}},
         "curriculum.stages.until=2.0"),
        ({"seed": 1e30}, "seed=1e+30: must be a whole number of 64 bits"),
        *(({"name": name}, f"name={name!r}: is a folder's name") for name in ("  ", " a", "a ", "a\nb", "\t")),
        *(({key: path, **more}, f"{key}={path!r}: {why}")
          for key, more in (("output_dir", {}), ("restore_from", {"model": {}}))
          for path, why in (("s3://a/b", "is an address"), ("~joe/a", "only ~/ at the front"), ("~", "only ~/ at the front"),
                            ("a/$HOME", "an environment variable is written ${oc.env:HOME}"), ("a\nb", "names no place"),
                            ("${HOME}/b", "an environment variable is written ${oc.env:HOME}"))),
    ],
)  # fmt: skip
def test_a_recipe_is_asked_all_of_these(parts, said):
    assert (refusal(recipe, **parts) or "taken").startswith(said)


@pytest.mark.parametrize(
    ("pretraining", "said"),
    [
        ({"sources": []}, "data.pretraining.sources=[]: name at least one source"),
        ({"sources": [{"path": "p", "weight": 0.0}]}, "data.pretraining.sources[0].weight=0.0: a share above 0"),
        ({"sources": [{"path": "p"}], "long_share": 0.5}, "data.pretraining.long_share=0.5: long_length and long_share"),
    ],
)
def test_a_mix_of_tuning_is_told_by_its_own_place(pretraining, said):
    data = {"tokenizer": "t", "blend": {"pretraining": 1.0}, "pretraining": pretraining}
    assert refusal(load_instruct_recipe, tuning(data=data)).startswith(said)


def tuning(**parts):
    curriculum = {"stages": [{"until": 1.0, "seq_length": 8}], "tokens_per_step": 8, "total_tokens": 8}
    data = {"tokenizer": "t", "short": ["a"], "blend": {"short": 1.0}}
    return {"name": "a", "restore_from": "base", "data": data, "curriculum": curriculum, **parts}


def test_tuning_without_a_checkpoint_asks_for_that_alone():
    assert refusal(load_instruct_recipe, tuning(restore_from=None)).startswith(
        "restore_from=None: name the extended checkpoint"
    )


def test_names_and_places_in_any_language_are_taken():
    for name in ("日本", "über", "a b", "a.b-c_d"):
        assert recipe(name=name, output_dir=f"ü/{name}/a$b/$").directory.name == name
    recipe(restore_from="base", model={"kv_channels": 31, "window_attn_skip_freq": 2})  # a checkpoint's shape is its own
