"""Callbacks by themselves: what they do at a start, at a resume, at a save, and when an alarm must end the run."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("nemo.lightning")

from nemo.lightning.pytorch.callbacks import PEFT
from nemo.utils import AppState

from nemo_longctx.adapters.nemo.evaluation import callback as evaluation
from nemo_longctx.adapters.nemo.evaluation.callback import LongContextEvalCallback
from nemo_longctx.adapters.nemo.launch import callbacks as launch_callbacks
from nemo_longctx.adapters.nemo.launch.callbacks import LongContextSettingsCallback, TrainingLogCallback, _other_documents
from nemo_longctx.adapters.nemo.launch.lifecycle import LifecycleCallback, keep_own_files_in_place
from nemo_longctx.adapters.nemo.launch.throughput import ThroughputCallback
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.eval.results import SuiteResult
from nemo_longctx.loggers import keep_ids
from nemo_longctx.report.evaluation import read_results, write_results
from nemo_longctx.report.training_log import TRAINING_COLUMNS, read_training_log
from nemo_longctx.runs import FINISHED, GUARD_STOP, check_guard, one_run, write_finished

WATCHED = {"kind": "position", "corpus": "unused", "seq_length": 64, "guard": True}


class Counting(LongContextEvalCallback):
    """Counts evaluations instead of making them."""

    def __init__(self, **kwargs):
        super().__init__(tasks=[WATCHED], **kwargs)
        self.evaluated = []

    def _build(self, pl_module):
        return None

    def evaluate(self, trainer, pl_module):
        self.evaluated.append(trainer.global_step)


def trainer_at(step, **more):
    return SimpleNamespace(global_step=step, is_global_zero=True, should_stop=False, loggers=[], **more)


def test_the_files_of_a_run_stay_where_the_next_start_looks_for_them(tmp_path, monkeypatch):
    """The host moved them away with the logs of the start before: two starts of one command then trained at once, and the third
    start of a run logged to another run of W&B's."""
    keep_ids(tmp_path, {"wandb": "abc"})
    write_finished(tmp_path, step=1, tokens=8)
    with one_run(tmp_path):
        own = list(tmp_path.iterdir())
    assert len(own) == 3
    state = AppState()
    for asked, kept in ([*own, tmp_path / "a.log"], [tmp_path / "a.log"]), (None, []):
        monkeypatch.setattr(state, "files_to_move", asked)
        keep_own_files_in_place()
        assert state.files_to_move == kept


@pytest.mark.parametrize(
    ("changed", "paths", "noted"),
    [
        (["data", "data.mix", "order"], ["b"], {"before": ["a"], "run": ["b"]}),
        (["data"], ["a"], {"before": ["as they were"], "run": ["other documents at the same places"]}),
        (["curriculum", "order"], ["b"], None),  # moved: the documents are the same
        (["data"], ["a", "b"], None),  # the settings themselves say it
    ],
)
def test_other_documents_are_noted_where_only_a_path_says_so(changed, paths, noted):
    """The path of a source is free, so that it can be moved: another corpus there left no trace in `settings.json`."""

    def recipe(*paths):
        return {"data": {"mix": {"sources": [{"path": path} for path in paths]}}}

    data = SimpleNamespace(
        history=[{"changed": changed, "token_address": 700}], curriculum=SimpleNamespace(tokens_per_step=100)
    )
    found = [_other_documents(trainer_at(step, datamodule=data), recipe("a"), recipe(*paths)) for step in (7, 8)]
    assert found == [{"data.mix.sources": noted} if noted else {}, {}]  # later starts: it is in the history already


def test_bad_steps_that_are_made_again_are_dropped_whole_or_not_at_all(tmp_path, monkeypatch):
    """A start that was killed meanwhile lost the names of all bad steps."""
    callback, records = LifecycleCallback(directory=str(tmp_path), curriculum=None), tmp_path / "results" / "bad_numbers.jsonl"
    callback._drop_later_records(5)
    records.parent.mkdir()
    records.write_text('{"step": 3}\n{"step": 5}\n{"step": 7}\n{"ste')
    before = records.read_text()

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            callback._drop_later_records(5)
    assert records.read_text() == before
    callback._drop_later_records(5)
    assert records.read_text() == '{"step": 3}\n{"step": 5}\n'


@pytest.mark.parametrize(("step", "at_start", "times"), [(0, True, 1), (0, False, 0), (7, True, 0)])
def test_an_evaluation_at_the_start_is_none_at_a_resume(tmp_path, step, at_start, times):
    callback = Counting(directory=str(tmp_path), at_start=at_start)
    callback.on_train_start(trainer_at(step), None)
    assert callback.evaluated == [step] * times


class Slow(LongContextEvalCallback):
    """An evaluation takes as long as a hundred steps."""

    def _measure(self, trainer, pl_module, name, rope=None):
        assert name == f"step {trainer.global_step}"
        trainer.clock[0] += 100.0


def test_the_time_of_an_evaluation_is_no_step_s(tmp_path, monkeypatch):
    """It was counted to the rows and the throughput after it, as if training had become slow."""
    clock = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("time.process_time", lambda: clock[0] / 2)
    stages = Curriculum.constant(seq_length=8, global_batch_size=1, total_steps=9)
    log = TrainingLogCallback(path=str(tmp_path / "training.csv"), curriculum=stages)
    speed = ThroughputCallback(curriculum=stages, path=str(tmp_path / "t.json"))
    slow = Slow(tasks=[], directory=str(tmp_path), every=2)
    (tmp_path / "training.csv").write_text(",".join(TRAINING_COLUMNS) + "\n")
    log._note(1)
    speed._window = (1, clock[0])
    groups = [SimpleNamespace(param_groups=[{"lr": 0.1}])]
    for step in (2, 3):
        clock[0] += 1.0
        more = {"callbacks": [log, speed, slow], "callback_metrics": {}, "optimizers": groups, "clock": clock}
        trainer = trainer_at(step, **more)
        log.on_train_batch_end(trainer, None, None, None, 0)
        slow.on_train_batch_end(trainer, None, None, None, 0)
    rows = read_training_log(tmp_path / "training.csv")
    assert [(row["tokens_per_second"], row["processor_seconds"]) for row in rows] == [(8.0, 0.5)] * 2
    assert speed._window == (1, 150.0)
    speed._window = None
    speed.leave_out(seconds=3.0)  # nothing is timed yet
    assert speed._window is None


@pytest.mark.parametrize(("guard", "told"), [({}, True), (None, False)])
def test_a_guard_that_compared_nothing_says_so_at_the_end(tmp_path, capsys, guard, told):
    end = LifecycleCallback(directory=str(tmp_path), curriculum=SimpleNamespace(total_steps=3, tokens_per_step=8))
    watcher = Counting(directory=str(tmp_path), guard=guard)
    end.on_fit_end(trainer_at(3, callbacks=[end, watcher]), None)
    said = "short-context guard: nothing was compared, there was no second evaluation"
    assert (said in capsys.readouterr().out) == told
    assert (said in (tmp_path / FINISHED).read_text()) == told


def test_evaluations_come_every_so_many_steps_and_at_the_end(tmp_path):
    callback = Counting(directory=str(tmp_path), every=3)
    for step in range(1, 8):
        callback.on_train_batch_end(trainer_at(step), None, None, None, 0)
    callback.on_train_end(trainer_at(8), None)
    assert callback.evaluated == [3, 6, 8]


def result(loss):
    empty = {
        "position": {},
        "context": {},
        "documents": {},
        "probes": [],
        "tasks": {},
        "truncations": [],
        "errors": {},
        "skipped": [],
    }
    return SuiteResult(model="step 1", watched={"loss_position_64": [loss] * 20}, seconds={}, **empty)


@pytest.mark.parametrize(
    ("action", "after", "steps", "stops", "noted"),
    [("stop", 3.0, 9, True, True), ("stop", 3.0, -1, True, True), ("stop", 3.0, 5, True, False),  # the last step: it is over
     ("warn", 3.0, 9, False, False), ("stop", 2.0, 9, False, False)],
)  # fmt: skip
def test_an_alarm_ends_the_run_only_where_it_must(tmp_path, capsys, action, after, steps, stops, noted):
    callback = Counting(directory=str(tmp_path / "results" / "eval"), guard={"action": action, "loss": 0.25})
    callback.results = [result(2.0), result(after)]
    trainer = trainer_at(5, max_steps=steps)
    callback.directory.mkdir(parents=True)
    (callback.directory / GUARD_STOP).write_text("{}")
    callback._watch(trainer, callback.results[-1])
    assert trainer.should_stop == stops
    assert ("the short-context guard stops the run after step 5; eval.guard.action=warn" in capsys.readouterr().out) == noted
    if not noted:
        assert (callback.directory / GUARD_STOP).exists() == stops  # without an alarm it is gone
        return
    (tmp_path / "checkpoints" / "step=5-last").mkdir(parents=True)
    guard = dataclasses.asdict(callback.guard)
    with pytest.raises(ConfigError, match=r"^eval\.guard\.action='stop': .* at step 5 \(loss_position_64 changed by"):
        check_guard(tmp_path, guard)
    for other in (None, guard | {"action": "warn"}, guard | {"loss": 2.0}):
        check_guard(tmp_path, other)
    (tmp_path / "checkpoints" / "step=6-last").mkdir()
    check_guard(tmp_path, guard)  # it went on since
    callback.on_train_start(trainer_at(5), None)
    assert (callback.directory / GUARD_STOP).exists()
    callback.on_train_start(trainer_at(0), None)  # another run begins here
    assert not (callback.directory / GUARD_STOP).exists()


def test_a_save_looks_at_the_disk_on_the_first_rank(tmp_path):
    callback = LongContextSettingsCallback(directory=str(tmp_path), recipe={})
    callback.checkpoint_bytes = 1
    callback.on_save_checkpoint(trainer_at(1), None, {})
    callback.checkpoint_bytes = 2**70
    with pytest.raises(ConfigError, match="MiB free, and saving takes"):
        callback.on_save_checkpoint(trainer_at(1), None, {})
    other = trainer_at(1)
    other.is_global_zero = False
    callback.on_save_checkpoint(other, None, {})


@pytest.mark.parametrize("resumed", [True, False])
def test_the_record_of_a_start_keeps_what_its_checkpoint_was_made_by(tmp_path, monkeypatch, resumed):
    made = {"shape_of": {"num_layers": 2}, "fields_of": {"vocab_size": 9}, "live_of": {}, "versions": {}, "check_disk": None,
            "mcore_modules": [SimpleNamespace(parameters=list)], "verify_live_rope": "", "attention_summary": "",
            "note_ids": None, "settings_table": ""}  # fmt: skip
    for name, value in made.items():
        monkeypatch.setattr(launch_callbacks, name, lambda *args, value=value, **more: value)
    strategy = SimpleNamespace(megatron_parallel=None, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    start = launch_callbacks.RunStart(changes=[], source="x", variant=None)
    module = SimpleNamespace(long_context_start=start, model_transform=None, config=None)
    trainer = trainer_at(8, callbacks=[], strategy=strategy, optimizers=[], ckpt_path="x" if resumed else None, datamodule=None)
    callback = LongContextSettingsCallback(directory=str(tmp_path), recipe={"seed": 1, "optimizer": {"lr": 2.0}})
    before = {"recipe": {"seed": 1, "optimizer": {"lr": 1.0}}, "settings": {}, "model": {}, "history": []}
    callback.load_state_dict({"record": json.dumps(before | {"from": {"old": "one"}, "versions": {}})})
    callback.on_train_start(trainer, module)
    record = json.loads((tmp_path / "settings.json").read_text())
    assert (record["step"], record["from"]) == (8, before if resumed else None)
    assert (record["model"], record["config"]) == ({"num_layers": 2}, {"vocab_size": 9})
    noted = [{"step": 8, "changed": {"optimizer.lr": {"before": 1.0, "run": 2.0}}}]
    assert record["history"] == (noted if resumed else [])
    assert sorted(json.loads(callback.state_dict()["record"])) == sorted(launch_callbacks.KEPT)


@pytest.mark.parametrize(("trained", "needed"), [(0, 0), (2**40, 2**40 * 14)])
def test_a_save_of_adapters_needs_room_for_them_alone(tmp_path, monkeypatch, trained, needed):
    """Adapters of a large model were refused for want of a disk that would hold all of it twice."""
    asked = []
    monkeypatch.setattr(launch_callbacks, "check_disk", lambda folder, size: asked.append(size))
    callback = LongContextSettingsCallback(directory=str(tmp_path), recipe={})
    callback.checkpoint_bytes = 100
    sizes = [(2**50, False), (trained, True)]
    parameters = [SimpleNamespace(numel=lambda n=n: n, dtype=torch.bfloat16, requires_grad=grad) for n, grad in sizes]
    strategy = SimpleNamespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    for callback._adapters in (True, False):
        callback.on_save_checkpoint(trainer_at(1, strategy=strategy), SimpleNamespace(parameters=lambda: parameters), {})
    assert asked == [100 + 6 * needed, 100]


@pytest.mark.parametrize(
    ("step", "kept"), [(7, ["base", "step 0", "step 7"]), (8, ["base", "step 0", "step 7"]), (6, ["base", "step 0"]), (0, [])]
)
def test_a_run_that_begins_anew_measures_anew(tmp_path, monkeypatch, step, kept):
    """One killed before its first checkpoint and started with another base kept the first base's figures as its own."""
    there = [dataclasses.replace(result(2.0), model=name) for name in ("base", "step 0", "step 7", "step 9")]
    monkeypatch.setattr(evaluation, "read_results", lambda directory: there)
    callback = Counting(directory=str(tmp_path))
    callback.on_train_start(trainer_at(step), None)
    assert [each.model for each in callback.results] == kept


def test_evaluations_are_kept_on_disk_and_their_page_has_all(tmp_path, monkeypatch):
    """What was measured of every document was kept of every evaluation by every process."""
    made = iter(
        [dataclasses.replace(result(loss), model=f"step {step}") for step, loss in ((1, 2.0), (2, 2.1), (3, 2.2), (4, 2.3))]
    )
    monkeypatch.setattr(evaluation, "mcore_modules", lambda _: [None])
    monkeypatch.setattr(evaluation, "evaluating", contextlib.nullcontext)
    monkeypatch.setattr(evaluation, "MCoreCausalModel", lambda *_, **more: SimpleNamespace(release=lambda: None))
    monkeypatch.setattr(evaluation, "data_group", lambda: None)
    callback = LongContextEvalCallback(tasks=[WATCHED], directory=str(tmp_path / "eval"), guard={"action": "warn"})
    callback._suite = SimpleNamespace(run=lambda model, **more: next(made))
    module = SimpleNamespace(config=SimpleNamespace(seq_length=64, vocab_size=9))
    (tmp_path / "eval").write_text("no folder")  # the disk is full at first

    def evaluate(step):
        callback.evaluate(trainer_at(step, strategy=SimpleNamespace(megatron_parallel=None), callbacks=[]), module)

    evaluate(1)
    (tmp_path / "eval").unlink()
    evaluate(2)
    stale = dataclasses.replace(result(9.0), model="step 8")  # of a run that was killed: it is trained again
    write_results(tmp_path / "eval", [*read_results(tmp_path / "eval"), stale], provenance={})
    evaluate(3)
    assert [(one.model, one.watched["loss_position_64"][0]) for one in read_results(tmp_path / "eval")] == [
        ("step 1", 2.0), ("step 2", 2.1), ("step 3", 2.2),
    ]  # fmt: skip
    assert [(one.model, len(one.watched)) for one in callback.results] == [("step 1", 1), ("step 2", 0), ("step 3", 0)]
    assert callback.verdict.changes["loss_position_64"].mean == pytest.approx(0.2)
    again = Counting(directory=str(tmp_path / "eval"), guard={"action": "warn"})
    again.on_train_start(trainer_at(2, callbacks=[]), None)
    assert [(one.model, len(one.watched)) for one in again.results] == [("step 1", 1), ("step 2", 0)]


@pytest.mark.parametrize(
    ("step", "guard", "before", "told"), [(7, {}, [], 1), (0, {}, [], 0), (7, None, [], 0), (7, {}, [1], 0)], ids=str
)
def test_a_guard_that_comes_late_says_what_it_compares_with(tmp_path, monkeypatch, step, guard, before, told):
    """A run whose first start measured nothing was watched from its next evaluation on, as if that were the base."""
    warned = []
    monkeypatch.setattr(evaluation.logger, "warning", lambda text, *more: warned.append(text % more))
    monkeypatch.setattr(evaluation, "read_results", lambda directory: [result(2.0)] * len(before))
    callback = Counting(directory=str(tmp_path), guard=guard, at_start=False)
    callback.on_train_start(trainer_at(step), None)
    assert warned == ["guard: nothing was measured before step 7, so changes are those since the next evaluation"] * told


@pytest.mark.parametrize(("step", "adds"), [(3, True), (0, False)])
def test_what_a_resumed_run_owes_is_measured_with_its_adapters(monkeypatch, tmp_path, step, adds):
    """They come once an epoch has begun: the base was measured in their place, and called `step 3`."""
    did = []

    class Adapters(PEFT):
        def transform(self, module, name=None, prefix=None):
            raise AssertionError

        def on_validation_epoch_start(self, trainer, pl_module):
            did.append("adapters")

    monkeypatch.setattr(evaluation, "mcore_modules", lambda _: did.append("look") or [])
    callback = LongContextEvalCallback(tasks=[WATCHED], directory=str(tmp_path))
    trainer = trainer_at(step, strategy=SimpleNamespace(megatron_parallel=None), callbacks=[object(), Adapters()])
    with pytest.raises(ConfigError):
        callback.evaluate(trainer, None)
    assert did == ["adapters"] * adds + ["look"]


@pytest.mark.parametrize(("distributed", "overlaps"), [(True, True), (True, False), (False, True), ("megatron", None)])
def test_an_evaluation_begins_with_all_weights_on_every_rank(monkeypatch, tmp_path, distributed, overlaps):
    """A rank without a document to read would not come for them, and the others wait in its place for good."""
    did, modules = [], [object()]
    ddp = "megatron" if distributed == "megatron" else SimpleNamespace(
        use_distributed_optimizer=distributed, overlap_param_gather=overlaps
    )  # fmt: skip
    megatron = SimpleNamespace(force_param_sync=lambda: did.append("sync"))
    strategy = SimpleNamespace(ddp_config=ddp, megatron_parallel=megatron)
    monkeypatch.setattr(evaluation, "mcore_modules", lambda _: modules)

    def evaluating(module):
        did.append("evaluate")
        raise InterruptedError

    monkeypatch.setattr(evaluation, "evaluating", evaluating)
    callback = LongContextEvalCallback(tasks=[WATCHED], directory=str(tmp_path))
    callback._suite = object()
    trainer, module = trainer_at(3, strategy=strategy, callbacks=[]), SimpleNamespace(config=SimpleNamespace(seq_length=64))
    with pytest.raises(InterruptedError):
        callback.evaluate(trainer, module)
    assert did == (["sync"] if (distributed, overlaps) == (True, True) else []) + ["evaluate"]
