"""What a restart may do with each setting: the table knows them all, and most is compared before the host is imported."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from nemo_longctx import cli, dry_run, launch, launch_sft
from nemo_longctx.checkpoints import Checkpoint, write_manifest
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import StageConfig
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.recipe import RecipeConfig, load_instruct_recipe, load_recipe
from nemo_longctx.resume import (
    LISTS,
    TABLE,
    applied,
    changes,
    check_length,
    check_live,
    check_resumed,
    check_resumed_live,
    flat,
    live_settings,
    plain,
    refuse,
    rule_of,
    run_record,
    shorter_again,
    table_markdown,
    without_effect,
)
from nemo_longctx.runs import write_guard_stop

DOCS = Path(__file__).parent.parent / "docs" / "resume.md"
RUN = ["recipe=tiny_cpu_base", "name=run", "rope.variant=rope", "rope.base=10000"]


def recipe(*overrides: str, output="runs"):
    return load_recipe(compose([*RUN, f"output_dir={output}", *overrides]))


def found(*overrides: str):
    roped = ["rope=rope", "rope.base=10000"]
    return changes(plain(recipe(*roped)), plain(recipe(*roped, *overrides)))


def schema_keys():
    """Every key of the schema that has a type of its own."""
    hints = typing.get_type_hints(RecipeConfig)
    for field in dataclasses.fields(RecipeConfig):
        inner = hints[field.name]
        names = [f.name for f in dataclasses.fields(inner) if f.init] if dataclasses.is_dataclass(inner) else []
        yield from (f"{field.name}.{name}" for name in names)
        if not names:
            yield field.name if rule_of(field.name) else f"{field.name}.any"
    yield from (f"curriculum.stages[0].{field.name}" for field in dataclasses.fields(StageConfig))


def test_every_setting_has_a_rule():
    assert [key for key in schema_keys() if rule_of(key) is None] == []


@pytest.mark.parametrize(
    ("key", "rule"),
    [("optimizer.lr", "applied"), ("optimizer.distributed", "equal"), ("rope.base", "equal"), ("model.num_layers", "equal"),
     ("model.apply_rope_fusion", "free"), ("model.num_layers_in_last_pipeline_stage", "free"), ("model.cp_comm_type", "free"),
     ("model.account_for_loss_in_pipeline_split", "free"), ("model.persist_layer_norm", "free"),
     ("model.overlap_p2p_comm", "free"), ("model.moe_aux_loss_coeff", "applied"), ("model.attention_dropout", "applied"),
     ("model.qk_layernorm", "equal"), ("model.moe_grouped_gemm", "equal"),
     ("seed", "equal"), ("data.mix.sources[3].weight", "applied"),
     ("data.mix.sources[3].path", "free"), ("data.validation[0].samples", "applied"), ("data.num_workers", "free"),
     ("data.tokenizer", "applied"),
     ("curriculum.stages[0].micro_batch_size", "free"), ("curriculum.stages[0].context_parallel_size", "free"),
     ("data.mix.long_share", "equal"), ("data.after", "equal"), ("curriculum.stages[1].seq_length", "applied"),
     ("trainer.devices", "free"), ("trainer.precision", "equal"),
     ("eval.tasks", "applied"), ("checkpoint.keep", "applied")],
)  # fmt: skip
def test_the_rule_of(key, rule):
    assert rule_of(key).rule == rule


def test_the_docs_show_the_table():
    assert table_markdown() in DOCS.read_text()


def test_rates_and_decay_are_applied_and_noted():
    change = found("optimizer.lr=1e-3", "optimizer.weight_decay=0.5", "optimizer.min_lr=1e-4", "trainer.devices=2",
                   "trainer.tensor_model_parallel_size=2", "data.num_workers=7")  # fmt: skip
    refuse(change, where="the run", allow_change=False)
    assert applied(change) == {
        "optimizer.lr": {"before": 4e-3, "run": 1e-3},
        "optimizer.weight_decay": {"before": 0.1, "run": 0.5},
        "optimizer.min_lr": {"before": 4e-4, "run": 1e-4},
    }


@pytest.mark.parametrize(
    ("overrides", "key", "before"),
    [
        (["rope.variant=abf", "rope.base=2.0e6"], "rope.variant", "'rope'"),
        (["rope.base=2.0e6"], "rope.base", "10000"),
        (["seed=5"], "seed", "1234"),
        (["model.hidden_size=64"], "model.hidden_size", "128"),
        (["restore_from=somewhere"], "restore_from", "None"),
        (["trainer.precision=bf16-mixed"], "trainer.precision", "'32'"),
        (["optimizer.distributed=true"], "optimizer.distributed", "False"),
        (["curriculum.tokens_per_step=16384", "optimizer.warmup_tokens=0"], "curriculum.tokens_per_step", "2048"),
    ],
)
def test_what_made_the_run_is_refused_with_both_values(overrides, key, before):
    change = found(*overrides)
    with pytest.raises(ConfigError) as error:
        refuse(change, where="the checkpoint", allow_change=True)
    assert error.value.key == key
    assert f"the checkpoint has {before}" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["curriculum.total_tokens=4063232"], "curriculum.total_tokens"),
        (["curriculum.stages=[{until: 0.5, seq_length: 128}, {until: 1.0, seq_length: 256}]"], "curriculum.stages"),
    ],
)
def test_the_stream_goes_on_under_another_curriculum_and_that_is_noted(overrides, key):
    change = found(*overrides)
    refuse(change, where="the run", allow_change=False)
    assert key in applied(change)


def test_lists_of_other_lengths_are_named_whole():
    """Another number of validation sets was a line for each field of each set."""
    sets = [f"{{name: {name}, path: {name}, seq_length: 64}}" for name in "ab"]
    before, run = (plain(recipe(f"data.validation=[{', '.join(each)}]")) for each in (sets, sets[1:]))
    assert [(each.key, len(each.before), len(each.run)) for each in changes(before, run)] == [("data.validation", 2, 1)]
    assert [each.key for each in changes(before, plain(recipe("data.validation=[]")))] == ["data.validation"]


def test_other_rules_of_the_mix_need_to_be_allowed():
    before = plain(recipe("data.packing=concatenate"))
    change = changes(before, plain(recipe("data.packing=best_fit")))
    with pytest.raises(ConfigError, match=r"data\.allow_change=true to go on") as error:
        refuse(change, where="the run", allow_change=False)
    assert error.value.key == "data.packing"
    refuse(change, where="the run", allow_change=True)
    assert "data.packing" in applied(change)


def test_a_base_run_that_was_moved_is_the_same_base_run(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "other").mkdir()
    found = {
        (was, now): [each.key for each in changes(*({"data": {"after": str(tmp_path / name)}} for name in (was, now)))]
        for was, now in (("there", "there/"), ("gone", "there"), ("there", "other"))
    }
    assert list(found.values()) == [[], [], ["data.after"]]


def test_a_base_that_was_moved_is_the_same_base(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    before = plain(recipe(f"restore_from={here}"))
    assert changes(before, plain(recipe(f"restore_from={there}"))) == []
    here.mkdir()
    assert [change.key for change in changes(before, plain(recipe(f"restore_from={there}")))] == ["restore_from"]


@pytest.mark.parametrize("key", ["data.short", "data.long", "data.pretraining.sources"])
def test_files_of_tuning_that_were_moved_are_the_same_files(tmp_path, key):
    """Corpora of `train` may be moved; those of `sft` were refused as others. What is in them the data module compares."""
    here = tmp_path / "here"
    here.mkdir()

    def of(*names):
        paths = [str(tmp_path / name) for name in names]
        inner = [{"path": path} for path in paths] if "sources" in key else paths
        for name in reversed(key.split(".")):
            inner = {name: inner}
        return inner

    assert changes(of("gone", "here"), of("new", "here")) == []
    assert changes(of("gone", "gone2"), of("new", "here")) == []
    (change,) = changes(of("gone", "here"), of("new", "other"))
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        refuse([change], where="the run", allow_change=False)
    refuse([change], where="the run", allow_change=True)
    assert changes(of("gone", "gone"), of("new", "new", "new"))


def test_what_no_yaml_says_is_compared_with_the_live_model():
    live = {"rope.base": 500000.0, "rotary_base": 500000, "num_layers": 2, "seq_length": 64}
    check_live(live, live | {"rope.base": 500000, "new": 1}, where="the run")
    with pytest.raises(ConfigError, match=r"rope.base=10000.0: the run was trained with 500000.0"):
        check_live(live, live | {"rope.base": 10000.0}, where="the run")
    with pytest.raises(ConfigError, match="num_layers=3"):
        check_live(live, live | {"num_layers": 3}, where="the run")


@pytest.fixture
def run_directory(tmp_path):
    """A run as 0.1 left it: a finished checkpoint, and the record of its start."""
    results = tmp_path / "run" / "results"
    results.mkdir(parents=True)
    record = {"recipe": dataclasses.asdict(recipe()), "settings": {"rope.base": {"before": 10000.0, "run": 500000.0}}}
    record["recipe"]["rope"] = {"variant": "abf"}
    (results / "settings.json").write_text(json.dumps(record, default=str))
    return tmp_path


def test_a_start_is_compared_with_the_record_before_the_host_is_imported(run_directory, capsys):
    asked = ["rope.variant=abf", "rope.base=1.0e6"]
    check_resumed(recipe(*asked), run_directory / "run")  # no checkpoint: the next start is the first one
    checkpoint = run_directory / "run" / "checkpoints" / "step=3-last"
    checkpoint.mkdir(parents=True)
    Path(f"{checkpoint}-unfinished").touch()
    check_resumed(recipe(*asked), run_directory / "run")
    Path(f"{checkpoint}-unfinished").unlink()
    assert launch.main([*RUN, f"output_dir={run_directory}", *asked]) == 2
    printed = capsys.readouterr().err
    assert "rope.base=1000000.0" in printed
    assert "trained with 500000.0" in printed
    check_resumed(recipe("rope.variant=abf", "rope.base=500000", "optimizer.lr=1e-2"), run_directory / "run")
    (run_directory / "run" / "results" / "settings.json").write_text("{")  # unreadable: the checkpoint itself will tell
    check_resumed(recipe(*asked), run_directory / "run")


def test_tuning_too_is_compared_before_the_host_is_imported(tmp_path, capsys, monkeypatch):
    """Another blend ended `sft` behind the half minute that the host takes to start, `train` at once."""
    monkeypatch.setitem(sys.modules, "nemo_longctx.adapters.nemo.launch.instruct_run", None)
    files = ["data.tokenizer=t", "data.short=[a]", "data.long=[a]", "restore_from=base", "trainer=cpu"]
    asked = [f"output_dir={tmp_path}", "name=run", *files, "data.blend={short: 0.5, long: 0.5}"]
    (tmp_path / "run" / "checkpoints" / "step=3-last").mkdir(parents=True)
    (tmp_path / "run" / "results").mkdir()
    record = {"recipe": plain(load_instruct_recipe(compose(asked, config_name="sft")))}
    (tmp_path / "run" / "results" / "settings.json").write_text(json.dumps(record))
    assert launch_sft.main([*asked, "data.blend.short=0.75", "data.blend.long=0.25"]) == 2
    assert "error: data.blend.short=0.75: the run in" in capsys.readouterr().err


@pytest.mark.parametrize("swap", [False, True])
def test_adapters_neither_come_nor_go_within_a_run(swap):
    """Without `lora` a run of adapters ended in the host's own words about lists that it cannot merge."""
    files = ["data.tokenizer=t", "data.short=[a]", "data.long=[a]", "restore_from=base", "trainer=cpu", "name=run"]
    both = [plain(load_instruct_recipe(compose([*files, *more], config_name="sft"))) for more in (["lora={dim: 4}"], [])]
    before, run = reversed(both) if swap else both
    with pytest.raises(ConfigError, match=r"^lora=.*the run in x has"):
        refuse(changes(before, run), where="the run in x", allow_change=False)
    assert changes(run, run) == []


def test_a_run_whose_newest_checkpoint_is_gone_is_compared_all_the_same(run_directory):
    """Only the checkpoint that is kept for its validation loss was left: every setting passed until the host had loaded it."""
    (run_directory / "run" / "checkpoints" / "step=3-val_loss=4.1234").mkdir(parents=True)
    with pytest.raises(ConfigError, match="seed"):
        check_resumed(recipe("seed=7"), run_directory / "run")


@pytest.mark.parametrize(
    ("asked", "live", "refused"),
    [
        ("rope=abf", {"rope.variant": "rope", "rope.base": 500000.0}, None),
        ("rope=abf", {"rope.variant": "rope", "rope.base": 10000.0}, "rope.base"),
        ("rope=ntk", {"rope.variant": "rope", "rope.base": 83000.0}, None),  # its base is compared where the model is made
        ("rope=yarn", {"rope.variant": "rope", "rope.base": 10000.0}, "rope.variant"),
    ],
)
def test_a_variant_that_is_a_base_alone_is_known_again_in_the_live_model(tmp_path, asked, live, refused):
    """ABF is the host's `rotary_base`: its live model is a plain RoPE. Resuming such a run was refused."""

    def of(*overrides):
        return load_recipe(compose(["recipe=tiny_cpu_base", "name=run", *overrides]))

    (tmp_path / "checkpoints" / "step=1-last").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    settings = {key: {"before": value, "run": value} for key, value in live.items()}
    for before in (["rope=null"], [asked]):
        record = {"recipe": plain(of(*before)), "settings": settings}
        (tmp_path / "results" / "settings.json").write_text(json.dumps(record))
        if refused is None or before == [asked]:
            check_resumed(of(asked), tmp_path)
        else:
            with pytest.raises(ConfigError, match=refused):
                check_resumed(of(asked), tmp_path)


def test_a_dry_run_tells_a_run_shorter_than_its_checkpoint(run_directory, capsys):
    checkpoint = run_directory / "run" / "checkpoints" / "step=9-last"
    checkpoint.mkdir(parents=True)
    (run_directory / "run" / "results" / "settings.json").unlink()
    total = recipe().curriculum.total_tokens
    write_manifest(checkpoint, step=2 * recipe().curriculum.total_steps, tokens=2 * total)
    assert cli.main(["train", *RUN, f"output_dir={run_directory}", "--dry-run"]) == 2
    said = capsys.readouterr().out
    assert f"curriculum.total_tokens={total}: the run in {run_directory / 'run'} has {2 * total} tokens behind it" in said


def test_a_cap_of_repeats_is_not_asked_of_what_a_run_has_behind_it(tmp_path):
    """A run whose sources had changed was refused at each start for what the new ones would give from token 0 on."""
    with CorpusWriter(str(tmp_path / "corpus"), np.uint16) as writer:
        writer.add_documents(np.zeros(20_000, np.uint16), [100] * 200)
    clock = ["curriculum.total_tokens=40960", "curriculum.tokens_per_step=4096", "optimizer.warmup_tokens=0"]
    clock += ["trainer.val_every_tokens=0", "checkpoint.every_tokens=0"]
    mix = f"data.mix={{sources: [{{path: {tmp_path}/corpus, name: text}}], max_repeats: 1}}"
    asked = recipe(*clock, mix, output=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.mix\.max_repeats=1.*: text would have to come 2\.05 times"):
        dry_run._data(asked)[0]()
    (tmp_path / "run" / "checkpoints" / "step=6-last").mkdir(parents=True)
    assert dry_run._data(asked)[0]() == "200 documents: text 100.0% (0.82 times) from step 6 on"
    (tmp_path / "run" / "checkpoints" / "step=10-last").mkdir()
    assert dry_run._data(asked)[0]() == "200 documents: text 100.0% (0.00 times) from step 10 on"


def test_each_row_of_the_table_rules_its_keys_and_the_closest_one_wins():
    """A key made of a row's own pattern falls under that row, or under one that says more of it."""
    for row in TABLE:
        key = row.pattern.replace("[]", "[7]").replace("*", "x")
        found = rule_of(key)
        assert len(found.pattern.replace("*", "")) >= len(row.pattern.replace("*", "")), key
        assert found is row or "*" in row.pattern, key
    assert {row.pattern for row in TABLE if row.opened} == {
        "data.*", "data.after", "data.short", "data.long", "data.pretraining.sources[].path"
    }  # fmt: skip
    assert rule_of("curriculum.stages[12].seq_length").pattern == "curriculum.stages*"
    assert rule_of("curriculum.stages[12].micro_batch_size").rule == "free"
    assert rule_of("unheard.of") is None


def test_nested_settings_are_dotted_and_none_is_left_out():
    values = {"a": {"b": [1, 2], "c": None}, "d": [{"e": 1}, {"e": None, "f": {"g": 2}}, 3], "h": [], "i": {}, "j": False}
    assert flat(values) == {"a.b": [1, 2], "d[0].e": 1, "d[1].f.g": 2, "d[2]": 3, "h": [], "j": False}
    assert plain({"run": {"seed": 1, "name": "a"}, "lora": None, "name": "b"}) == {"seed": 1, "name": "b", "lora": None}
    assert plain({"run": "a word", "place": Path("x")}) == {"run": "a word", "place": "x"}


def test_what_only_one_of_two_recipes_sets_is_a_change_where_it_is_applied():
    for before, run in (({}, {"optimizer": {"lr": 1.0}}), ({"optimizer": {"lr": 1.0}}, {})):
        (change,) = changes(before, run)
        assert (change.key, change.before is None, change.run is None) == ("optimizer.lr", not before, not run)
    assert changes({"rope": {"base": 1.0}}, {}) == changes({}, {"rope": {"base": 1.0}}) == []
    assert [each.key for each in changes({}, {"restore_from": "x"})] == ["restore_from"]
    assert changes({"trainer": {"devices": 1}}, {"trainer": {"devices": 2}}) == []
    assert changes({"unheard": 1}, {"unheard": 2}) == []


SOURCE = {"path": "a", "name": "web", "weight": 0.5}
BOOKS = {"path": "b", "name": "books", "weight": 0.5, "drop_shorter": 64}
CODE = {"path": "c", "name": "code", "weight": 0.5}


@pytest.mark.parametrize(
    ("before", "run", "found"),
    [
        ([SOURCE, BOOKS], [BOOKS, SOURCE], []),
        ([SOURCE, BOOKS], [BOOKS | {"weight": 0.75}, SOURCE], ["data.mix.sources[1].weight"]),
        ([SOURCE, BOOKS], [BOOKS | {"drop_shorter": 32}, SOURCE], ["data.mix.sources[1].drop_shorter"]),
        ([SOURCE, BOOKS], [SOURCE, CODE], ["data.mix.sources"]),  # one went, one came
        ([SOURCE, BOOKS], [CODE, SOURCE], ["data.mix.sources"]),
        ([{"path": "a", "weight": 0.5}, {"path": "b"}], [{"path": "b"}, {"path": "a", "weight": 0.5}], []),
        ([{"path": "a"}, BOOKS], [{"path": "moved"}, BOOKS], []),
    ],
    ids=["places", "a_weight", "a_rule", "one_for_another", "and_places", "without_names", "moved"],
)
def test_sources_are_compared_by_their_names(before, run, found):
    """Sources with names that changed places, or one that took another's place, were refused: `sources[1].name`."""
    change = changes(*({"data": {"mix": {"sources": sources}}} for sources in (before, run)))
    assert [each.key for each in change] == found
    if found == ["data.mix.sources[1].drop_shorter"]:
        assert change[0].row.rule == "equal"
        return
    refuse(change, where="the run", allow_change=False)


def test_a_run_that_the_guard_stopped_goes_on_only_if_it_is_asked_to(run_directory):
    """The same command trained on as if nothing had been."""
    watched = "eval={tasks: [{kind: position, corpus: c, seq_length: 64, guard: true}], guard: {action: stop}}"
    here, asked = run_directory / "run", ["rope.variant=abf", "rope.base=500000"]
    (here / "checkpoints" / "step=3-last").mkdir(parents=True)
    stopped = recipe(*asked, watched)
    write_guard_stop(here / "results" / "eval", step=3, alarms=["loss rose"], guard=dataclasses.asdict(stopped.eval.guard))
    with pytest.raises(ConfigError, match=r"eval\.guard\.action='stop': .* at step 3 \(loss rose\); set it to warn"):
        check_resumed(stopped, here)
    for more in ([watched, "eval.guard.action=warn"], [watched, "eval.guard.loss=0.5"], []):
        check_resumed(recipe(*asked, *more), here)
    (here / "results" / "eval" / "guard_stop.json").write_text("[")
    check_resumed(stopped, here)


@pytest.mark.parametrize("key", LISTS)
def test_lists_of_one_length_are_compared_place_by_place_and_others_as_a_whole(key):
    def of(*lengths):
        inner = [{"seq_length": length, "weight": length, "corpus": length} for length in lengths]
        for name in reversed(key.split(".")):
            inner = {name: inner}
        return inner

    assert {each.key.rpartition(".")[0] for each in changes(of(1, 2), of(1, 3))} == {f"{key}[1]"}
    whole = changes(of(1, 2), of(1))
    assert [(each.key, len(each.before), len(each.run)) for each in whole] == [(key, 2, 1)]


def test_a_refusal_says_what_may_be_done(tmp_path):
    (change,) = changes({"data": {"packing": "a"}}, {"data": {"packing": "b"}})
    kept = "data.packing='b': the run has 'a', and a resumed run keeps it; set that again, or another `name` for another run"
    with pytest.raises(ConfigError) as error:
        refuse([change], where="the run", allow_change=False)
    assert str(error.value) == f"{kept}, or data.allow_change=true to go on with the new value"
    seed = changes({"seed": 1}, {"seed": 2})
    with pytest.raises(ConfigError) as error:
        refuse([change, *seed], where="the run", allow_change=True)
    assert str(error.value) == kept.replace("data.packing='b'", "seed=2").replace("'a'", "1")
    with pytest.raises(ConfigError, match=r"^rope\.base=2: the run was trained with 1; set that again"):
        check_live({"hidden_size": 1, "rope.base": 1}, {"hidden_size": 2, "rope.base": 2}, where="the run")
    check_live({"hidden_dropout": 0.1, "hidden_size": 1}, {"hidden_dropout": 0.2}, where="the run")


def test_what_a_live_model_had_is_read_from_the_record():
    record = {"settings": {"rope.variant": {"before": 1, "run": "yarn"}, "seq_length": {"run": 9}}, "model": {"num_layers": 2}}
    assert live_settings(record) == {"rope.variant": "yarn", "rope.layers": "all", "num_layers": 2}
    record["settings"]["rope.layers"] = {"run": "full_attention"}
    record["model"] |= {"max_position_embeddings": 1, "recompute": "full", "attention_backend": "x"}
    assert live_settings(record) == {"rope.variant": "yarn", "rope.layers": "full_attention", "num_layers": 2}
    assert live_settings({}) == {}


@pytest.mark.parametrize(("recorded", "refused"), [("[31, 0]", False), ("(31, 0)", False), ([31, 0], False), ("[63, 0]", True)])
def test_a_window_is_the_one_that_a_record_keeps_as_text(tmp_path, recorded, refused):
    """A run of a model with a sliding window could not go on: `[31, 0]` was not `'[31, 0]'`."""
    (tmp_path / "checkpoints" / "step=1-last").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    record = {"recipe": {}, "settings": {"window_size": {"before": None, "run": recorded}}}
    (tmp_path / "results" / "settings.json").write_text(json.dumps(record))
    for live in ([31, 0], (31, 0)):
        if refused:
            with pytest.raises(ConfigError, match=r"^window_size=.*was trained with '\[63, 0\]'"):
                check_resumed_live({"window_size": live}, tmp_path)
        else:
            check_resumed_live({"window_size": live}, tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "compared"),
    [
        ({}, {"layernorm_epsilon": 1e-3}, {"layernorm_epsilon"}),
        ({"layernorm_epsilon": 1e-5}, {"config": "LlamaConfig"}, {"layernorm_epsilon"}),
        ({"layernorm_epsilon": 1e-5}, {"layernorm_epsilon": None}, {"layernorm_epsilon"}),
        ({"layernorm_epsilon": 1e-5}, {"layernorm_epsilon": 1e-5}, set()),  # compared as settings, and the host may change it
        ({}, {"moe_router_topk": 2}, set()),  # not in the record
        (None, {"layernorm_epsilon": 1e-3}, {"layernorm_epsilon"}),
        ({"layernorm_epsilon": 1e-5}, None, set()),
    ],
    ids=str,
)
def test_a_field_of_the_model_that_one_start_alone_names_is_compared(tmp_path, before, now, compared):
    """`model.layernorm_epsilon=1e-3` at a restart trained on with it, and the row of the table says: equal."""
    record = {"recipe": {"model": before}, "config": {"layernorm_epsilon": 1e-5, "num_layers": 2, "config": "x"}}
    assert set(live_settings(record, now)) == compared
    (tmp_path / "checkpoints" / "step=1-last").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "settings.json").write_text(json.dumps(record))
    check_resumed_live({"layernorm_epsilon": 1e-5, "num_layers": 3}, tmp_path, asked=now)
    if compared:
        with pytest.raises(ConfigError, match=r"^layernorm_epsilon=0\.001: the run in .* was trained with 1e-05"):
            check_resumed_live({"layernorm_epsilon": 1e-3}, tmp_path, asked=now)


def test_a_run_may_end_where_its_checkpoint_stands_and_not_before(tmp_path):
    curriculum = recipe().curriculum
    steps = curriculum.total_steps
    check_length(curriculum, None)
    check_length(curriculum, Checkpoint(tmp_path / "run" / "checkpoints" / "a", steps))
    with pytest.raises(ConfigError) as error:
        check_length(curriculum, Checkpoint(tmp_path / "run" / "checkpoints" / "a", steps + 1))
    behind = (steps + 1) * curriculum.tokens_per_step
    assert str(error.value) == (
        f"curriculum.total_tokens={curriculum.total_tokens}: the run in {tmp_path / 'run'} has {behind} tokens behind it "
        "already; set at least that, or another name"
    )


@pytest.mark.parametrize(
    ("total", "until", "step", "said"),
    [
        (10, 0.5, 7, None),
        (20, 0.5, 7, "from step 7 on windows have 64 tokens, and by the curriculum of before 128: `until` is a share"),
        (20, 0.5, 10, None),  # the longer stage begins here
        (20, 0.5, 9, "from step 9 on"),
        (20, 0.35, 7, None),
        (20, 0.5, 3, None),  # it was in the first stage
        (20, 0.75, 10, "from step 10 on"),  # a finished run
        (10, 0.9, 10, None),
        (20, 0.9, 0, None),
    ],
)
def test_a_run_that_falls_back_to_shorter_windows_is_told_so(tmp_path, capsys, monkeypatch, total, until, step, said):
    """Half as many tokens again sent a run that had come to long windows back to short ones without a word."""

    def of(total, until):
        stages = f"curriculum.stages=[{{until: {until}, seq_length: 64}}, {{until: 1.0, seq_length: 128}}]"
        more = ["curriculum.tokens_per_step=128", f"curriculum.total_tokens={128 * total}", "optimizer.warmup_tokens=0"]
        return recipe(stages, *more, "checkpoint.every_tokens=0", "trainer.val_every_tokens=0", output=tmp_path)

    asked, place = of(total, until), tmp_path / "run"
    assert shorter_again(asked.curriculum, place) is None
    checkpoint = place / "checkpoints" / f"step={step}-last"
    checkpoint.mkdir(parents=True)
    assert shorter_again(asked.curriculum, place) is None  # a checkpoint without a record
    (place / "results").mkdir()
    (place / "results" / "settings.json").write_text(json.dumps({"recipe": plain(of(10, 0.5))}))
    told = shorter_again(asked.curriculum, place)
    assert told is None if said is None else told.startswith(said)
    monkeypatch.setattr(launch, "checkpoint_to_resume", lambda directory, fallback: None)
    monkeypatch.setattr("nemo_longctx.dry_run.refuse", lambda recipe: None)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        launch.fit_unless_finished(asked, lambda: None)
        assert ("note: from step" in capsys.readouterr().err) is (said is not None and rank == "0")


@pytest.mark.parametrize(("saved", "of"), [(8, "checkpoint"), (9, "start"), (4, "checkpoint")])
def test_a_start_that_saved_nothing_is_not_what_the_run_was_made_by(tmp_path, saved, of):
    """A start under `data.allow_change` that was killed at once: the run's own settings were then refused as a change."""
    (tmp_path / "checkpoints" / f"step={saved}-last").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    was, asked = recipe("data.packing=concatenate"), recipe("data.packing=best_fit", "data.allow_change=true")
    record = {"recipe": plain(asked), "step": 8, "from": {"recipe": plain(was)}}
    (tmp_path / "results" / "settings.json").write_text(json.dumps(record))
    assert run_record(tmp_path)["recipe"] == plain(was if of == "checkpoint" else asked)
    if of == "checkpoint":
        check_resumed(was, tmp_path)
    else:
        with pytest.raises(ConfigError, match=r"^data\.packing"):
            check_resumed(was, tmp_path)
    for before in ({}, {"from": None, "step": 8}):  # of before, and a first start
        (tmp_path / "results" / "settings.json").write_text(json.dumps({"recipe": {"seed": 1}, **before}))
        assert run_record(tmp_path)["recipe"] == {"seed": 1}


def test_a_finished_run_is_told_what_of_a_recipe_it_does_not_heed(run_directory):
    asked = recipe("optimizer.lr=1e-2", "rope.variant=abf", "trainer.num_nodes=2", "trainer.tensor_model_parallel_size=2")
    assert without_effect(asked, run_directory / "run") == []
    (run_directory / "run" / "checkpoints" / "step=3-last").mkdir(parents=True)
    assert without_effect(asked, run_directory / "run") == ["optimizer.lr: 0.004 -> 0.01"]
    check_resumed_live({"rope.base": 500000.0}, run_directory / "run")
    with pytest.raises(ConfigError, match=r"trained with 500000\.0"):
        check_resumed_live({"rope.base": 1.0}, run_directory / "run")
    check_resumed_live({"rope.base": 1.0}, run_directory / "nowhere")
    for text in ("[]", '{"recipe": 1}', "{}"):
        (run_directory / "run" / "results" / "settings.json").write_text(text)
        assert run_record(run_directory / "run") is None
