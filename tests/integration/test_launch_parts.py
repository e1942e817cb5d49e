"""Small parts of a launch by themselves: each rule on both sides of its bound, without a run."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import nemo.lightning as nl
import nemo_run as run
import numpy as np
import pytest
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint as lightning_checkpoint  # noqa: N813
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.collections import llm  # before the callback, which alone meets an import circle of the host
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
from nemo.utils import AppState
from saved_checkpoints import make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_longctx.adapters.nemo.checkpoint import convert, hf_verify
from nemo_longctx.adapters.nemo.evaluation.callback import LongContextEvalCallback
from nemo_longctx.adapters.nemo.launch import begin, executors, here, parts
from nemo_longctx.adapters.nemo.launch.checkpointing import LongContextCheckpoint, LongContextResume
from nemo_longctx.adapters.nemo.launch.lifecycle import LifecycleCallback, _MakesUp
from nemo_longctx.adapters.nemo.launch.performance import fit_performance_settings, fit_warmup
from nemo_longctx.adapters.nemo.model.config import load_tokenizer
from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.data.evaluation import EvaluationConfig
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.hf import directory


@pytest.mark.parametrize(("warmup", "becomes"), [(99, 99), (100, 10), (250, 10), (0, 0), (None, None), (2.5, 2.5)])
def test_a_warmup_as_long_as_the_run_becomes_a_tenth_of_it(warmup, becomes):
    schedule = SimpleNamespace(warmup_steps=warmup)
    fit_warmup(SimpleNamespace(optim=SimpleNamespace(lr_scheduler=schedule)), SimpleNamespace(total_steps=100))
    assert schedule.warmup_steps == becomes
    fit_warmup(SimpleNamespace(), SimpleNamespace(total_steps=100))  # a recipe without a schedule has none to shorten


@pytest.mark.parametrize("kept", ["use_custom_fsdp", "use_megatron_fsdp"])
@pytest.mark.parametrize(("takes", "field"), [(True, True), (True, False), (False, True), (False, False)])
def test_weights_are_sharded_where_both_hosts_can_and_a_run_can_go_on(monkeypatch, takes, field, kept):
    """Under the second name NeMo 2.7 writes them beside `context/`, in no `weights/`, and reads a base likewise."""

    class With:
        def __init__(self, fsdp=None, save_ckpt_format="torch_dist"):
            pass

    class Without:
        def __init__(self):
            pass

    name = "data_parallel_sharding_strategy" if field else "another"
    monkeypatch.setattr(parts.nl, "MegatronStrategy", With if takes else Without)
    fields = [name, kept]
    monkeypatch.setattr(parts, "DistributedDataParallelConfig", dataclasses.make_dataclass("Config", fields))
    strategy = SimpleNamespace(ddp=SimpleNamespace())
    if not (takes and field):
        with pytest.raises(ConfigError, match=r"trainer\.fsdp='megatron': this NeMo and Megatron-Core have none"):
            parts.shard_weights(strategy)
        return
    if kept == "use_megatron_fsdp":
        with pytest.raises(ConfigError, match=r"trainer\.fsdp='megatron': this NeMo keeps .*; set none, and optimizer"):
            parts.shard_weights(strategy)
        return
    parts.shard_weights(strategy)
    assert strategy.fsdp == "megatron"
    assert strategy.ddp.data_parallel_sharding_strategy == "optim_grads_params"


@pytest.mark.parametrize(("shapes", "kept"), [([(4, 2), (8, 1)], True), ([(2, 3), (1, 4)], False), ([(8, 1)], True)])
def test_overlapped_tensor_parallelism_stays_where_every_micro_batch_has_one_size(shapes, kept):
    overlap = run.Config(MegatronCommOverlapCallback, tp_comm_overlap=True, defer_embedding_wgrad_compute=True)
    recipe = SimpleNamespace(trainer=SimpleNamespace(callbacks=[overlap]))
    stages = [SimpleNamespace(seq_length=length, micro_batch_size=size) for length, size in shapes]
    fit_performance_settings(
        recipe, SimpleNamespace(), SimpleNamespace(stages=stages[:1]), document_masking=False, validation=stages[1:]
    )
    assert (overlap.tp_comm_overlap, overlap.defer_embedding_wgrad_compute) == (kept, False)


@pytest.mark.parametrize("account", [None, "me"])
def test_slurm_gets_whole_nodes_and_the_user_s_account(monkeypatch, account):
    monkeypatch.delenv("SLURM_ACCOUNT", raising=False)
    if account:
        monkeypatch.setenv("SLURM_ACCOUNT", account)
    made = executors.longctx_slurm()
    assert made.account == (account or "")
    assert (made.time, made.ntasks_per_node, made.gpus_per_node, made.exclusive, made.mem) == ("04:00:00", 8, 8, True, "0")
    assert made.tunnel.job_dir.endswith("runs/slurm")


@pytest.mark.parametrize(
    ("step", "every", "rows", "top", "owed"),
    [
        (0, 10, (), None, False),
        (10, 10, (), None, True),
        (10, 10, (10,), None, False),
        (10, 10, (5,), None, True),
        (10, 10, (10,), 0, False),
        (10, 10, (10,), 2, True),  # it may not have been compared
        (7, 10, (), 2, False),
        (7, float("inf"), (), 2, False),
        (40, float("inf"), (), None, True),  # the run's end
        (40, float("inf"), (40,), None, False),
    ],
)
def test_a_validation_is_owed_where_a_run_never_stopped_would_have_made_it(step, every, rows, top, owed):
    trainer = SimpleNamespace(
        val_check_batch=every, datamodule=SimpleNamespace(curriculum=SimpleNamespace(total_steps=40)),
        callbacks=[SimpleNamespace(), SimpleNamespace(validated=rows)], strategy=SimpleNamespace(broadcast=lambda value: value),
        checkpoint_callback=None if top is None else SimpleNamespace(save_top_k=top),
    )  # fmt: skip
    loop = SimpleNamespace(trainer=trainer, epoch_loop=SimpleNamespace(global_step=step))
    assert _MakesUp._validation_is_owed(loop) is owed


@pytest.mark.parametrize(
    ("step", "rows", "made"), [(40, {12}, 1), (40, {12, 40}, 0), (39, {12}, 0), (0, set(), 0), (40, None, 0)], ids=str
)
def test_the_last_step_is_validated_where_lightning_did_not(step, rows, made):
    """A finished run of 12 steps that was made longer ended at its 20th without: Lightning had counted eight batches."""
    ran = []
    callbacks = [SimpleNamespace(), *([] if rows is None else [SimpleNamespace(validated=rows)])]
    base = type("Base", (), {"on_run_end": lambda self: ran.append("end")})
    loop = type("Loop", (_MakesUp, base), {})()
    loop.trainer = SimpleNamespace(
        datamodule=SimpleNamespace(curriculum=SimpleNamespace(total_steps=40)), callbacks=callbacks, enable_validation=True,
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )  # fmt: skip
    loop.epoch_loop = SimpleNamespace(global_step=step, val_loop=SimpleNamespace(run=lambda: ran.append("validation")))
    loop.on_run_end()
    assert ran == ["validation"] * made + ["end"]


@pytest.mark.parametrize("owed", [True, False])
def test_loggers_put_a_validation_where_a_run_never_stopped_has_it(owed, monkeypatch):
    """Each restart moved those behind it one step back: what a checkpoint has lacks the step that it was saved in."""
    at = []
    epoch = SimpleNamespace(global_step=10, _batches_that_stepped=6)  # after three restarts
    epoch.val_loop = SimpleNamespace(run=lambda: at.append(epoch._batches_that_stepped))
    loop_class = type("Loop", (_MakesUp, type("Base", (), {"on_run_start": lambda self: None})), {})
    loop = loop_class()
    loop.restarting, loop.epoch_loop, loop.trainer = True, epoch, SimpleNamespace(enable_validation=True)
    monkeypatch.setattr(_MakesUp, "_validation_is_owed", lambda self: owed)
    loop.on_run_start()
    assert at == ([9] if owed else [])
    assert epoch._batches_that_stepped == 9
    LifecycleCallback.on_train_batch_start(None, SimpleNamespace(fit_loop=loop, global_step=10), None, None, 0)
    assert epoch._batches_that_stepped == 10
    loop.restarting, epoch._batches_that_stepped = False, 0  # a run that begins, maybe from another's weights
    loop.on_run_start()
    assert epoch._batches_that_stepped == 0


@pytest.mark.parametrize("asked", ["cpu", "gpu", None])
def test_a_machine_without_cuda_trains_on_the_cpu_without_what_needs_a_gpu(monkeypatch, asked):
    said, made = [], {}
    monkeypatch.setattr(here, "rank_zero_info", said.append)
    monkeypatch.setattr(here.cpu, "install", lambda: True)
    monkeypatch.setattr(here.nl, "Trainer", lambda **settings: made.update(settings))
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True)
    strategy = nl.MegatronStrategy(ckpt_async_save=True, ckpt_parallel_load=True, ddp=ddp)
    kept = object()
    overlap = object.__new__(MegatronCommOverlapCallback)
    given = {} if asked is None else {"accelerator": asked}
    here.trainer_here(strategy=strategy, callbacks=[overlap, kept], **given)
    assert made["accelerator"] == "cpu"
    assert made["callbacks"] == [kept]
    assert len(said) == (asked != "cpu")
    assert (strategy.async_save, strategy.parallel_load) == (False, False)
    assert (strategy.ddp_config.overlap_grad_reduce, strategy.ddp_config.overlap_param_gather) == (False, False)


def test_the_newest_save_is_not_removed_with_the_best(tmp_path):
    callback = object.__new__(LongContextCheckpoint)
    callback.dirpath = str(tmp_path)
    trainer = SimpleNamespace(ckpt_path=None)
    for place in ("", "/weights"):
        assert not callback._should_remove_checkpoint(trainer, f"{tmp_path}/step=5-last{place}", f"{tmp_path}/step=9")
    assert callback._should_remove_checkpoint(trainer, f"{tmp_path}/step=5", f"{tmp_path}/step=9")
    assert not callback._should_remove_checkpoint(trainer, f"{tmp_path}/step=5", f"{tmp_path}/step=5")


@pytest.mark.parametrize("by", ["resume", "checkpoint"])
def test_the_host_removes_no_checkpoint_that_is_whole(tmp_path, monkeypatch, by):
    whole, torn = make(tmp_path, 8), make(tmp_path, 16, manifest=False)
    for each in (whole, torn):
        (each.parent / f"{each.name}-unfinished").touch()
    if by == "resume":
        monkeypatch.setattr(AppState(), "log_dir", str(tmp_path))
        assert LongContextResume(resume_if_exists=True)._find_trainer_ckpt_path() == whole
    else:
        callback = LongContextCheckpoint(every=8, tokens_per_step=8)
        callback.dirpath = str(tmp_path / "checkpoints")
        monkeypatch.setattr(lightning_checkpoint, "setup", lambda *args, **kwargs: None)
        callback.setup(SimpleNamespace(strategy=SimpleNamespace()), None, "fit")
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("does", "put_off", "goes"),
    [("_save_checkpoint", {}, True), ("_remove_checkpoint", {}, True), ("_remove_checkpoint", {"async_save": True}, False),
     ("_remove_checkpoint", {"async_save": True, "override_async": True}, True)],
    ids=str,
)  # fmt: skip
def test_a_manifest_goes_before_anything_of_its_checkpoint(tmp_path, monkeypatch, does, put_off, goes, first):
    """Behind a marker it says that all is there: not where the files are written over, or half of them removed."""
    path, there = make(tmp_path, 8), []
    monkeypatch.setattr(nl.ModelCheckpoint, does, lambda *a, **more: there.append((path / "manifest.json").exists()))
    callback = LongContextCheckpoint(every=8, tokens_per_step=8)
    callback.async_save = put_off.get("async_save", False)
    more = {key: value for key, value in put_off.items() if key != "async_save"}
    getattr(callback, does)(SimpleNamespace(is_global_zero=first), f"{path}.ckpt", **more)
    assert there == [not (goes and first)]


def test_the_best_are_those_of_one_validation_whatever_their_losses(tmp_path, capsys):
    """A loss that was no number, or none to keep any more, ended the next start; other validation sets were compared."""
    tokens = np.arange(100, dtype=np.uint16)
    (tmp_path / "two").mkdir()
    for name in ("one", "two/a", "two/b"):  # the other one in shards
        with CorpusWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(tokens[:: 1 if name == "one" else -1])
    folder = tmp_path / "checkpoints"
    for name in ("step=3-val_loss=5.5000", "step=6-val_loss=nan", "step=9-val_loss=5.2500", "step=9-last", "my copy"):
        (folder / name).mkdir(parents=True)

    def start(keep, corpus, state=None, step=9):
        callback = LongContextCheckpoint(every=3, tokens_per_step=8, keep=keep)
        callback.dirpath = str(folder)
        if state is not None:
            callback.load_state_dict(state)
        sets = [EvaluationConfig(name="a", path=str(tmp_path / corpus), seq_length=8)]
        trainer = SimpleNamespace(
            datamodule=SimpleNamespace(evaluation={"validation": sets}),
            is_global_zero=True, global_step=step, strategy=SimpleNamespace(broadcast=lambda value: value),
        )  # fmt: skip
        callback._look(trainer)
        callback.nemo_topk_check_previous_run()
        return callback

    first = start(3, "one")
    assert [(Path(name).name, float(loss)) for name, loss in first.best_k_models.items()] == [
        ("step=9-val_loss=5.2500.ckpt", 5.25), ("step=3-val_loss=5.5000.ckpt", 5.5), ("step=6-val_loss=nan.ckpt", math.inf)
    ]  # fmt: skip
    assert first.best_model_path.endswith("step=9-val_loss=5.2500.ckpt")
    assert start(0, "one", first.state_dict()).best_k_models == {}
    assert len(list(folder.iterdir())) == 5
    assert list(start(2, "one", first.state_dict()).best_k_models) == list(first.best_k_models)[:2]
    assert not (folder / "step=6-val_loss=nan").exists()
    assert not capsys.readouterr().out
    other = start(2, "two", first.state_dict())
    assert other.best_k_models == {}
    said = capsys.readouterr().out
    assert "validation is another from step 9 on: kept, and not compared: step=9-val_loss=5.2500, step=3-val_loss" in said
    (folder / "step=12-val_loss=7.0000").mkdir()
    assert [Path(name).name for name in start(1, "two", other.state_dict(), 12).best_k_models] == [
        "step=12-val_loss=7.0000.ckpt"
    ]
    assert (folder / "step=3-val_loss=5.5000").exists()
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "compared"),
    [
        ({}, True),
        ({"limit": 3, "micro": 2}, True),  # six windows all the same
        ({"limit": 2}, False),
        ({"limit": None}, False),
        ({"limit": 99}, False),
        ({"micro": 2, "limit": 6}, False),
        ({"masked": True}, False),
        ({"of_before": True}, True),
    ],
    ids=str,
)
def test_a_validation_of_other_windows_is_another(tmp_path, capsys, changed, compared):
    """`trainer.limit_val_batches` at a restart: losses of one window were compared with those of six, and the best removed."""
    with CorpusWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document(np.arange(100, dtype=np.uint16))
    (tmp_path / "checkpoints" / "step=3-val_loss=5.5000").mkdir(parents=True)

    def start(state=None, *, limit=6, micro=1, masked=False, of_before=False):
        callback = LongContextCheckpoint(every=3, tokens_per_step=8, keep=1)
        callback.dirpath = str(tmp_path / "checkpoints")
        if state is not None:
            if of_before:
                judged = json.loads(state["judged"])
                state["judged"] = json.dumps({**judged, "by": [each[:4] for each in judged["by"]]})
            callback.load_state_dict(state)
        sets = [EvaluationConfig(name="a", path=str(tmp_path / "corpus"), seq_length=8, micro_batch_size=micro)]
        sampler = SimpleNamespace(evaluation_limits={"validation": limit})
        data = SimpleNamespace(evaluation={"validation": sets}, data_sampler=sampler, document_masking=masked)
        strategy = SimpleNamespace(broadcast=lambda value: value)
        callback._look(SimpleNamespace(datamodule=data, is_global_zero=True, global_step=9, strategy=strategy))
        return callback

    state = start().state_dict()
    assert json.loads(state["judged"])["by"][0][4:] == [6, False]
    again = start(state, **changed)
    assert bool(again._found) is compared
    assert ("validation is another from step 9 on" in capsys.readouterr().out) is not compared


@pytest.mark.parametrize(
    ("flags", "verify", "told"), [([], True, "verified by loading it again"), (["--no-verify"], False, "not verified")]
)
def test_export_and_import_hand_on_what_was_asked_and_tell_what_was_made(flags, verify, told, tmp_path, monkeypatch, capsys):
    given = []

    def export(source, target, **options):
        given.append((source, target, options))
        return SimpleNamespace(variant="abf(base=500000)", notes=("one note", "another"))

    def imported(source, target, **options):
        given.append((source, target, options))
        return "abf(base=500000)"

    monkeypatch.setattr(convert, "export_hf", export)
    monkeypatch.setattr(convert, "import_hf", imported)
    looked_at = []
    monkeypatch.setattr(directory, "check_directory", looked_at.append)  # tests/hf has its rules
    source, target = tmp_path / "source", tmp_path / "target"
    for part in ("weights", "context"):
        (source / part).mkdir(parents=True)
    more = ["--verify-tokens", "64", "--max-position-embeddings", "128", "--tokenizer", "tok"]
    assert main(["export", str(source), str(target), *flags, *more]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{target}: transformers model of {source}, RoPE abf(base=500000), {told}", "  one note", "  another"
    ]  # fmt: skip
    assert main(["import", str(source), str(target), *flags, "--verify-tokens", "64"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{target}: NeMo checkpoint of {source}, RoPE abf(base=500000), {told}"]
    assert given == [
        (source, target, {"verify": verify, "verify_tokens": 64, "max_position_embeddings": 128, "tokenizer": Path("tok")}),
        (source, target, {"verify": verify, "verify_tokens": 64}),
    ]
    assert looked_at == [source]


def test_an_evaluation_goes_by_its_step(tmp_path):
    class Recorded(LongContextEvalCallback):
        def _measure(self, trainer, pl_module, name):
            self.measured = name

    callback = Recorded(tasks=[{"kind": "position", "corpus": "unused", "seq_length": 64}], directory=str(tmp_path))
    callback.evaluate(SimpleNamespace(global_step=7), None)
    assert callback.measured == "step 7"


def test_a_tokenizer_beside_weights_brings_no_weights_into_checkpoints(tmp_path):
    """NeMo copies a tokenizer's whole directory into each checkpoint, and ends in an error where that holds a folder."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "llama"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(source)
    plain = load_tokenizer(str(source))
    (source / "model.safetensors").write_bytes(bytes(1000))
    (source / "original").mkdir()
    tokenizer = load_tokenizer(str(source))
    model = llm.GPTModel(llm.GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1, seq_length=8), tokenizer=tokenizer)
    model.io_dump(tmp_path / "context", yaml_attrs=[])  # as a checkpoint is saved
    kept = {path.name for path in (tmp_path / "context").rglob("*")}
    assert "tokenizer.json" in kept
    assert not kept & {"model.safetensors", "original"}
    assert tokenizer.text_to_ids("w3 w1 w9") == plain.text_to_ids("w3 w1 w9") == [3, 1, 9]
    assert tokenizer.eos == plain.eos == 1


@pytest.mark.parametrize(("source", "named"), [("checkpoint", "the checkpoint"), ("Llama3Config8B", "Llama3Config8B")])
def test_what_completes_a_rope_is_called_by_its_name(source, named):
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "rotary_base": 70_000, "seq_length": 2048}
    model = llm.GPTModel(llm.GPTConfig(position_embedding_type="rope", **sizes))
    made = begin.complete_rope(model, {"variant": "yarn"}, seq_length=8192, source=source)
    assert (made.variant.base, made.variant.factor, made.variant.original_max_position_embeddings) == (70_000, 4.0, 2048)
    assert made.notes == (
        f"rope.base=70000: that of {named}",
        "rope.factor=4: 8,192 / 2,048 trained tokens",
        f"rope.original_max_position_embeddings=2,048: the length that {named} was trained at",
    )
    assert begin.complete_rope(model, None, seq_length=8192, source=source) is None


@pytest.mark.parametrize(
    ("limit", "generates", "cuts", "becomes"),
    [(int(1e30), 20, None, int(1e30)), (4096, 4096, 4096, 256), (128, 4096, 128, 256), (None, 20, None, None)],
)
def test_generation_and_tokenizer_end_where_the_model_does(limit, generates, cuts, becomes):
    config = transformers.LlamaConfig(max_position_embeddings=256)
    exported = SimpleNamespace(generation_config=transformers.GenerationConfig(max_length=generates), config=config)
    tokenizer = None
    if limit is not None:
        words = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=limit)
        if cuts:
            tokenizer.backend_tokenizer.enable_truncation(max_length=cuts, stride=3)
    assert convert._lengths_together(exported, tokenizer, 256) == becomes
    assert exported.generation_config.max_length == (20 if generates == 20 else 256)
    if tokenizer is not None:
        assert tokenizer.model_max_length == becomes
        cut = tokenizer.backend_tokenizer.truncation
        assert (cut and (cut["max_length"], cut["stride"])) == ((256, 3) if cuts else None)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (OSError("\n first\nsecond"), r"transformers cannot load its weights \(first\); if they are damaged, copy or download"),
        (EOFError(), r"transformers cannot load its weights \(EOFError\)"),
        ({"mismatched": [("b", (1,), (2,)), "a"]}, r"2 weights have another shape \(a, b\): config.json and weights disagree"),
        ({"missing": list("edcba")}, r"5 weights are missing from the files \(a, b, c, d, \.\.\.\)"),
        ({"unexpected": list("dcba")}, r"4 weights have no place in the model \(a, b, c, d\)"),
        ({}, None),
    ],
)
def test_weights_that_do_not_fit_their_config_are_named(tmp_path, monkeypatch, outcome, said):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )

    def load(source, **more):
        if isinstance(outcome, Exception):
            raise outcome
        return model.train(), {f"{kind}_keys": outcome.get(kind, []) for kind in ("mismatched", "missing", "unexpected")}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    if said is None:
        assert not hf_verify.source_model(tmp_path, model.config, dtype="auto").training
        return
    for named in (None, Path("as/the/user/knows/it")):
        with pytest.raises(ConfigError, match=said) as caught:
            hf_verify.source_model(tmp_path, model.config, dtype="auto", named=named)
        assert caught.value.value == str(named or tmp_path)
