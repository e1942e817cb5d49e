"""A model on its way into a run: precision, weights of another machine, what the host would replace and what it would lose."""

import json
from types import SimpleNamespace

import nemo.lightning as nl
import pytest
import torch
from nemo.collections import llm  # noqa: F401  before the rest: the host's imports have a circle
from nemo.collections.llm.recipes.precision import mixed_precision

from nemo_longctx.adapters.nemo.checkpoint import load
from nemo_longctx.adapters.nemo.launch import checkpointing, parts
from nemo_longctx.adapters.nemo.launch.callbacks import _plain
from nemo_longctx.adapters.nemo.launch.checkpointing import LongContextResume
from nemo_longctx.adapters.nemo.model import config as model_config
from nemo_longctx.adapters.nemo.model.config import fields_of, fresh_model, live_of, prepare_model, shape_of
from nemo_longctx.config import ConfigError
from nemo_longctx.precision import PRECISIONS
from nemo_longctx.resume import check_live, live_settings


@pytest.mark.parametrize("name", PRECISIONS)
def test_weights_and_stages_are_of_the_precision_s_type(name):
    """As in NeMo's own recipes: the plugin's own default is float32, in float16 also between the stages of a pipeline."""
    precision = PRECISIONS[name]
    built = parts.made(parts.precision_plugin(precision)).dtype_config
    assert built.params_dtype == built.pipeline_dtype == getattr(torch, precision.dtype)
    theirs = {"bf16-mixed": mixed_precision.bf16_mixed, "16-mixed": mixed_precision.fp16_mixed}
    if name in theirs:
        stock = parts.made(theirs[name]()).dtype_config
        kinds = ("fp16", "bf16", "params_dtype", "pipeline_dtype")
        assert {kind: getattr(built, kind) for kind in kinds} == {kind: getattr(stock, kind) for kind in kinds}


TINY = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 32, "vocab_size": 64}


@pytest.mark.parametrize(
    ("engine", "other_norms", "experts", "lenient"),
    [(True, True, None, True), (False, True, None, False), (True, False, None, False), (True, True, 4, False)],
)
def test_a_run_begins_from_weights_that_lack_transformer_engine_s_state(
    monkeypatch, tmp_path, engine, other_norms, experts, lenient
):
    """Its norms want one, and the host ends with "Missing key in checkpoint state_dict"; of experts the names differ too."""
    monkeypatch.setattr(checkpointing, "transformer_engine_installed", lambda: engine)
    monkeypatch.setattr(checkpointing, "knows_no_engine_norms", lambda path: path == tmp_path and other_norms)
    monkeypatch.setattr(nl.AutoResume, "setup", lambda self, trainer, model=None: None)
    resume = LongContextResume(restore_config=nl.RestoreConfig(path=str(tmp_path)))
    model = SimpleNamespace(config=SimpleNamespace(num_moe_experts=experts))
    for started, expected in ((None, False if lenient else None), ("step=3-last", None)):  # its own checkpoints have all of it
        trainer = SimpleNamespace(ckpt_path=started, strategy=SimpleNamespace(ckpt_load_strictness=None))
        resume.setup(trainer, model)
        assert trainer.strategy.ckpt_load_strictness is expected


@pytest.mark.parametrize("known", [{}, {"module.a": 1}, {"module.a": 1, "module.norm._extra_state/shard_0_1": 1}])
def test_a_model_is_loaded_without_the_state_of_layers_that_its_checkpoint_lacks(monkeypatch, tmp_path, known):
    asked, given = [], []
    module = SimpleNamespace(
        sharded_state_dict=lambda prefix: {
            f"{prefix}a": SimpleNamespace(),
            f"{prefix}norm._extra_state": SimpleNamespace(unique_key=f"{prefix}norm._extra_state/shard_0_1"),
        },
        state_dict=lambda: {"a": "its own", "norm._extra_state": "its own"},
        load_state_dict=lambda state, strict: given.append((state, strict)),
    )

    def read(sharded, folder):
        asked.extend(sharded["state_dict"])
        return {"state_dict": dict.fromkeys(sharded["state_dict"], "read")}

    monkeypatch.setattr("megatron.core.dist_checkpointing.load", read)
    monkeypatch.setattr(load, "saved_in", lambda folder: known)
    load._load_weights(module, tmp_path)
    lacks = len(known) == 1
    assert asked == ["module.a"] + ([] if lacks else ["module.norm._extra_state"])
    assert given == [({"a": "read", "norm._extra_state": "its own" if lacks else "read"}, True)]


def test_the_doctor_s_model_asks_for_no_buffers_of_data_parallelism(monkeypatch):
    """Fused gradient accumulation adds to `main_grad`, which only the wrapper of a training run makes."""
    built, model = [], fresh_model({"config": "LlamaConfig", **TINY})
    model.config.gradient_accumulation_fusion = True
    monkeypatch.setattr(load, "initialize_distributed", lambda: None)
    monkeypatch.setattr(load, "_model_for_test", lambda recipe, load_weights: model)
    monkeypatch.setattr(load, "_take_parallel_sizes", lambda config: None)
    monkeypatch.setattr(load.cpu, "machine_fields", lambda config: {})
    monkeypatch.setattr(load, "within_memory", lambda make: built.append(model.config.gradient_accumulation_fusion))
    recipe = SimpleNamespace(rope=None, seq_length=64, name="x")
    with pytest.raises(ConfigError, match="do not fit"):
        load.build_for_test(recipe, load_weights=False)
    assert built == [False]


def test_a_checkpoint_of_an_fp8_run_is_read_on_any_gpu_and_at_any_length(monkeypatch):
    sizes = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    for number, name in enumerate(sizes):
        monkeypatch.setattr(f"megatron.core.parallel_state.get_{name}_world_size", lambda number=number: number + 1)
    config = SimpleNamespace(fp8="hybrid", sequence_parallel=True, params_dtype=torch.bfloat16)
    load._take_parallel_sizes(config)
    assert vars(config) == {
        **{f"{name}_size": number + 1 for number, name in enumerate(sizes)},
        "fp8": None, "sequence_parallel": False, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16,
    }  # fmt: skip


def test_a_checkpoint_s_layers_lie_on_the_stages_of_who_reads_it():
    """Trained with one layer on the first stage and two on the second: export ended in "Invalid access pattern"."""
    plain, uneven = ({"config": "LlamaConfig", **TINY, **more} for more in ({}, {"num_layers_in_first_pipeline_stage": 1}))
    model = fresh_model(uneven)
    model_config._forget_stages(model)
    assert fields_of(model.config) == fields_of(fresh_model(plain).config)


@pytest.mark.parametrize(
    ("says", "stored", "becomes"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_weights_of_half_precision_are_read_in_it_whatever_their_config_says(monkeypatch, tmp_path, says, stored, becomes):
    """A run in bf16-mixed of before, or by NeMo's plugin as it is: exported and measured in float32, in twice the memory."""
    monkeypatch.setattr(load, "stored_dtype", lambda folder: stored)
    config = SimpleNamespace(params_dtype=says, bf16="?", fp16="?")
    load._take_stored_precision(config, tmp_path)
    changed = says != becomes
    flags = (becomes == torch.bfloat16, becomes == torch.float16) if changed else ("?", "?")
    assert (config.params_dtype, config.bf16, config.fp16) == (becomes, *flags)


def test_a_checkpoint_is_built_in_the_precision_of_its_weights_or_of_its_adapters_base(monkeypatch, tmp_path):
    """Before sizes are taken, which set the type between stages by it, and before layers are made."""
    did = []
    model = SimpleNamespace(config=SimpleNamespace(seq_length=8), tokenizer=None, model_transform=None)
    module = SimpleNamespace(eval=lambda: None)
    for name, result in {"initialize_distributed": None, "checkpoint_directory": tmp_path, "checkpoint_model": model,
                         "prepare_model": None, "load_adapters": None, "as_long_context": None}.items():  # fmt: skip
        monkeypatch.setattr(load, name, lambda *args, result=result, **more: result)
    monkeypatch.setattr(load, "_take_stored_precision", lambda config, weights: did.append(weights))
    monkeypatch.setattr(load, "_take_parallel_sizes", lambda config: did.append("sizes"))
    monkeypatch.setattr(load, "_build", lambda made: did.append("build") or module)
    monkeypatch.setattr(load, "_load_weights", lambda made, weights: did.append(weights))
    for base, weights in ((None, tmp_path / "weights"), (tmp_path / "base", tmp_path / "base")):
        monkeypatch.setattr(load, "adapter_base", lambda directory, base=base: base)
        load.load_model(tmp_path)
        assert did == [weights, "sizes", "build", weights]
        did.clear()


@pytest.mark.parametrize("window", [None, [31, 0]], ids=str)
def test_a_live_model_is_the_one_of_its_own_record(window):
    model = fresh_model({"config": "LlamaConfig", **TINY, "window_size": window})
    changes = prepare_model(model, seq_length=64)
    settings = {each.setting: {"before": _plain(each.before), "run": _plain(each.run)} for each in changes}
    record = {"settings": settings, "model": shape_of(model.config), "config": fields_of(model.config)}
    record = json.loads(json.dumps(record))
    asked = dict.fromkeys(record["config"], 1)  # as if each field were named now for the first time
    check_live(live_settings(record, asked), live_of(model.config, changes), where="the run")
    assert {"layernorm_epsilon", "num_layers", "moe_router_topk"} <= set(live_settings(record, asked))
    model.config.layernorm_epsilon = 0.5
    with pytest.raises(ConfigError, match=r"^layernorm_epsilon=0\.5"):
        check_live(live_settings(record, asked), live_of(model.config, changes), where="the run")


def test_adapters_of_a_resumed_run_find_their_base_where_it_was_moved(tmp_path, capsys, monkeypatch):
    """The docs said that it may be named where it is now, and NeMo looked where it had been."""
    base, run = tmp_path / "there" / "base", tmp_path / "run"
    for each in (base, run):
        (each / "weights").mkdir(parents=True)
    note = run / "weights" / "adapter_metadata.json"
    resume = LongContextResume(restore_config=nl.RestoreConfig(path=str(base)))
    for rank in ("1", "0", "0"):
        if rank == "1":
            note.write_text(json.dumps({"model_ckpt_path": f"{tmp_path}/gone/base"}))
        monkeypatch.setenv("RANK", rank)
        assert resume._get_base_model_path_for_adapter(note, None) == base
        assert json.loads(note.read_text())["model_ckpt_path"] == (f"{tmp_path}/gone/base" if rank == "1" else str(base))
    assert capsys.readouterr().out.count(f"the adapters' base was {tmp_path}/gone/base; it is {base} now") == 1
    assert LongContextResume()._get_base_model_path_for_adapter(note, None) == base


def test_layers_of_a_model_s_own_are_not_replaced_in_silence(monkeypatch):
    model = fresh_model({"config": "LlamaConfig", **TINY})

    def their_layers(config):
        raise AssertionError

    model.config.transformer_layer_spec = their_layers
    prepare_model(model, seq_length=64)  # a user's own, which is theirs to leave
    their_layers.__module__ = "nemo.collections.llm.gpt.model.llama_nemotron"
    model.config.transformer_layer_spec = their_layers
    with pytest.raises(ConfigError, match=r"model\.config='LlamaConfig': has layers of its own \(their_layers\)"):
        prepare_model(model, seq_length=64)
    model.config.attn_logit_softcapping = 50.0  # refused by its own name where layers are built
    prepare_model(model, seq_length=64)


@pytest.mark.parametrize("name", ["flash", "auto", "local", "flsh"])
def test_the_attention_backend_is_one_that_the_host_knows_and_leaves_ours(name):
    """The host compares with names of its own: a text had no effect, and with `local` its own attention took our place."""
    named = {"config": "LlamaConfig", **TINY, "attention_backend": name}
    if name == "flsh":
        with pytest.raises(ConfigError, match=r"model\.attention_backend='flsh': did you mean 'flash'"):
            fresh_model(named)
        return
    model = fresh_model(named)
    assert model.config.attention_backend is model_config.AttnBackend[name]
    if name == "local":
        with pytest.raises(ConfigError, match=r"model\.attention_backend='local': puts the host's attention"):
            prepare_model(model, seq_length=64)
    else:
        prepare_model(model, seq_length=64)
