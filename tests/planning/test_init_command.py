"""`nemo-longctx init`: the recipe that it writes composes, says what was decided, and a wrong flag is one sentence."""

import json
import shlex

import pytest

from nemo_longctx.cli import main
from nemo_longctx.compose import compose
from nemo_longctx.planning.starter import learning_rate
from nemo_longctx.recipe import load_recipe

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "rope_theta": 10_000.0,
}  # fmt: skip
SEVEN_B = LLAMA | {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, config in (("tiny_hf", LLAMA), ("seven_hf", SEVEN_B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a book")
    return tmp_path


def recipe_of(file, *overrides):
    return load_recipe(compose([f"recipe={file}", *overrides]))


def test_a_laptop_s_recipe_is_whole(folder, capsys):
    assert main(["init", "--checkpoint", "tiny_hf", "--target", "1024", "--data", "books"]) == 0
    recipe = recipe_of("tiny_hf_1024.yaml")
    assert recipe.name == "tiny_hf_1024"
    assert recipe.seq_length == 1024
    assert recipe.rope_variant.base == 500_000.0
    assert recipe.restore_from == "checkpoints/tiny_hf"
    assert 0 < recipe.optimizer.warmup_tokens < recipe.curriculum.total_tokens
    assert [each.seq_length for each in recipe.data.validation] == [1024, 256]
    assert recipe.trainer.accelerator == "cpu"
    assert "A laptop's minutes: enough to see it work" in (folder / "tiny_hf_1024.yaml").read_text()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said[said.index("next:") + 1 :]] == ["import", "prepare", "train"]


def test_a_checkpoint_s_scaling_that_the_recipe_replaces_is_said(folder):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    (folder / "tiny_hf" / "config.json").write_text(json.dumps(LLAMA | {"rope_scaling": scaling}))
    assert main(["init", "--checkpoint", "tiny_hf", "--target", "1024", "--data", "books"]) == 0
    assert (
        "# The checkpoint's RoPE is yarn (factor 4 from 64 tokens), whose place this takes"
        in (folder / "tiny_hf_1024.yaml").read_text()
    )
    assert recipe_of("tiny_hf_1024.yaml").rope_variant.variant == "abf"


def test_a_cluster_s_recipe_has_the_planner_s_layout(folder, capsys):
    argv = ["init", "--checkpoint", "seven_hf", "--target", "32768", "--data", "books", "--gpus", "64", "--name", "run7"]
    assert main(argv) == 0
    recipe = recipe_of("run7.yaml")
    assert (recipe.trainer.world_size, recipe.trainer.precision, recipe.optimizer.distributed) == (64, "bf16-mixed", True)
    assert recipe.curriculum.tokens_per_step == 4_194_304
    assert recipe.optimizer.lr == pytest.approx(2e-5, rel=0.05)
    assert "GiB a GPU" in capsys.readouterr().out
    assert recipe.trainer.accelerator == "gpu"
    assert "the paper spent 400 B." in (folder / "run7.yaml").read_text()


def test_names_with_spaces_are_quoted_where_a_shell_or_yaml_reads_them(folder, capsys):
    (folder / "tiny_hf").rename(folder / "it's #1: a model")
    (folder / "books").rename(folder / "my books")
    assert main(["init", "--checkpoint", "it's #1: a model", "--target", "512", "--data", "my books"]) == 0
    recipe = recipe_of("it's #1: a model_512.yaml")
    assert recipe.restore_from == "checkpoints/it's #1: a model"
    said = capsys.readouterr().out.splitlines()
    imported, prepared, trained = [shlex.split(line) for line in said[said.index("next:") + 1 :]]
    assert imported == ["nemo-longctx", "import", "it's #1: a model", "checkpoints/it's #1: a model"]
    assert prepared[2:5] == ["my books", "--output", recipe.data.mix.sources[0].path]
    assert trained[-1] == "recipe=it's #1: a model_512.yaml"


def test_a_cluster_s_line_starts_every_node(folder, capsys):
    argv = ["init", "--checkpoint", "seven_hf", "--target", "32768", "--data", "books", "--gpus", "64", "--name", "nodes"]
    assert main(argv) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line, comments=True)
    assert words[words.index("--nnodes") + 1] == words[words.index("--nproc-per-node") + 1] == "8"
    assert "on each of the 8 nodes" in line


def test_a_corpus_that_is_there_is_not_prepared_again(folder, capsys):
    (folder / "all.idx").touch()
    assert main(["init", "--checkpoint", "tiny_hf", "--target", "512", "--data", "all"]) == 0
    assert "prepare" not in capsys.readouterr().out
    recipe = recipe_of("tiny_hf_512.yaml")
    assert [source.path for source in recipe.data.mix.sources] == ["all"]
    assert not recipe.data.validation  # no all_holdout.idx beside it


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint", "tiny_hf", "--target", "256", "--data", "books"], "--target=256: the checkpoint is trained at 256"),
        (["--checkpoint", "nowhere", "--target", "512", "--data", "books"], "--checkpoint='nowhere': no checkpoint"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "nowhere"], "--data='nowhere': neither text nor"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "all.bin"], "--data='all.bin': give the prefix"),
        (["--checkpoint", "tiny_hf", "--target", "512"], "--data=None: missing"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "books", "--gpu", "a100"], "--gpu='a100': has no effect"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "books", "--gpus", "0"], "--gpus=0: must be 1 or more"),
        (["--checkpoint", "seven_hf", "--target", "32768", "--data", "books", "--gpus", "1"], "--gpus=1: no layout"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "books", "--gpus", "2", "--gpu", "cpu"], "'cpu': is no GPU"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "books", "--tokens", "0"], "--tokens=0: must be 1 or more"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "books", "--tokens", "-5"], "--tokens=-5: must be 1 or more"),
        (["--checkpoint", "tiny_hf", "--target", "512", "--data", "books", "--output", "a.txt"], "--output='a.txt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_flag_is_one_sentence(folder, argv, message, capsys):
    assert main(["init", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("*.yaml"))


def test_a_recipe_is_not_overwritten_unasked(folder, capsys):
    argv = ["init", "--checkpoint", "tiny_hf", "--target", "512", "--data", "books"]
    assert main(argv) == 0
    assert main(argv) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0


def test_learning_rates_are_the_paper_s_where_it_has_one():
    assert learning_rate(7_000_000_000) == 2e-5
    assert learning_rate(70_000_000_000) == 1e-5
    assert learning_rate(100_000) == 1e-3


def test_the_scaling_of_a_nemo_checkpoint_is_said(folder, capsys):
    """Its base alone was read: YaRN was replaced in silence."""
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512}
    context = {"config": sizes | {"seq_length": 256, "rotary_base": 10000}}
    yarn = {"variant": "yarn", "base": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    llama31 = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 64}
    ways = {
        "yarn (factor 4 from 64 tokens)": context | {"model_transform": {"rope": yarn}},
        "llama3 (factor 8 from 64 tokens)": {"config": context["config"] | llama31},
        "pi (factor 2)": {"config": context["config"] | {"seq_len_interpolation_factor": 2}},
        "": context,
    }
    (folder / "ckpt" / "context").mkdir(parents=True)
    for said, written in ways.items():
        (folder / "ckpt" / "context" / "model.yaml").write_text(json.dumps(written))
        assert main(["init", "--checkpoint", "ckpt", "--target", "1024", "--data", "books", "--force"]) == 0
        recipe, printed = (folder / "ckpt_1024.yaml").read_text(), capsys.readouterr().out
        assert (f"# The checkpoint's RoPE is {said}, whose place this takes" in recipe) == bool(said)
        assert f"RoPE        {said and said + ', '}base 10000 -> " in printed
        assert " --tokenizer TOKENIZER " in printed
    (folder / "ckpt" / "context" / "tokenizer").mkdir()  # the line can be typed as it is
    assert main(["init", "--checkpoint", "ckpt", "--target", "1024", "--data", "books", "--force"]) == 0
    assert " --tokenizer ckpt/context/tokenizer " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--target", "4GiB"], "--target=4294967296: is longer than any context: 16,777,216 tokens at most"),  # took hours
        (["--name", "a/b"], "--name='a/b': is a folder's name below output_dir"),  # train refused what init wrote
        (["--checkpoint", "tiny_hf/config.json"], "is a file; give the directory that it lies in: tiny_hf"),
        (["--checkpoint", "owner/model"], "if it is a model of the hub: hf download owner/model --local-dir HF_DIR"),
        (["--data", "corpora"], "this directory holds corpora/a and corpora/a_holdout"),
    ],
)
def test_what_the_recipe_could_not_be_trained_with_is_refused(folder, capsys, changed, said):
    (folder / "corpora").mkdir()
    for name in ("a", "a_holdout"):
        for end in ("bin", "idx"):
            (folder / "corpora" / f"{name}.{end}").touch()
    given = {"--checkpoint": "tiny_hf", "--target": "1024", "--data": "books"} | {changed[0]: changed[1]}
    assert main(["init", *(word for pair in given.items() for word in pair)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "windows"), [(64, 128), (24, 120), (192, 96), (256, 128), (96, 96)])
def test_the_step_s_windows_go_into_the_gpus(folder, gpus, windows):
    """128 windows cannot be shared by 3 copies: no layout of 24 GPUs was found."""
    argv = ["init", "--checkpoint", "seven_hf", "--target", "32768", "--data", "books", "--gpus", str(gpus)]
    assert main(argv) == 0
    assert recipe_of("seven_hf_32768.yaml").curriculum.tokens_per_step == windows * 32768


def test_what_was_decided_is_printed_and_what_was_not_given_is_asked_for(folder, capsys, monkeypatch):
    answers = {"checkpoint to extend (NeMo or Hugging Face directory): ": " tiny_hf ", "context to reach, tokens: ": "1024"}
    answers["text (files or folder), or the prefix of a prepared corpus: "] = "books"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answers.__getitem__)
    assert main(["init", "--name", "mine", "--tokens", "512Ki", "--output", "out.yml"]) == 0
    recipe = recipe_of("out.yml")
    said = capsys.readouterr().out.splitlines()
    steps, per_step = recipe.curriculum.total_steps, recipe.curriculum.tokens_per_step
    assert said[:2] == ["wrote out.yml", said[1]]
    assert said[1].startswith("  model       0.1 M parameters, trained at 256 tokens")
    assert said[2] == "  RoPE        base 10000 -> 500000"
    assert said[3] == f"  curriculum  {steps:,} steps of {per_step:,} tokens at 1,024"
    assert (recipe.name, recipe.curriculum.total_tokens) == ("mine", 512 * 1024)
    assert said[4:6] == ["next:", said[5]]
    assert recipe.data.mix.sources[0].path == "data/books"
    answers["context to reach, tokens: "] = "2Ki"  # as the option takes it
    assert main(["init", "--checkpoint", "tiny_hf", "--data", "books", "--name", "two"]) == 0
    assert "steps of 8,192 tokens at 2,048" in capsys.readouterr().out
    answers["context to reach, tokens: "] = "many"
    assert main(["init", "--checkpoint", "tiny_hf", "--data", "books"]) == 2
    assert "--target='many': must be a whole number of tokens" in capsys.readouterr().err
    argv = ["init", "--checkpoint", "tiny_hf", "--target", "512", "--data", "books", "--gpus", "1", "--name", "g"]
    assert main([*argv, "--gpu", "h200"]) == 0
    assert recipe_of("g.yaml").trainer.accelerator == "gpu"
    assert "  layout      " in capsys.readouterr().out
