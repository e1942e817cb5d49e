"""Every large recipe composes, fits the machine it names, builds in the host, and is what the paper says."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from nemo_longctx.compose import CONF_DIR, compose
from nemo_longctx.config import ConfigError
from nemo_longctx.model_fields import host_fields
from nemo_longctx.planning.layout import layout_faults
from nemo_longctx.planning.planner import FILL
from nemo_longctx.planning.recipe import CPU, machine_of, recipe_plan
from nemo_longctx.planning.report import PlanSettings, make_plan
from nemo_longctx.recipe import load_recipe

EVERY = sorted(path.stem for path in (CONF_DIR / "recipe").glob("*.yaml"))
NAMES = [name for name in EVERY if machine_of(name) != CPU]  # those of a cluster, which are nemo_run factories too
# Those that go on from a checkpoint which is made first.
SHAPE = {"tiny_cpu_long": ["model=tiny_llama"]} | {name: ["model=tiny_induction"] for name in ("demo_base", "demo_long")}
LAYERS = 2


def test_there_is_a_recipe_for_each_model_of_the_paper_and_of_today():
    wanted = {"llama2_7b", "llama2_13b", "codellama_34b", "llama2_70b", "llama3_8b", "qwen25_7b", "mistral_7b"}
    assert wanted | {"llama2_7b_ablation", "llama2_7b_curriculum"} <= set(NAMES)


@pytest.mark.parametrize("name", EVERY)
def test_recipe_composes_and_its_plan_fits_the_machine_it_names(name):
    recipe = load_recipe(compose([f"recipe={name}"]))
    assert recipe.name == name
    planned = recipe_plan(name, SHAPE.get(name, ()))
    assert planned.gpu is not None
    for stage in planned.curriculum.plan:
        layout = replace(planned.layout, micro_batch_size=stage.micro_batch_size)
        assert not layout_faults(planned.model, layout, stage.seq_length, stage.global_batch_size)
    plan = make_plan(
        PlanSettings(
            model_name=planned.model_name,
            model=planned.model,
            curriculum=planned.curriculum,
            gpu=planned.gpu,
            layout=planned.layout,
            eval_length=planned.eval_length,
        )
    )
    assert len(plan["layout"]["stages"]) == len(planned.curriculum.plan)
    for stage in plan["layout"]["stages"]:
        assert stage["fits"], stage["reason"]
        assert stage["memory_gib"]["total"] <= plan["machine"]["memory_gib"] * FILL


@pytest.mark.parametrize(
    ("name", "length", "lr"),
    [("llama2_7b", 32_768, 2e-5), ("llama2_13b", 32_768, 2e-5), ("codellama_34b", 16_384, 1e-5), ("llama2_70b", 16_384, 1e-5)],
)
def test_paper_recipes_are_the_papers(name, length, lr):
    """Xiong et al. 2023, section 2.1."""
    recipe = load_recipe(compose([f"recipe={name}"]))
    assert recipe.curriculum.total_steps == 100_000
    assert recipe.curriculum.tokens_per_step == 4 * 2**20
    assert recipe.seq_length == length
    assert recipe.optimizer.lr == lr
    assert recipe.optimizer.schedule == "cosine"
    assert recipe.steps("optimizer.warmup_tokens", recipe.optimizer.warmup_tokens) == 2_000
    assert recipe.rope_variant.base == 500_000
    assert recipe.restore_from


@pytest.mark.parametrize("variant", ["rope", "pi", "abf", "xpos_abf"])
def test_ablation_runs_take_80_billion_tokens_with_any_position_encoding(variant):
    recipe = load_recipe(compose(["recipe=llama2_7b_ablation", f"rope={variant}"]))
    assert recipe.curriculum.total_tokens == pytest.approx(80e9, rel=1e-4)
    assert recipe.rope["variant"] == variant.removesuffix("_abf")


def test_curriculum_recipe_is_table_10():
    planned = recipe_plan("llama2_7b_curriculum")
    plan = make_plan(
        PlanSettings(model_name=planned.model_name, model=planned.model, curriculum=planned.curriculum, flops="full")
    )
    assert f"{plan['total_flops']:.3e}" == "3.405e+22"
    assert load_recipe(compose(["recipe=llama2_7b_curriculum"])).restore_from is None


@pytest.fixture(scope="module")
def built():
    """All recipes in the host, in one process."""
    worker = Path(__file__).with_name("recipes_worker.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(worker), *NAMES], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("RECORD ") for line in done.stdout.splitlines() if line.startswith("RECORD ")]
    return {record["name"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds_in_the_host_on_the_meta_device(built, name):
    record, planned = built[name], recipe_plan(name)
    recipe = load_recipe(compose([f"recipe={name}"]))
    assert record["devices"] == ["meta"]
    # The planner's count of parameters is Megatron-Core's.
    assert record["parameters"] == replace(planned.model, num_layers=LAYERS).parameters
    assert f"({LAYERS} layers)" in record["attention"]
    assert record["seq_length"] == recipe.seq_length
    assert record["max_steps"] == recipe.curriculum.total_steps
    assert record["tokens_per_step"] == recipe.curriculum.tokens_per_step
    assert record["lr"] == recipe.optimizer.lr
    assert record["min_lr"] == recipe.optimizer.min_lr
    assert record["restore_from"] == recipe.restore_from
    assert record["one_restore"]  # model and resume look at the same checkpoint, whatever the command line says
    # The guard of RoPE and settings is in the factory's run too, and looks for the recipe's variant.
    assert "LongContextSettingsCallback" in record["callbacks"]
    assert record["verifies"] == recipe.rope["variant"]


@pytest.mark.parametrize("name", NAMES)
def test_nemo_run_config_survives_the_way_to_another_machine(built, name):
    assert built[name]["serialises"]


def test_entry_point_is_declared_and_loads():
    """nemo_run only prints that an entry point is broken, so that this test has to fail."""
    points = {point.name: point for point in metadata.entry_points(group="nemo_run.cli")}
    assert points["longctx"].value == "nemo_longctx.adapters.nemo.recipes"
    module = points["longctx"].load()
    assert callable(module.train)


def test_nemos_own_recipe_is_extended_and_left_as_it_was():
    from nemo.collections import llm

    from nemo_longctx.adapters.nemo.recipes import extend_recipe

    stock = llm.llama2_7b.pretrain_recipe(dir="runs", name="long", num_nodes=4)
    stock.optim.lr_scheduler.warmup_steps = 200
    before = str(stock)
    mix = {"mix": {"sources": [{"path": "data/long"}]}}
    stages = [{"until": 0.2, "seq_length": 4096}, {"until": 1.0, "seq_length": 32768}]
    curriculum = {"stages": stages, "tokens_per_step": 2**22, "total_tokens": 1000 * 2**22}
    asked = {"data": mix, "curriculum": curriculum, "rope": {"variant": "abf", "base": 5e5}, "restore_from": "/ckpt/base"}
    recipe = extend_recipe(stock, **asked)
    assert str(stock) == before
    assert recipe.optim == stock.optim
    stock.optim.lr_scheduler.warmup_steps = 2000  # twice as long as the run: its rate would never be reached
    assert extend_recipe(stock, **asked).optim.lr_scheduler.warmup_steps == 100
    assert (recipe.trainer.max_steps, recipe.model.seq_length, recipe.trainer.num_nodes) == (1000, 32768, 4)
    assert recipe.model.restore is recipe.resume.restore_config  # one node: an override of its path reaches both
    assert recipe.resume.restore_config.path == "/ckpt/base"
    wrong = {
        "data.mixx": {"data": mix | {"mixx": 1}},
        "data.mix": {"data": {}},
        "curriculum.total_tokens": {"curriculum": curriculum | {"total_tokens": 5}},
        "rope.variant": {"rope": {"variant": "ybf"}},
        "eval.task": {"evaluation": {"tasks": [{"kind": "position"}], "task": 1}},
    }
    for key, change in wrong.items():
        with pytest.raises(ConfigError) as error:
            extend_recipe(stock, **asked | change)
        assert error.value.key == key


def test_speed_settings_of_nemos_recipes_are_adapted_or_refused():
    import nemo_run as run
    from nemo.collections import llm
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

    from nemo_longctx.adapters.nemo.recipes import extend_recipe

    stages = [{"until": 0.2, "seq_length": 4096}, {"until": 1.0, "seq_length": 32768}]
    asked = {
        "data": {"mix": {"sources": [{"path": "data/long"}]}},
        "curriculum": {"stages": stages, "tokens_per_step": 2**22, "total_tokens": 1000 * 2**22},
    }
    stock = llm.llama2_7b.pretrain_recipe(dir="runs", name="long")
    overlap = run.Config(MegatronCommOverlapCallback, tp_comm_overlap=True, defer_embedding_wgrad_compute=True)
    stock.trainer.callbacks = [overlap]
    ours = extend_recipe(stock, **asked).trainer.callbacks[0]
    assert (ours.tp_comm_overlap, ours.defer_embedding_wgrad_compute) == (False, False)
    assert overlap.tp_comm_overlap
    one = {"stages": stages[1:], "tokens_per_step": 2**22, "total_tokens": 1000 * 2**22}
    ours = extend_recipe(stock, **(asked | {"curriculum": one})).trainer.callbacks[0]
    assert (ours.tp_comm_overlap, ours.defer_embedding_wgrad_compute) == (True, False)
    for length, kept in ((32768, True), (4096, False)):  # a validation set goes through the same buffers
        data = asked["data"] | {"validation": [{"name": "a", "path": "data/a", "seq_length": length}]}
        assert extend_recipe(stock, data=data, curriculum=one).trainer.callbacks[0].tp_comm_overlap == kept
    stock.model.config.enable_cuda_graph = True
    with pytest.raises(ConfigError, match=r"model\.enable_cuda_graph=True"):
        extend_recipe(stock, **asked)
    extend_recipe(stock, **(asked | {"curriculum": one}))
    with pytest.raises(ConfigError, match=r"model\.enable_cuda_graph=True"):
        extend_recipe(stock, data=asked["data"] | {"document_masking": True}, curriculum=one)


def test_a_checkpoint_in_half_precision_takes_14_bytes_a_parameter():
    import torch

    from nemo_longctx.adapters.nemo.launch.callbacks import checkpoint_bytes

    assert [checkpoint_bytes(10, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [120, 140, 140]


def test_the_host_s_fields_are_those_that_a_recipe_can_name():
    """Made anew by docs/make_host_fields.py."""
    script = Path(__file__).parents[2] / "docs" / "make_host_fields.py"
    spec = importlib.util.spec_from_file_location("make_host_fields", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made, found = module.host_fields(), host_fields()
    assert found is None or {key: set(found[key]) for key in found} == {key: set(made[key]) for key in found}


@pytest.mark.slow
def test_a_broken_entry_point_is_only_printed_by_nemo_run_and_fails_our_check(tmp_path):
    """The check that `nemo` below makes is one that can fail."""
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[nemo_run.cli]\nlongctx_broken = nemo_longctx.adapters.nemo.gone\n")
    code = "from nemo_run.cli import api; api._load_entrypoints()"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.raises(AssertionError):
        check_loaded(done.stdout)


def check_loaded(printed):
    assert "Couldn't load entrypoint longctx" not in " ".join(printed.split())


def nemo(*args, cwd):
    """Run NeMo's own command line in a fresh process."""
    command = [str(Path(sys.executable).with_name("nemo")), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_loaded(done.stdout)
    return done.stdout


@pytest.mark.slow
def test_nemo_command_line_lists_our_factories(tmp_path):
    listed = nemo("llm", "pretrain", "--help", cwd=tmp_path)
    for family in ("llama2", "codellama", "llama3", "qwen25", "mistral"):
        assert f"longctx_{family}" in listed


@pytest.mark.slow
def test_nemo_command_line_dry_runs_a_factory_with_its_parameters(tmp_path):
    factory = "longctx_llama2(size='70b', overrides='rope=pi')"
    shown = nemo("llm", "pretrain", "--factory", factory, "--dryrun", "--yes", "trainer.num_nodes=3", cwd=tmp_path)
    assert "Llama2Config70B" in shown
    assert "'variant': 'pi'" in shown
    assert "num_nodes=3" in shown


@pytest.mark.slow
def test_nemo_longctx_train_dry_runs_on_an_executor(tmp_path):
    executor = ["run.executor=longctx_slurm", "run.executor.account=me", "run.executor.nodes=8"]
    shown = nemo("longctx", "train", "recipe=llama2_7b", *executor, "--dryrun", "--yes", cwd=tmp_path)
    assert "llama2_7b" in shown
