"""What is known of a run before NeMo is imported: another run in its directory, its end, and how it is stopped."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from saved_checkpoints import make, truncate

from nemo_longctx import launch, launch_sft, runs
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.dry_run import rehearsal
from nemo_longctx.recipe import BadNumbersConfig, CheckpointConfig, load_recipe
from nemo_longctx.resume import plain

HOLD = """
import sys, time
from pathlib import Path
from nemo_longctx.runs import one_run
with one_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
RUN = ["recipe=tiny_cpu_base", "name=mine"]


def hold(directory):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def refuse_nemo(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo", None)  # an import of it would fail
    monkeypatch.setitem(sys.modules, "nemo_longctx.adapters.nemo.launch.run", None)


def test_the_same_command_at_once_is_refused_and_after_a_kill_it_is_not(tmp_path, capsys, monkeypatch):
    refuse_nemo(monkeypatch)
    other = hold(tmp_path / "mine")
    try:
        assert launch.main([*RUN, f"output_dir={tmp_path}"]) == 2
        said = capsys.readouterr().err
        assert "error: name='mine': process" in said
        assert str(other.pid) in said
        assert "give this run another name" in said
    finally:
        other.kill()
        other.wait()
    with runs.one_run(tmp_path / "mine"), runs.one_run(tmp_path / "mine"):  # its own process may take it twice
        pass
    hold(tmp_path / "mine").kill()


def test_only_the_first_process_takes_the_lock(tmp_path, monkeypatch):
    other = hold(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with runs.one_run(tmp_path):
        pass
    other.kill()
    other.wait()


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path, capsys, monkeypatch):
    refuse_nemo(monkeypatch)
    (tmp_path / "file").write_text("no directory")
    assert launch.main([*RUN, f"output_dir={tmp_path}/file"]) == 2
    assert "error: output_dir=" in capsys.readouterr().err


def finished(directory, *, steps=10, tokens=40_960):
    make(directory, steps)
    results = directory / "results"
    results.mkdir()
    rows = ["step,tokens,seq_length,loss,lr,grad_norm,validation_loss,tokens_per_second,validation_loss_books",
            f"{steps},{tokens},256,4.5,0.001,1.0,,100,", f"{steps},{tokens},256,,,,4.75,,4.75"]  # fmt: skip
    (results / "training.csv").write_text("\n".join(rows) + "\n")
    recipe = {
        "data": {
            "validation": [{"name": name, "path": f"data/{path}"} for name, path in (("books", "held out"), ("code", "code"))]
        }
    }
    (results / "settings.json").write_text(json.dumps({"recipe": recipe}))
    (results / "eval").mkdir()
    (results / "eval" / "index.html").write_text("<html></html>")
    scalars = [{"position_64/loss": loss, "passkey/effective_length": length} for loss, length in ((5.0, 64.0), (4.0, 256.0))]
    runs.write_finished(directory, step=steps, tokens=tokens, evaluated=runs.evaluation_lines(scalars))


def test_a_line_of_a_last_evaluation_has_every_digit_of_a_length_and_says_what_is_lost():
    first = {"position_64/loss": 5.0, "code/effective_length": 32768.0, "passkey/effective_length": 4096.0, "x/loss": 1.0}
    last = {"position_64/loss": 2.34567, "code/effective_length": 16384.0, "seconds": 9.0}
    assert runs.evaluation_lines([first, last]) == [
        "position_64/loss 5 -> 2.346", "code/effective_length 32,768 -> 16,384",
        "passkey/effective_length 4,096 -> too weak to tell, or not measured", "x/loss 1 -> not measured",
    ]  # fmt: skip
    assert runs.evaluation_lines([first], most=2)[2:] == ["and 2 more, on the page of the evaluation"]
    assert runs.evaluation_lines([]) == []


CLOCK = ["curriculum.total_tokens=40960", "curriculum.tokens_per_step=4096", "optimizer.warmup_tokens=0",
         "trainer.val_every_tokens=0", "checkpoint.every_tokens=0"]  # fmt: skip


def test_a_finished_run_says_so_at_once_without_nemo(tmp_path, capsys, monkeypatch):
    refuse_nemo(monkeypatch)
    finished(tmp_path / "mine")
    began = time.process_time()  # of this process: other work on the machine does not count
    assert launch.main([*RUN, f"output_dir={tmp_path}", *CLOCK]) == 0
    assert time.process_time() - began < 2
    said = capsys.readouterr().out
    for part in ("is finished already", "set curriculum.total_tokens above 40960", "training loss 4.5000", "books 4.7500",
                 "evaluated position_64/loss 5 -> 4", "evaluated passkey/effective_length 64 -> 256",
                 "checkpoints/step=10-last", "results/eval/index.html", "nemo-longctx export",
                 "mine --corpus 'data/held out'", "nemo-longctx chat"):  # fmt: skip
        assert part in said


def test_a_rehearsal_names_nothing_that_is_removed(tmp_path):
    """It told to export, evaluate and chat with a directory that was gone when this was read."""
    finished(tmp_path / f".mine{runs.REHEARSAL}x" / "mine")
    said = runs.ending(tmp_path / f".mine{runs.REHEARSAL}x" / "mine")
    assert "training loss 4.5000" in said
    assert str(tmp_path) not in said
    finished(tmp_path / "my-dry-run-1" / "mine")  # a user's own folder is none
    assert "nemo-longctx export" in runs.ending(tmp_path / "my-dry-run-1" / "mine")
    assert "mine --corpus 'data/held out'" in runs.ending(tmp_path / "my-dry-run-1" / "mine")


@pytest.mark.parametrize("what", ["longer", "torn", "no checkpoint", "put aside"])
def test_a_run_that_is_not_at_its_end_is_not_finished(tmp_path, what):
    directory = tmp_path / "mine"
    finished(directory)
    assert runs.is_finished(directory, total_tokens=40_960)
    if what == "torn":
        truncate(directory / "checkpoints" / "step=10-last" / "weights" / ".metadata")
    elif what == "no checkpoint":
        os.rename(directory / "checkpoints", directory / "elsewhere")
    elif what == "put aside":  # with resume.fallback; the run trains on from the one before, and may be killed again
        make(directory, 9)
        os.rename(directory / "checkpoints" / "step=10-last", directory / "elsewhere")
    assert not runs.is_finished(directory, total_tokens=81_920 if what == "longer" else 40_960)


def test_what_a_finished_run_does_not_heed_is_told(tmp_path, capsys, monkeypatch):
    """Another rate or an evaluation that came with the same command was left out without a word."""
    refuse_nemo(monkeypatch)
    finished(tmp_path / "mine")
    command = [*RUN, f"output_dir={tmp_path}", *CLOCK]
    record = {"recipe": plain(load_recipe(compose(command)))}
    (tmp_path / "mine" / "results" / "settings.json").write_text(json.dumps(record))
    assert launch.main(command) == 0
    assert "no effect" not in capsys.readouterr().out
    task = f"eval={{tasks: [{{kind: position, corpus: {tmp_path}/held_out, seq_length: 64}}]}}"
    assert launch.main([*command, "optimizer.lr=0.5", "trainer.log_every_n_steps=7", task]) == 0
    said = capsys.readouterr().out
    assert "no effect on a finished run\n" in said
    assert "optimizer.lr: 0.004 -> 0.5" in said
    assert "eval.tasks" in said


def test_a_finished_run_without_its_checkpoints_is_not_trained_anew_over_its_results(tmp_path, capsys, monkeypatch):
    """It began again at step 0 and cut training.csv to nothing."""
    refuse_nemo(monkeypatch)
    finished(tmp_path / "mine")
    command = [*RUN, f"output_dir={tmp_path}", *CLOCK]
    shutil.rmtree(tmp_path / "mine" / "checkpoints")
    for more in ([], ["curriculum.total_tokens=81920"]):
        assert launch.main([*command, *more]) == 2
        said = capsys.readouterr().err
        assert "error: name='mine': the run in" in said
        assert "finished at step 10, and its checkpoints are gone; put them back" in said
        assert f"remove {tmp_path / 'mine' / runs.FINISHED}" in said
    (tmp_path / "mine" / runs.FINISHED).unlink()
    runs.check_begins(tmp_path / "mine")
    assert "has 10 steps in results/training.csv and no checkpoint of any: the run begins anew" in capsys.readouterr().out
    runs.check_begins(tmp_path / "another")
    assert not capsys.readouterr().out


def test_a_torn_checkpoint_is_named_without_nemo(tmp_path, capsys, monkeypatch):
    refuse_nemo(monkeypatch)
    truncate(make(tmp_path / "mine", 5) / "weights" / "__0_0.distcp")
    assert launch.main([*RUN, f"output_dir={tmp_path}", *CLOCK]) == 2
    assert "step=5-last, cannot be read: weights/__0_0.distcp" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_before_training_ends_with_its_status_and_the_command(capsys, name, status):
    before = signal.getsignal(getattr(signal, name))
    assert launch.exit_status(lambda: os.kill(os.getpid(), getattr(signal, name)) or time.sleep(5)) == status
    said = capsys.readouterr().err
    assert f"stopped by {name} before anything new was trained; go on with\n  " in said
    assert signal.getsignal(getattr(signal, name)) == before


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_a_signal_that_an_import_swallows_ends_the_start_all_the_same(tmp_path, capsys, monkeypatch, verb):
    """Megatron-Core's optional imports take whatever is raised there for a missing package: the run trained on without it."""

    class Importing:
        def __getattr__(self, name):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except BaseException:
                pass
            return lambda recipe: pytest.fail("a run was built")

    module = {"train": "run", "sft": "instruct_run"}[verb]
    monkeypatch.setitem(sys.modules, f"nemo_longctx.adapters.nemo.launch.{module}", Importing())
    for place in (launch, launch_sft):
        monkeypatch.setattr(place, "fit_unless_finished", lambda recipe, fit: fit())
    tuning = ["name=mine", "restore_from=base", "trainer=cpu", "data.tokenizer=t", "data.long=[a]", "data.short=[a]"]
    asked = RUN if verb == "train" else tuning
    assert (launch if verb == "train" else launch_sft).main([*asked, f"output_dir={tmp_path}"]) == 143
    assert "stopped by SIGTERM before anything new was trained" in capsys.readouterr().err


def test_a_signal_that_a_library_tells_as_an_error_of_its_own_is_still_a_stop(capsys):
    def composed():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException as error:
            raise RuntimeError("ConfigCompositionException") from error

    assert launch.exit_status(composed) == 143
    assert "ConfigCompositionException" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC, errno.EROFS])
def test_a_checkpoint_that_ranks_cannot_write_ends_in_one_sentence(capsys, number):
    from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

    def save():
        try:
            raise RuntimeError(f"Worker failure: {OSError(number, os.strerror(number), '/runs/mine/__0_0.distcp')}")
        except RuntimeError as failure:
            raise CheckpointException("write", dict.fromkeys((0, 1), _wrap_exception(failure))) from failure

    assert launch.exit_status(save) == 2
    said = capsys.readouterr().err
    assert said.startswith("\nerror: a checkpoint failed (write) on rank 0, 1: Worker failure: [Errno ")
    assert said.count("\n") == 2
    assert os.strerror(number) in said
    assert "the checkpoints before are whole" in said
    assert "Traceback" not in said


def test_a_signal_while_training_is_only_noted_and_a_second_ctrl_c_ends(capfd):
    request = runs.StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    request.listen()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM
        with pytest.raises(runs.Stopped) as stopped:
            signal.raise_signal(signal.SIGINT)
        assert stopped.value.code == 130
    finally:
        request.forget()
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err.count("SIGTERM: this step is finished") == 1


def test_a_signal_that_the_opening_of_data_swallows_stops_the_run_all_the_same(capsys):
    """What a library takes, or a finaliser, was forgotten: the run trained on, and `scancel` waited for its kill."""
    request = runs.StopRequest()

    def train():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)
        request.listen()
        raise runs.Stopped(request.signum)

    try:
        assert launch.exit_status(train) == 138
    finally:
        request.forget()
    assert "stopped by SIGUSR1 before anything new was trained" in capsys.readouterr().err
    later = runs.StopRequest()
    later.listen()  # of the next run in this process
    later.forget()
    assert later.signum == 0


def test_a_second_ctrl_c_does_not_say_that_nothing_was_trained(capsys):
    request = runs.StopRequest()

    def train():
        request.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        assert launch.exit_status(train) == 130
    finally:
        request.forget()
    said = capsys.readouterr().err
    assert "stopped by SIGINT at once: steps behind the newest checkpoint are made again; go on with" in said
    assert "before anything new" not in said


def test_what_other_processes_of_a_killed_dry_run_left_is_removed_too(tmp_path, capsys, monkeypatch):
    """Each process has a folder, and those but the first locked none: they stayed for good."""
    recipe = load_recipe(compose([*RUN, f"output_dir={tmp_path}"]))
    monkeypatch.setenv("RANK", "1")
    killed, taking = (tmp_path / f".mine{runs.REHEARSAL}{name}" for name in ("killed", "taking"))
    with rehearsal(recipe) as cut:
        shutil.copytree(cut.directory.parent, killed)
    (taking / "mine").mkdir(parents=True)
    (taking / "mine" / runs.LOCK).touch()  # a process that is about to lock it
    monkeypatch.setenv("RANK", "0")
    with rehearsal(recipe):
        assert (killed.exists(), taking.exists()) == (False, True)
    assert f"removed {killed}: a dry run that was killed left it" in capsys.readouterr().out


def test_what_a_killed_dry_run_left_is_removed_by_the_next(tmp_path, capsys):
    """Checkpoints in a hidden folder stayed for good; a dry run that is under way keeps its own."""
    recipe = load_recipe(compose([*RUN, f"output_dir={tmp_path}"]))
    folders = {each: tmp_path / f".mine{runs.REHEARSAL}{each}" for each in ("killed", "working", "new")}
    held = [hold(folders[each] / "mine") for each in ("killed", "working")]
    folders["new"].mkdir()  # not locked yet
    held[0].kill()
    held[0].wait()
    try:
        with rehearsal(recipe) as cut:
            assert (cut.directory / runs.LOCK).exists()
            assert sorted(each.name for each in folders.values() if each.exists()) == [
                folders["new"].name,
                folders["working"].name,
            ]
    finally:
        held[1].kill()
        held[1].wait()
    assert not cut.directory.exists()
    assert f"removed {folders['killed']}: a dry run that was killed left it" in capsys.readouterr().out


def test_a_run_shorter_than_its_checkpoint_is_refused_without_nemo(tmp_path, capsys, monkeypatch):
    """Told behind the start of the host; a finished run asked for less too."""
    refuse_nemo(monkeypatch)
    finished(tmp_path / "mine", steps=20, tokens=81_920)
    assert launch.main([*RUN, f"output_dir={tmp_path}", *CLOCK]) == 2
    said = capsys.readouterr().err
    assert "curriculum.total_tokens=40960: the run in" in said
    assert "has 81920 tokens behind it already; set at least that" in said


def test_the_own_command_is_the_one_typed():
    program = "from nemo_longctx.runs import own_command; print(own_command())"
    command = [sys.executable, "-c", program, "name=a b"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "'name=a b'" in said
    assert said.startswith(sys.executable)


@pytest.mark.parametrize(
    ("make_config", "key"),
    [
        (lambda: CheckpointConfig(keep_last=0), "checkpoint.keep_last"),
        (lambda: BadNumbersConfig(not_finite="stopp"), "bad_numbers.not_finite"),
        (lambda: BadNumbersConfig(spike="no"), "bad_numbers.spike"),
        (lambda: BadNumbersConfig(spike_factor=1.0), "bad_numbers.spike_factor"),
        (lambda: BadNumbersConfig(spike_factor=float("nan")), "bad_numbers.spike_factor"),
        (lambda: BadNumbersConfig(spike_window=1), "bad_numbers.spike_window"),
    ],
)
def test_settings_out_of_range_are_named(make_config, key):
    with pytest.raises(ConfigError) as caught:
        make_config()
    assert caught.value.key == key


def test_a_broken_note_of_the_end_is_no_end(tmp_path):
    (tmp_path / runs.FINISHED).write_text('{"step": 1')
    assert runs.read_finished(tmp_path) is None
    (tmp_path / runs.FINISHED).write_text(json.dumps([1]))
    assert runs.read_finished(tmp_path) is None


def test_an_error_is_told_behind_all_that_was_printed_before():
    """Into one file, as a cluster's log: what a buffer holds would come behind its error."""
    code = "from nemo_longctx import launch\nfrom nemo_longctx.config import ConfigError\n"
    code += "print('a step')\nraise SystemExit(launch.tell(ConfigError('name', 1, 'is none')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    assert done.returncode == 2
    assert done.stdout == "a step\n\nerror: name=1: is none\n"
