"""The data module's own rules, without a training run: what ranks are dealt, what a checkpoint says, what is refused."""

import hashlib
import os
import pickle
import shlex
import shutil
import signal
import sys
import weakref
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.evaluation import EvaluationConfig
from nemo_longctx.data.writer import CorpusWriter

pytest.importorskip("nemo.lightning")

import fiddle as fdl
import hydra
import nemo_run as run
from nemo.lightning.io import load, reinit
from omegaconf import OmegaConf

from nemo_longctx.adapters.nemo.data import data_module, sampler
from nemo_longctx.adapters.nemo.data.data_module import LongContextDataModule
from nemo_longctx.adapters.nemo.data.datasets import EvaluationDataset, WindowDataset, collate
from nemo_longctx.adapters.nemo.data.sampler import CurriculumBatchSampler, command_with

CURRICULUM = {
    "stages": [{"until": 0.5, "seq_length": 16, "micro_batch_size": 2}, {"until": 1.0, "seq_length": 64}],
    "tokens_per_step": 256,
    "total_tokens": 2560,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    prefix, rng = tmp_path_factory.mktemp("corpus") / "text", np.random.default_rng(0)
    with CorpusWriter(prefix, np.uint16) as writer:
        for _ in range(150):
            writer.add_document(rng.integers(1, 100, rng.integers(3, 120)))
    return str(prefix)


def module(corpus, cache_dir, **changes):
    values = {"mix": {"sources": [{"path": corpus}]}, "curriculum": CURRICULUM, "cache_dir": str(cache_dir), "num_workers": 0}
    return LongContextDataModule(**(values | changes))


def attach(data, *, max_steps=-1, global_step=0, **fields):
    epoch_loop = SimpleNamespace(max_steps=max_steps, batch_progress=SimpleNamespace(current=SimpleNamespace()))
    limits = {"limit_train_batches": 1.0, "limit_val_batches": 1.0, "limit_test_batches": 1.0, "num_sanity_val_steps": 0}
    data.trainer = SimpleNamespace(
        max_steps=max_steps,
        global_step=global_step,
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
        **(limits | fields),
    )
    return data


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4]), sizes=st.lists(st.sampled_from([1, 2]), min_size=2, max_size=2), step=st.integers(0, 9)
)
def test_ranks_are_dealt_every_sample_of_a_step_once(ranks, sizes, step):
    stages = [stage | {"micro_batch_size": size} for stage, size in zip(CURRICULUM["stages"], sizes, strict=True)]
    if ranks * sizes[1] > 4:
        return  # a global batch of four windows
    curriculum = build(Curriculum, CURRICULUM | {"stages": stages})
    begin = curriculum.samples_at_token(256 * step)
    samplers = [CurriculumBatchSampler(curriculum, first_sample=begin, rank=rank, world_size=ranks) for rank in range(ranks)]
    batches = [iter(each) for each in samplers]
    for now in range(step, curriculum.total_steps):
        stage = curriculum.stage_at_step(now)
        seen = [n for it in batches for _ in range(stage.num_microbatches(ranks)) for n in next(it)]
        first = curriculum.samples_at_token(256 * now)
        assert sorted(seen) == list(range(first, first + stage.global_batch_size))
    assert all(next(it, None) is None for it in batches)
    assert len({len(each) for each in samplers}) == 1
    # What Lightning counts as fetched at a restart, one batch a step, and what is left: it validates at the last of them.
    assert len(samplers[0]) == step + sum(curriculum.stage_at_step(s).num_microbatches(ranks) for s in range(step, 10))


@st.composite
def interrupted_runs(draw):
    """Launches of one curriculum: ranks, workers, micro batch sizes, and the steps after which each saved and was killed."""
    lengths = draw(st.lists(st.sampled_from([16, 32, 64]), min_size=1, max_size=4))
    ends = np.cumsum(draw(st.lists(st.integers(1, 4), min_size=len(lengths), max_size=len(lengths)))).tolist()
    launches, saved = [], 0
    while saved < ends[-1]:
        ranks = draw(st.sampled_from([1, 2, 4]))
        sizes = [draw(st.sampled_from([n for n in (1, 2, 4) if 256 // length % (n * ranks) == 0])) for length in lengths]
        dies = draw(st.integers(saved + 1, ends[-1]))
        stages = [
            {"until": end / ends[-1], "seq_length": length, "micro_batch_size": size}
            for end, length, size in zip(ends, lengths, sizes, strict=True)
        ]
        curriculum = {"stages": stages, "tokens_per_step": 256, "total_tokens": 256 * ends[-1]}
        then = draw(st.integers(saved, dies)) if dies < ends[-1] else dies
        launches.append(
            {"ranks": ranks, "workers": draw(st.integers(0, 2)), "curriculum": curriculum, "saves": then, "dies": dies}
        )
        saved = then
    return launches


def digest_of_step(batches):
    """A hash of the windows of a step, whatever rank and micro batch each came in."""
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    windows = [
        b"".join(batch[key][row].numpy().tobytes() for key in keys) for batch in batches for row in range(len(batch["tokens"]))
    ]
    return hashlib.sha256(b"".join(sorted(windows))).hexdigest()


def launch(corpus, cache_dir, monkeypatch, state, launched, **data_settings):
    """Steps of one launch from `state` on: step -> digest; and the state that it saved."""
    ranks, curriculum = launched["ranks"], build(Curriculum, launched["curriculum"])
    first = 0 if state is None else state["token_address"] // 256
    of_ranks = []
    for rank in range(ranks):
        for name, value in (("data_parallel_world_size", ranks), ("data_parallel_rank", rank)):
            monkeypatch.setattr(sampler.parallel_state, f"get_{name}", lambda value=value: value)
        settings = {"curriculum": launched["curriculum"], "num_workers": launched["workers"], **data_settings}
        data = attach(module(corpus, cache_dir, **settings), global_step=launched["saves"])
        data.setup("fit")
        if state is not None:
            data.load_state_dict(state)
        loader = data.data_sampler.transform_dataloader(data.train_dataloader())
        numbers = [curriculum.stage_at_step(step).num_microbatches(ranks) for step in range(first, launched["dies"])]
        batches = iter(loader)
        of_ranks.append([list(islice(batches, number)) for number in numbers])
    steps = {first + n: digest_of_step(chain.from_iterable(step)) for n, step in enumerate(zip(*of_ranks, strict=True))}
    return steps, data.state_dict()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    launches=interrupted_runs(),
    packing=st.sampled_from(["concatenate", "best_fit"]),
    masking=st.booleans(),
    seed=st.integers(1, 99),
)
def test_the_stream_is_the_same_for_any_ranks_workers_micro_batches_and_kills(
    corpus, tmp_path, launches, packing, masking, seed
):
    """Through the module, its sampler and torch's loader; test_data_module_training.py does the like in the real trainer."""
    stream = {"packing": packing, "document_masking": masking, "seed": seed}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel"):
            monkeypatch.setattr(sampler.parallel_state, f"get_{name}_world_size", lambda: 1)
        curriculum = launches[0]["curriculum"]
        steps = curriculum["total_tokens"] // 256
        alone = {"ranks": 1, "workers": 0, "curriculum": curriculum, "saves": steps, "dies": steps}
        expected, _ = launch(corpus, tmp_path, monkeypatch, None, alone, **stream)
        seen, state = {}, None
        for launched in launches:
            now, state = launch(corpus, tmp_path, monkeypatch, state, launched, **stream)
            assert now == {step: expected[step] for step in now}
            seen |= now
    assert seen == expected


def test_a_blank_place_of_an_evaluation_gives_a_window_that_counts_for_nothing(corpus):
    config = EvaluationConfig(name="a", path=corpus, seq_length=16)
    dataset = EvaluationDataset([config], document_masking=True)
    batch, blank = collate([dataset[2], dataset[~2]]), collate([dataset[~2]])
    assert batch["tokens"][0].equal(batch["tokens"][1])
    assert batch["loss_mask"][0].sum() > 0
    assert blank["loss_mask"].sum() == 0


@pytest.mark.parametrize("masking", [False, True])
def test_a_batch_has_the_hosts_names_and_shapes(corpus, tmp_path, masking):
    data = attach(module(corpus, tmp_path, document_masking=masking))
    data.setup("fit")
    dataset = WindowDataset(data.windows)
    batch = collate([dataset[0], dataset[1]])
    for key in ("tokens", "labels", "position_ids"):
        assert batch[key].shape == (2, 16)
        assert batch[key].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.float32
    assert batch["labels"][:, :-1].equal(batch["tokens"][:, 1:])
    assert "attention_mask" not in batch
    assert ("cu_seqlens" in batch) is masking
    if masking:
        boundaries = batch["cu_seqlens"][0].tolist()
        assert batch["cu_seqlens_argmin"].tolist() == [[len(boundaries)]]
        assert batch["max_seqlen"].item() == max(np.diff(boundaries))
        assert (boundaries[0], boundaries[-1]) == (0, 32)
        assert 16 in boundaries
        assert [n for n, position in enumerate(batch["position_ids"].flatten().tolist()) if position == 0] == boundaries[:-1]


def test_a_worker_that_opens_the_files_itself_gives_the_same_samples(corpus, tmp_path):
    for packing in ("concatenate", "best_fit"):
        data = attach(module(corpus, tmp_path, packing=packing))
        data.setup("fit")
        dataset = WindowDataset(data.windows)
        sent = pickle.dumps(dataset)
        assert len(sent) < 20_000, "the order itself was sent"
        worker = pickle.loads(sent)
        assert [worker[n]["tokens"].tolist() for n in range(len(worker))] == [
            dataset[n]["tokens"].tolist() for n in range(len(dataset))
        ]


def test_the_run_is_as_long_as_trainer_and_curriculum_agree(corpus, tmp_path):
    open_ended = {key: value for key, value in CURRICULUM.items() if key != "total_tokens"}
    data = attach(module(corpus, tmp_path, curriculum=open_ended), max_steps=6)
    data.setup("fit")
    assert data.curriculum.total_tokens == data.data_sampler.curriculum.total_tokens == 6 * 256
    data = attach(module(corpus, tmp_path))
    data.setup("fit")
    assert data.trainer.fit_loop.epoch_loop.max_steps == 10
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=11: the curriculum ends after 10 steps"):
        attach(module(corpus, tmp_path), max_steps=11).setup("fit")
    with pytest.raises(ConfigError, match=r"set it, or trainer\.max_steps"):
        attach(module(corpus, tmp_path, curriculum=open_ended)).setup("fit")


def test_what_nemo_asks_of_a_data_module(corpus, tmp_path):
    data = module(corpus, tmp_path)
    assert (data.seq_length, data.micro_batch_size, data.global_batch_size) == (64, 2, 16)
    again = reinit(data)  # from the arguments that NeMo writes beside checkpoints
    assert again.mix == data.mix
    assert again.curriculum == data.curriculum


def test_a_target_in_yaml_and_a_nemo_run_config_make_the_module(corpus, tmp_path):
    """As Hydra and nemo_run build NeMo's parts; and what NeMo writes beside a checkpoint builds it again."""
    target = "nemo_longctx.adapters.nemo.data.data_module.LongContextDataModule"
    validation = [{"name": "held_out", "path": corpus, "seq_length": 16}]
    values = {"mix": {"sources": [{"path": corpus}]}, "curriculum": CURRICULUM, "validation": validation}
    built = [
        hydra.utils.instantiate(OmegaConf.create({"_target_": target, **values})),
        fdl.build(run.Config(LongContextDataModule, **values)),
    ]
    for number, data in enumerate(built):
        assert data.mix.sources[0].path == corpus
        assert data.curriculum == build(Curriculum, CURRICULUM)
        assert [each.name for each in data.evaluation["validation"]] == ["held_out"]
        data.io_dump(tmp_path / str(number), yaml_attrs=[])
        assert load(tmp_path / str(number)).curriculum == data.curriculum


def state_of(corpus, cache_dir, step, **changes):
    data = attach(module(corpus, cache_dir, **changes), global_step=step)
    data.setup("fit")
    return data.state_dict()


def restored(monkeypatch, corpus, cache_dir, state, **changes):
    data = attach(module(corpus, cache_dir, **changes))
    monkeypatch.setattr(type(data.data_sampler), "data_parallel_size", 1)
    data.setup("fit")
    data.load_state_dict(state)
    return data


def test_a_checkpoint_holds_the_address_and_refuses_other_data(monkeypatch, corpus, tmp_path):
    state = state_of(corpus, tmp_path, 6)
    assert state["token_address"] == 6 * 256
    assert state["consumed_samples"] == 5 * 16 + 4
    data = restored(monkeypatch, corpus, tmp_path, state)
    assert data.data_sampler.start_token == 6 * 256
    assert (data.data_sampler.seq_len, data.data_sampler.global_batch_size) == (64, 4)
    for changes, name in [
        ({"seed": 5}, "data.seed, order"),
        ({"document_masking": True}, "data.document_masking"),
        ({"packing": "best_fit"}, "data.packing"),
        ({"mix": {"sources": [{"path": corpus}], "drop_shorter": 10}}, "data.mix, order"),
    ]:
        with pytest.raises(ConfigError, match=f"{name} changed since the checkpoint at 1536 tokens"):
            restored(monkeypatch, corpus, tmp_path, state, **changes)
    data = restored(monkeypatch, corpus, tmp_path, state, seed=5, allow_change=True)
    assert data.history[0]["token_address"] == 6 * 256
    assert attach(data, global_step=7).state_dict()["history"] == data.history
    other = {**CURRICULUM, "tokens_per_step": 1024, "total_tokens": 10240}
    with pytest.raises(ConfigError, match=r"curriculum\.tokens_per_step=1024"):
        restored(monkeypatch, corpus, tmp_path, state, curriculum=other, allow_change=True)


def test_a_longer_run_goes_on_with_what_was_not_read(monkeypatch, corpus, tmp_path):
    """No leave is asked for, and what a checkpoint holds of it survives NeMo's ways."""
    state = pickle.loads(pickle.dumps(state_of(corpus, tmp_path, 6)))
    longer = {**CURRICULUM, "total_tokens": 12 * 256}
    data = restored(monkeypatch, corpus, tmp_path, state, curriculum=longer)
    assert data.history[0]["changed"] == ["curriculum", "order"]
    assert data.windows.order.origin == 6 * 256
    assert data.windows.order.facts["read_again"] == [0]
    again = attach(data, global_step=9).state_dict()
    assert [segment["until"] for segment in again["segments"]] == [6 * 256, None]
    onward = restored(monkeypatch, corpus, tmp_path, again, curriculum=longer)
    assert (onward.windows.order.digest, len(onward.history)) == (data.windows.order.digest, 1)


def test_a_restart_opens_the_stream_once_its_checkpoint_is_read(monkeypatch, corpus, tmp_path):
    state = state_of(corpus, tmp_path, 6)
    data = attach(module(corpus, tmp_path), ckpt_path="a checkpoint")
    monkeypatch.setattr(type(data.data_sampler), "data_parallel_size", 1)
    data.setup("fit")
    assert data.windows is None
    data.load_state_dict(state)
    assert len(data.windows) == data.curriculum.total_samples
    told = []
    monkeypatch.setattr(LongContextDataModule, "_report", lambda self, windows: told.append(windows))
    for steps, count in ((12, 1), (6, 1)):  # at its end it reads nothing more, and has nothing to tell of it
        longer = {**CURRICULUM, "total_tokens": steps * 256}
        data = attach(module(corpus, tmp_path, curriculum=longer), ckpt_path="a checkpoint")
        data.setup("fit")
        data.load_state_dict(state)
        assert (len(told), data.windows is not None) == (count, True)


def test_a_corpus_that_cannot_be_written_beside_has_its_order_in_the_run(corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus + suffix, tmp_path / f"text{suffix}")
    (tmp_path / "order_cache").write_text("no folder can be here")
    mix = {"sources": [{"path": str(tmp_path / "text")}]}
    data = attach(LongContextDataModule(mix, CURRICULUM, num_workers=0), default_root_dir=str(tmp_path / "run"))
    data.setup("fit")
    assert Path(data.windows.order.path).parent == tmp_path / "run" / "order_cache"


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused(monkeypatch, corpus, tmp_path):
    state = state_of(corpus, tmp_path, 6)
    shorter = {**CURRICULUM, "total_tokens": 4 * 256}
    with pytest.raises(ConfigError, match=r"curriculum\.total_tokens=1024: the run is shorter than .* 1536 tokens"):
        restored(monkeypatch, corpus, tmp_path, state, curriculum=shorter, allow_change=True)
    just_done = {**CURRICULUM, "total_tokens": 6 * 256}
    data = restored(monkeypatch, corpus, tmp_path, state, curriculum=just_done, allow_change=True)
    assert data.data_sampler.start_token == 6 * 256


def test_a_checkpoint_refuses_a_corpus_of_which_one_token_was_written_over(monkeypatch, corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus + suffix, tmp_path / f"text{suffix}")
    state = state_of(corpus, tmp_path / "cache", 6)
    restored(monkeypatch, str(tmp_path / "text"), tmp_path / "cache", state)  # a copy is the same data
    own, told = state_of(str(tmp_path / "text"), tmp_path / "cache", 6), []
    with open(tmp_path / "text.bin", "r+b") as file:
        file.seek(1234)
        file.write(b"\xff")
    with pytest.raises(ConfigError, match="data changed since the checkpoint at 1536 tokens"):
        restored(monkeypatch, str(tmp_path / "text"), tmp_path / "cache", state)
    monkeypatch.setattr(data_module, "rank_zero_info", told.append)
    restored(monkeypatch, str(tmp_path / "text"), tmp_path / "cache", own, allow_change=True)
    (said,) = [line for line in told if "count as unread" in line]
    assert "what was read up to token 1536 cannot be told any more, as its data changed since; its documents count" in said


def test_a_seed_is_not_negative(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.seed=-1"):
        module(corpus, tmp_path, seed=-1)


def test_limits_count_steps_of_each_set(corpus, tmp_path):
    sets = [{"name": "a", "path": corpus, "seq_length": 16}, {"name": "b", "path": corpus, "seq_length": 64, "samples": 3}]
    data = attach(module(corpus, tmp_path, validation=sets), limit_val_batches=4)
    data.reconfigure_limit_batches()
    assert data.data_sampler.evaluation_limits == {"validation": 4, "test": None}
    assert data.trainer.limit_val_batches == 1.0
    dataset = EvaluationDataset(data.evaluation["validation"], document_masking=False)
    assert [each.samples for each in dataset.sets][1] == 3
    assert len(dataset[dataset.sets[1].first_sample]["tokens"]) == 64
    assert len(dataset[dataset.sets[1].first_sample - 1]["tokens"]) == 16
    for fields in ({"limit_val_batches": 0.5}, {"limit_train_batches": 7}):
        with pytest.raises(ConfigError, match=f"trainer.{next(iter(fields))}"):
            attach(module(corpus, tmp_path), **fields).reconfigure_limit_batches()
    with pytest.raises(ConfigError, match="two sets have this name"):
        module(corpus, tmp_path, validation=[sets[0], sets[0]])


@pytest.mark.parametrize(
    ("processes", "torchrun", "expected"),
    [
        (4, False, [sys.executable, "-u", "train.py", "recipe=x", "trainer.context_parallel_size=4"]),
        (2, False, [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "train.py", "recipe=x",
                    "trainer.context_parallel_size=4", "trainer.devices=4", "trainer.num_nodes=1"]),
        (8, True, [*Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1], "trainer.context_parallel_size=4"]),
    ],
)  # fmt: skip
def test_the_command_for_a_stage_with_other_parallel_sizes(monkeypatch, processes, torchrun, expected):
    live = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 2}
    monkeypatch.setattr(sampler, "live_sizes", lambda: live)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py", "recipe=x", "trainer.context_parallel_size=2"])
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe=x", "trainer.context_parallel_size=2"])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: torchrun)
    assert shlex.split(command_with({"context_parallel_size": 4})) == expected


def test_workers_that_an_error_left_alive_end_with_the_interpreter(monkeypatch):
    """They do not hear the signal by which multiprocessing ends them before it waits for them."""
    monkeypatch.setattr(sampler, "_OWNERS", weakref.WeakKeyDictionary())  # loaders of other tests may be alive in this process
    before = signal.getsignal(signal.SIGCHLD)
    loader = sampler._Loader(list(range(100)), num_workers=2, worker_init_fn=sampler._leave_stops_to_the_run)
    iterator = iter(loader)
    next(iterator)
    workers = list(iterator._workers)
    workers[0].terminate()
    workers[0].join(0.3)
    assert workers[0].is_alive()  # as a stop signal must leave it
    another = os.getpid() + 1
    with monkeypatch.context() as of_a_fork:  # whose children they are not
        of_a_fork.setattr(os, "getpid", lambda: another)
        sampler._end_workers()
    assert all(worker.is_alive() for worker in workers)
    try:
        sampler._end_workers()
        for worker in workers:
            worker.join(20)
        assert not any(worker.is_alive() for worker in workers)
    finally:
        signal.signal(signal.SIGCHLD, before)
