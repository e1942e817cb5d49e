"""Recipes compose from conf/, each of them, and a wrong setting is refused before any work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_longctx.compose import compose, groups
from nemo_longctx.config import ConfigError
from nemo_longctx.recipe import OptimizerConfig, load_recipe

EXAMPLE = Path(__file__).parent.parent / "examples" / "megatron_gpt_continual.py"


def recipe(*overrides):
    return load_recipe(compose(overrides))


def test_every_recipe_composes():
    names = groups()["recipe"]
    assert {"tiny_cpu_base", "tiny_cpu_long"} <= set(names)
    for name in names:
        made = recipe(f"recipe={name}", *([] if name.startswith("tiny") else ["restore_from=somewhere"]))
        assert made.name
        assert made.curriculum.total_steps > 0


def test_every_rope_choice_is_one_word():
    for name in groups()["rope"]:
        if name == "dynamic_ntk":
            with pytest.raises(ConfigError, match="evaluation only"):
                recipe("recipe=tiny_cpu_long", f"rope={name}")
        else:
            assert recipe("recipe=tiny_cpu_long", f"rope={name}").rope_variant is not None


@pytest.mark.parametrize("name", ["qwen25_7b", "mistral_7b", "llama3_8b"])
@pytest.mark.parametrize("rope", ["pi", "abf"])
def test_every_recipe_takes_every_rope_choice(name, rope):
    """A recipe leaves no numbers of its own variant behind for another one."""
    assert recipe(f"recipe={name}", f"rope={rope}").rope_variant.variant == rope


def test_without_rope_the_checkpoint_keeps_its_own():
    assert recipe("recipe=tiny_cpu_long", "rope=null").rope_variant is None
    assert recipe("restore_from=somewhere", "model=from_checkpoint").rope_variant is None


def test_null_takes_a_group_away():
    assert recipe("recipe=tiny_cpu_long", "eval=null").eval is None
    for group, message in (("data", "data=None: missing"), ("recipe", "recipe=None: name one"), ("model", "model=None: null")):
        with pytest.raises(ConfigError, match=message):
            recipe("recipe=tiny_cpu_base", f"{group}=null")
    with pytest.raises(ConfigError, match=r"rope.base='5': rope=null leaves none of it"):
        recipe("recipe=tiny_cpu_long", "rope=null", "rope.base=5")


def test_overrides_reach_the_schema():
    made = recipe("recipe=tiny_cpu_long", "rope=abf", "rope.base=123456", "optimizer.lr=0.01", "seed=7")
    assert made.rope_variant.base == 123456
    assert made.optimizer.lr == 0.01
    assert made.seed == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.learning_rate=1e-4"], "optimizer.learning_rate"),
        (["optimizr.lr=1e-4"], "did you mean 'optimizer'"),
        (["recipe=tiny_cpu_lnog"], "did you mean 'tiny_cpu_long'"),
        (["rope=abff"], "did you mean 'abf'"),
        (["optimizer.lr=-1"], "optimizer.lr=-1"),
        (["trainer.accelerator=tpu"], "trainer.accelerator='tpu': set cpu or gpu"),
        (["optimizer.lr=1e-4", "optimizer.min_lr=1.1e-4"], "optimizer.min_lr=0.00011: set it between 0 and optimizer.lr"),
        (["optimizer.min_lr=-1e-9"], "optimizer.min_lr=-1e-09: set it between 0 and optimizer.lr"),
        (["nonsense"], "write key=value"),
        (["recipes=tiny_cpu_base"], "recipes='tiny_cpu_base': unknown key, did you mean 'recipe'?"),
        (["lr=1e-4"], "lr=0.0001: unknown key, did you mean 'optimizer.lr'?"),
        (["trainer.lr=1e-4"], "trainer.lr=0.0001: unknown key, did you mean 'optimizer.lr'?"),
        (["trainer.weight_decay=0"], "trainer.weight_decay=0: unknown key, did you mean 'optimizer.weight_decay'?"),
        (["model.lr=1"], "model.lr=1: no field of the host's config classes, did you mean 'optimizer.lr'?"),
        (["model.seed=1"], "model.seed=1: no field of the host's config classes, did you mean 'seed'?"),
        (["rope.lr=1"], "rope.lr=1: unknown key, did you mean 'optimizer.lr'?"),
        (["data.restore_from=a"], "data.restore_from='a': unknown key, did you mean 'restore_from'?"),
        (["checkpoint.keep_best=1"], "checkpoint.keep_best=1: unknown key, did you mean 'keep_last'?"),
        (["checkpoint.total_tokens=1M"], "checkpoint.total_tokens='1M': unknown key, did you mean 'curriculum.total_tokens'?"),
        (["data.sources=[a]"], "data.sources=['a']: unknown key, did you mean 'data.mix.sources'?"),
        (["seq_length=8"], "unknown key, did you mean 'curriculum.stages[0].seq_length' or 'data.test[0].seq_length' or"),
        (["curriculum.micro_batch_size=8"], "did you mean 'curriculum.stages[0].micro_batch_size'?"),
        (["name=" + "x" * 201], "at most 200 bytes"),
        (["output_dir=runs/" + "x" * 256], "is longer than a file system takes: at most 255 bytes"),
        (["restore_from=" + "x" * 256 + "/checkpoint"], "at most 255 bytes"),
        (["restore_from="], "restore_from='': names no place"),
        (["output_dir="], "output_dir='': names no place"),
        (["data.tokenizer="], "data.tokenizer='': names nothing"),
        (["data.cache_dir="], "data.cache_dir='': names nothing"),
        (["rope.base=1e300"], "rope.base=1e+300: must be at most 1e+15"),
        (["data.validation=[{name: a, path: [], seq_length: 8}]"], "data.validation.path=(): name a prefix"),
        (["eval.tasks=[{kind: probes, text: a, probes: {kinds: []}}]"], "probes.kinds=[]: name at least one"),
        (["curriculum.tokens_per_step=1024"], "curriculum.stages.seq_length=2048"),
        (["curriculum.stages=[{until: 1.0, seq_length: 2048, micro_batch_size: 3}]"], "micro_batch_size=3"),
        (["checkpoint.every_tokens=1000"], "the nearest is 8192"),
        (["trainer.devices=3", "trainer.tensor_model_parallel_size=2"], "must divide"),
        (["rope.factor=2"], "rope.factor"),
        (["trainer.precision=fp8"], "trainer.precision"),
        (["trainer.accelerator=gpu", "trainer.offload=half"], "trainer.offload='half'"),
        (["trainer.accelerator=gpu", "trainer.offload=block:0"], "trainer.offload='block:0'"),
        (["trainer.recompute=half"], "trainer.recompute='half'"),
        (["data.packing=bestfit"], "data.packing='bestfit': no such choice, did you mean 'best_fit'"),
        (["data.document_masking=no"], "data.document_masking='no': must be true or false"),
        (["data.document_masking=off"], "must be true or false"),
        (["data.allow_change=no"], "data.allow_change='no': must be true or false"),
        (["data.num_workers=-1"], "data.num_workers=-1"),
        (["data.mixx=1"], "data.mixx=1: unknown key, did you mean 'mix'"),
        (["data.mix.long_share=nan"], "finite number"),
        (["data.validation=5"], "data.validation=5: must be a list"),
        (["eval.every=-1"], "eval.every=-1"),
        (["eval.evry=1"], "eval.evry=1: unknown key"),
        (["eval.tasks=[{kind: position, corpus: a, seq_length: 4.5}]"], "seq_length=4.5: must be a whole number"),
        (["eval=paper"], "eval.tasks[0].corpus='???': missing; set it"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number"),
        (["optimizer.weight_decay=inf"], "optimizer.weight_decay=inf: must be a finite number"),
        (["name=a/b"], "name='a/b'"),
        (["seed=99999999999"], "seed=99999999999"),
        (["seed=[1"], "seed='[1'"),
        (["rope={variant: pi}", "rope=yarn"], "rope='yarn': rope={variant: pi} beside it would be laid over it"),
        (["hydra.run.dir=x"], "hydra.run.dir='x': has no effect: no job of Hydra's"),
        (["+seed=7"], "seed='7': it has a value already; write seed=7"),
        (["~foo"], "~foo=None: there is no such key to take away"),
        (["name=${name}"], "name='${name}': cannot be worked out: Recursive interpolation"),
        (["a..b=3"], "a..b='3': is no key: names with a dot between two of them, such as trainer.devices=2"),
        (["-x=3"], "-x='3': is no key"),
        (
            ["data.validation[0].samples=3"],
            "is no key: names with a dot between two of them, such as trainer.devices=2; an item",
        ),
        (["model.ünï=3"], "model.ünï='3': is no key"),
    ],
)
def test_wrong_settings_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe("recipe=tiny_cpu_long", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rope=abf"], "rope='abf': this command has no such group; write its keys: rope.NAME=VALUE"),
        (["recipe=llama2_7b"], "recipe='llama2_7b': this command has no such group: `nemo-longctx train` takes recipe=NAME"),
        (["sft=null"], "sft=None: name one: chat_baseline, "),
    ],
)
def test_what_tuning_has_no_group_for_is_told_with_its_form(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(overrides, config_name="sft")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output_dir: ${oc.env:NO_SUCH_PLACE}/x", "output_dir='${oc.env:NO_SUCH_PLACE}': no such environment variable"),
        ("data: {tokenizer: 'x${nope}'}", "data.tokenizer='${nope}': no setting has this name"),
        ("hydra: {run: {dir: x}}", "hydra={'run': {'dir': 'x'}}: has no effect: no job of Hydra's"),
        ("rope: abf", "rope='abf': holds keys of its own; a choice stands in a recipe's defaults: `- override /rope: abf`"),
        ("defaults: [tiny_cpu_base, override /ropes: yarn, _self_]", "override /ropes, which is no group: did you mean 'rope'"),
    ],
)  # fmt: skip
def test_what_a_recipe_of_one_s_own_says_wrong_is_told_by_its_key(tmp_path, monkeypatch, text, said):
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    file = tmp_path / "ü b.yaml"  # a file's name is not Hydra's to read
    file.write_text(text if text.startswith("defaults") else f"defaults: [tiny_cpu_base, _self_]\n{text}\n")
    with pytest.raises(ConfigError) as error:
        compose([f"recipe={file}"])
    assert said in str(error.value)
    if not text.startswith("defaults"):
        assert str(error.value).startswith(said)


def test_an_item_of_a_list_is_named_by_its_number():
    sets = compose(["recipe=tiny_cpu_base", "data.validation.1.samples=4"])["data"]["validation"]
    assert [each["samples"] for each in sets] == [128, 4]


def test_precision_follows_the_accelerator():
    """The same recipe trains in bf16 on a GPU by one word."""
    assert recipe("recipe=tiny_cpu_base").trainer.precision == "32"
    assert recipe("recipe=tiny_cpu_base", "trainer.accelerator=gpu").trainer.precision == "bf16-mixed"
    assert recipe("recipe=tiny_cpu_base", "trainer.precision=bf16-mixed").trainer.precision == "bf16-mixed"


def test_warmup_and_validation_are_counted_in_tokens():
    made = recipe("recipe=tiny_cpu_long")
    step = made.curriculum.tokens_per_step
    assert made.steps("x", 5 * step) == 5
    for key in ("optimizer.warmup_tokens", "trainer.val_every_tokens", "checkpoint.every_tokens"):
        recipe("recipe=tiny_cpu_long", f"{key}={3 * step}")
        for wrong, nearest in ((3 * step + 1, 3 * step), (4 * step - 1, 4 * step)):
            with pytest.raises(ConfigError, match=rf"{re.escape(key)}={wrong}: .*the nearest is {nearest}"):
                recipe("recipe=tiny_cpu_long", f"{key}={wrong}")


def test_the_rate_ends_where_it_began_at_most():
    made = OptimizerConfig(lr=1e-4, min_lr=1e-4)  # "constant" by another name
    assert made.min_lr == made.lr
    assert OptimizerConfig(lr=1e-4, min_lr=0.0).min_lr == 0


def test_the_script_says_what_is_wrong_in_one_sentence_and_helps():
    wrong = subprocess.run(
        [sys.executable, EXAMPLE, "recipe=tiny_cpu_base", "trainer.devicess=2"], capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: trainer.devicess=2: unknown key, did you mean 'devices'")
    assert "Traceback" not in wrong.stderr
    helped = subprocess.run([sys.executable, EXAMPLE, "--help"], capture_output=True, text=True, timeout=300)
    assert helped.returncode == 0
    assert "tiny_cpu_long" in helped.stdout
    assert "optimizer.lr  (number; default 2e-05)" in helped.stdout


def test_a_recipe_of_one_s_own_is_read_as_hydra_reads(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [tiny_cpu_long, _self_]\noptimizer: {lr: 1e-3, min_lr: 1e-4}\nrope: {base: 5e5}\n")
    made = recipe(f"recipe={mine}")
    assert (made.optimizer.lr, made.optimizer.min_lr, made.rope_variant.base) == (1e-3, 1e-4, 5e5)
    for text, said in (("name: a\nname: b\n", "duplicate key"), ("a: [", "is not YAML"), ("- a\n", "must be a mapping")):
        mine.write_text(text)
        with pytest.raises(ConfigError, match=said):
            recipe(f"recipe={mine}")


def test_a_setting_may_name_another_one():
    assert compose(["recipe=tiny_cpu_base", "seed=7", "output_dir=runs_${seed}"])["output_dir"] == "runs_7"
