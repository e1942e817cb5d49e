import pytest

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.effects import RULES, beyond, idle, refuse_idle, without_effect
from nemo_longctx.overrides import typed_keys
from nemo_longctx.recipe import InstructRecipe, RecipeConfig, load_instruct_recipe, load_recipe
from nemo_longctx.reference import settings

VALIDATION = [{"name": "a", "path": "p", "seq_length": 8}]
TASKS = [{"kind": "position", "corpus": "p", "seq_length": 8}]
NOTHING = "eval.tasks names none, so nothing is measured"
# (key, value, what makes it idle, what lets it act, the reason)
CASES = [
    ("trainer.val_every_tokens", 64, {}, {"data": {"validation": VALIDATION}}, "data.validation names no set"),
    ("trainer.limit_val_batches", 1, {"data": {"validation": []}}, {"data": {"validation": VALIDATION}}, "names no set"),
    *((f"eval.{name}", value, {"eval": {"tasks": []}}, {"eval": {"tasks": TASKS}}, NOTHING)
      for name, value in (("every", 1), ("at_start", True), ("at_end", True), ("time_budget", 1.0), ("guard.loss", 0.1),
                          ("tokenizer", "t"), ("max_length", 9), ("results_cache", "f"))),
    ("data.persistent_workers", True, {"data": {"num_workers": 0}}, {"data": {"num_workers": 1}}, "starts no process to keep"),
    ("data.mix.balance", "all", {}, {"data": {"mix": {"long_share": 0.5}}}, "asks for no share of long documents"),
    ("data.pretraining.balance", "all", {}, {"data": {"pretraining": {"long_share": 0.5}}}, "for no share of long documents"),
    ("data.prompt_loss_weight", 0, {"data": {"blend": {"short": 1}}}, {"data": {"blend": {"long": 1}}}, "has no long ones"),
    ("optimizer.min_lr", 0, {"optimizer": {"schedule": "constant"}}, {"optimizer": {"schedule": "cosine"}}, "constant stays"),
    ("checkpoint.keep_last", 2, {"checkpoint": {"every_tokens": 0}}, {"checkpoint": {"every_tokens": 1}}, "so there is one"),
]  # fmt: skip


def merged(*parts):
    made = {}
    for part in parts:
        for key, value in part.items():
            made[key] = merged(made.get(key, {}), value) if isinstance(value, dict) else value
    return made


def at(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(("key", "value", "without", "beside", "why"), CASES, ids=[case[0] for case in CASES])
def test_what_is_typed_and_acts_on_nothing_is_refused(key, value, without, beside, why):
    values = merged(without, at(key, value))
    with pytest.raises(ConfigError, match=f"^{key}=.*: has no effect: .*{why}") as error:
        refuse_idle(values, ["seed", key])
    assert error.value.value == value
    refuse_idle(values, ["seed"])  # a recipe's is a note
    if key != "eval.guard.loss":
        refuse_idle(merged(without, at(key, None)), [key])
    refuse_idle(merged(values, beside), [key])
    assert not list(idle(merged(values, beside)))


def test_every_rule_is_of_settings_that_there_are_and_has_its_case():
    there = {row.key for cls in (RecipeConfig, InstructRecipe) for row in settings(cls)}
    asked = {key for rule in RULES for key in rule.keys}
    assert [key for key in asked if not any(each == key or each.startswith((f"{key}.", f"{key}[")) for each in there)] == []
    known = {key for key, *_ in CASES} | {"eval.guard", "data.test", "data.short", "data.long", "data.pretraining"}
    assert asked <= known


@pytest.mark.parametrize(
    ("items", "keys"),
    [
        (["a.b=1", "++c.d=2", "+e=3"], ["a.b", "c.d", "e"]),
        (["eval={every: 5, guard: {loss: 0.1}}", "data.mix={}"], ["eval.every", "eval.guard.loss"]),
        (["data.mix.sources=[{path: x}]", "name='{a'"], ["data.mix.sources", "name"]),
    ],
)
def test_keys_that_are_typed_are_told_apart_from_their_values(items, keys):
    assert list(typed_keys(items)) == keys


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("trainer.val_every_tokens=2048", "trainer.val_every_tokens=2048: has no effect: data.validation names no set"),
        ("trainer={val_every_tokens: 2048}", "trainer.val_every_tokens=2048: has no effect: data.validation names no set"),
        ("trainer.val_every_tokens=0", None),
    ],
)
def test_an_interval_between_validations_needs_a_set(typed, says):
    overrides = ["recipe=tiny_cpu_base", "data.validation=[]", typed]
    if says is None:
        assert without_effect(load_recipe(compose(overrides))) == []
        return
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert str(error.value).startswith(says)


def recipe(**parts):
    values = {
        "name": "a",
        "model": {"config": "LlamaConfig"},
        "data": {"mix": {"sources": [{"path": "p"}]}},
        "curriculum": {"stages": [{"until": 1.0, "seq_length": 8}], "tokens_per_step": 8, "total_tokens": 32},
    }
    return load_recipe(merged(values, parts))


def test_defaults_are_no_notes_and_what_a_recipe_says_in_vain_is_one():
    assert without_effect(recipe()) == []
    said = recipe(
        trainer={"val_every_tokens": 16}, optimizer={"schedule": "constant", "min_lr": 1e-6}, data={"test": VALIDATION}
    )
    found = without_effect(said)
    assert [line.partition(" has no effect: ")[0].partition("[{")[0] for line in found] == [
        "trainer.val_every_tokens=16",
        "data.test=",
        "optimizer.min_lr=1e-06",
    ]
    assert len(found[1].partition(" has no effect")[0]) == len("data.test=") + 60


def test_files_of_tuning_that_get_no_share_are_a_note_since_studies_name_them_for_every_row():
    values = {
        "name": "a",
        "restore_from": "base",
        "data": {"tokenizer": "t", "short": ["a"], "long": ["b"], "blend": {"short": 1.0}},
        "curriculum": {"stages": [{"until": 1.0, "seq_length": 8}], "tokens_per_step": 8, "total_tokens": 8},
    }
    refuse_idle(values, ["data.long"])
    assert [line.partition(":")[0] for line in without_effect(load_instruct_recipe(values))] == [
        "data.long=['b'] has no effect"
    ]


def test_intervals_beyond_the_run_are_notes_and_as_long_as_it_are_none():
    def intervals(tokens, steps):
        made = recipe(
            trainer={"val_every_tokens": tokens, "log_every_n_steps": steps},
            checkpoint={"every_tokens": tokens},
            eval={"tasks": TASKS, "every": steps},
            data={"validation": VALIDATION},
        )
        return [(key, value) for key, value, _ in beyond(made)]

    assert intervals(32, 4) == []
    keys = {"trainer.val_every_tokens": 40, "checkpoint.every_tokens": 40, "eval.every": 5, "trainer.log_every_n_steps": 5}
    assert dict(intervals(40, 5)) == keys
    assert list(beyond(recipe(trainer={"val_every_tokens": 40}))) == []
    assert without_effect(recipe(checkpoint={"every_tokens": 40}))[0] == (
        "checkpoint.every_tokens=40: the run has 32 tokens, so only the end is saved"
    )


def test_documents_too_few_for_the_guard_s_last_look_are_a_note():
    def notes(documents, every):
        task = {"kind": "position", "corpus": "held", "seq_length": 8, "documents": documents, "guard": True}
        return without_effect(recipe(eval={"tasks": [task], "every": every, "guard": {}}))

    assert notes(10, 1) == []
    assert [line.partition(", however")[0] for line in notes(8, 1)] == ["eval.guard: no change of position_8 on 8 documents"]
    assert "at the last of 4 looks; set documents=9 or more" in notes(8, 1)[0]
    assert notes(8, 2) == notes(8, 0) == []
