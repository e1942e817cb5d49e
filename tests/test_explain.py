"""`--print-config` and `--dry-run`: what a run would be, without the host."""

import subprocess
import sys

import numpy as np
import pytest
import yaml

from nemo_longctx import dry_run
from nemo_longctx.cli import main
from nemo_longctx.compose import compose, groups
from nemo_longctx.config import ConfigError
from nemo_longctx.data import vocabulary
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.explain import explained, sources_of
from nemo_longctx.recipe import load_instruct_recipe, load_recipe
from nemo_longctx.resume import plain

TINY = [
    "recipe=tiny_cpu_base", "curriculum.total_tokens=40960", "optimizer.warmup_tokens=2048", "trainer.val_every_tokens=0",
    "checkpoint.every_tokens=0", "data.tokenizer=null", "eval=none",
]  # fmt: skip


@pytest.mark.parametrize("recipe", groups()["recipe"])
def test_what_is_printed_is_the_run_that_was_asked_for(recipe):
    values = yaml.safe_load(explained([f"recipe={recipe}"]))
    assert plain(load_recipe(values)) == plain(load_recipe(compose([f"recipe={recipe}"])))


def test_each_value_says_where_it_comes_from():
    text = explained(["recipe=tiny_cpu_long", "rope=yarn", "optimizer.beta1=0.8"])
    said = {line.partition("#")[0].strip(): line.rpartition("#")[2].strip() for line in text.splitlines() if "#" in line}
    assert said["variant: yarn"] == "conf/rope/yarn.yaml"
    assert said["beta1: 0.8"] == "command line"
    assert said["lr: 0.002"] == "conf/recipe/tiny_cpu_long.yaml"
    assert said["accelerator: cpu"] == "conf/trainer/cpu.yaml"
    assert said["weight_decay: 0.1"] == "default"


def test_instruction_tuning_is_looked_at_by_the_same_words(tmp_path, capsys):
    asked = ["data.tokenizer=x", "restore_from=y", "data.short=[a.jsonl]", "data.long=[b.jsonl]", f"output_dir={tmp_path}"]
    assert main(["sft", "--print-config", *asked]) == 0
    lines = {line.partition(":")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["stages"].endswith("# conf/sft.yaml")
    assert lines["prompt_loss_weight"].endswith("# conf/sft/self_instruct_prompt_loss.yaml")
    assert main(["sft", "--dry-run", *asked]) == 2
    out = capsys.readouterr().out
    assert "data.short='a.jsonl': no such file" in out
    assert "restore_from='y': no finished NeMo checkpoint" in out
    assert "data.template" not in out
    assert main(["sft", "--dry-run", *asked, "data.template=chatml"]) == 2
    assert "data.template='chatml': no such file; set tokenizer, llama2, or the path of a Jinja file" in capsys.readouterr().out


def test_hydra_s_word_prints_the_settings(capsys):
    assert main(["train", "recipe=tiny_cpu_base", "--cfg", "job"]) == 0
    assert capsys.readouterr().out == explained(["recipe=tiny_cpu_base"])


def test_a_user_s_own_recipe_is_a_source(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [tiny_cpu_base, _self_]\nname: mine\noptimizer: {lr: 0.5}\n")
    sources = sources_of([f"recipe={mine}"])
    assert sources["optimizer.lr"] == sources["name"] == str(mine)
    assert sources["optimizer.min_lr"] == "conf/recipe/tiny_cpu_base.yaml"


@pytest.fixture
def corpus(tmp_path):
    with CorpusWriter(str(tmp_path / "all"), np.uint16) as writer:
        for _ in range(70):
            writer.add_document(np.arange(700) % 512)
    return tmp_path / "all"


def test_a_dry_run_tells_what_would_be_read_and_written(corpus, tmp_path):
    recipe = load_recipe(compose([*TINY, f"output_dir={tmp_path / 'runs'}", f"data.mix.sources=[{{path: {corpus}}}]",
                                  f"data.validation=[{{name: v, path: {corpus}, seq_length: 256}}]"]))  # fmt: skip
    checked = dry_run.check(recipe)
    assert not checked.errors
    text = "\n".join(checked.lines)
    assert "70 documents: all 100.0%" in text
    assert "v: 191 of 191 windows of 256 tokens, 70 documents" in text
    assert "M parameters, from random weights" in text
    assert "GiB free, two checkpoints take" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_names_all_that_is_missing_at_once(tmp_path):
    recipe = load_recipe(compose([*TINY, f"output_dir={tmp_path}", f"restore_from={tmp_path / 'no_checkpoint'}",
                                  f"data.mix.sources=[{{path: {tmp_path / 'nothing'}}}]", "data.validation=[]"]))  # fmt: skip
    keys = [error.key for error in dry_run.check(recipe).errors]
    assert "restore_from" in keys
    assert len(keys) == 2


def looked(*overrides):
    checked = dry_run.check(load_recipe(compose([*TINY, *overrides])))
    return "\n".join(checked.lines)


def test_a_dry_run_says_what_the_start_would(corpus, tmp_path):
    mine = f"data.mix.sources=[{{path: {corpus}}}]"
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file; name a directory" in looked(mine, "data.validation=[]", f"output_dir={file}")
    assert "data.tokenizer='a/b/c': no such directory" in looked(mine, "data.validation=[]", "data.tokenizer=a/b/c")
    after = looked(mine, "data.validation=[]", "data.tokenizer=null", "data.after=nowhere")
    assert "data.after='nowhere': no finished NeMo checkpoint is there" in after
    ids = looked(mine, "data.validation=[]", "data.tokenizer=null", "model.vocab_size=2")
    assert "the model's vocabulary has 2 (model.vocab_size)" in ids
    long = looked(mine, f"data.validation=[{{name: h, path: {corpus}, seq_length: 1000000}}]")
    assert "a window and its last label need 1000001; set it lower" in long


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_a_start_compares_corpora_with_the_tokenizer_of_its_base(corpus, tmp_path, monkeypatch, verb):
    base, asked = tmp_path / "base", []
    for folder in ("weights", "context"):
        (base / folder).mkdir(parents=True)
    (base / "context" / "model.yaml").write_text("config: {}")
    files = ["data.short=[a]", "data.long=[a]", "trainer=cpu", "name=x"]
    files += [f"data.pretraining={{sources: [{{path: {corpus}}}]}}", "data.blend={short: 0.4, long: 0.4, pretraining: 0.2}"]
    more = files if verb == "sft" else [*TINY, f"data.mix.sources=[{{path: {corpus}}}]", "data.validation=[]"]
    load, name = (load_instruct_recipe, "sft") if verb == "sft" else (load_recipe, "config")
    recipe = load(compose([*more, f"restore_from={base}", "data.tokenizer=t"], config_name=name))
    monkeypatch.setattr(vocabulary, "not_the_base_s", lambda *args: asked.append(args) or "another")
    assert dry_run.notes(recipe) == ["another"]
    assert asked == [(base, [str(corpus)], "t")]

    def refused(*args):
        raise ConfigError("corpus", "x", "not there")

    monkeypatch.setattr(vocabulary, "not_the_base_s", refused)
    assert dry_run.notes(recipe) == []


def test_text_that_is_measured_and_trained_on_is_told(corpus):
    two = f"data.mix.sources=[{{path: {corpus}, name: a}}, {{path: {corpus}/, name: b}}]"
    sets = [
        f"data.{kind}=[{{name: {name}, path: {corpus}, seq_length: 8, samples: 3}}]"
        for kind, name in (("validation", "h"), ("test", "t"))
    ]
    said = looked(two, *sets, "data.tokenizer=null")
    assert "the sources a and b are one corpus" in said
    assert "the validation set h is trained on" in said
    assert "the test set t is trained on" in said
    assert "h: 3 of " in said
    assert "note" not in looked(f"data.mix.sources=[{{path: {corpus}}}]", "data.validation=[]", "data.tokenizer=null")


def test_a_dry_run_needs_neither_torch_nor_the_host(corpus):
    code = (
        "import sys\nfrom nemo_longctx import dry_run\nfrom nemo_longctx.compose import compose\n"
        "from nemo_longctx.recipe import load_recipe\n"
        "print(dry_run.check(load_recipe(compose(sys.argv[1:]))).lines)\n"
        "heavy = {'torch', 'nemo', 'megatron', 'lightning', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    argv = [*TINY, f"data.mix.sources=[{{path: {corpus}}}]", "data.validation=[]"]
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_the_command_looks_without_training(corpus, tmp_path, capsys):
    argv = [*TINY, f"output_dir={tmp_path / 'runs'}", f"data.mix.sources=[{{path: {corpus}}}]", "data.validation=[]"]
    assert main(["train", "--dry-run", *argv]) == 0  # argparse takes the first override for the option's value
    assert main(["train", *argv, "--dry-run"]) == 0
    assert main(["train", *argv, "--print-config"]) == 0
    assert "# command line" in capsys.readouterr().out
    assert main(["train", *argv, "data.mix.sources=[{path: nowhere}]", "--dry-run"]) == 2
    assert "ERROR" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_rehearsal_is_one_step_of_each_stage_in_a_place_of_its_own(tmp_path):
    recipe = load_recipe(compose([*TINY[:1], "curriculum=256_to_2048_at_50", f"output_dir={tmp_path}", "eval=none"]))
    with dry_run.rehearsal(recipe) as cut:
        assert [(stage.first_step, stage.end_step, stage.seq_length) for stage in cut.curriculum.plan] == [
            (0, 1, 256),
            (1, 2, 2048),
        ]
        place = cut.directory
        assert place.parent.parent == tmp_path
        assert place.is_dir()  # its lock is there: no other dry run takes it for left behind
    assert not place.exists()
    assert not list(tmp_path.iterdir())
