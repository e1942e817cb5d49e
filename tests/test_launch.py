"""What a start says before it imports the host."""

import json

import pytest

from nemo_longctx import launch

TINY = ["recipe=tiny_cpu_long", "data.tokenizer=null", "eval=none"]


@pytest.fixture(autouse=True)
def no_host(monkeypatch):
    monkeypatch.delenv("NEMO_LONGCTX_DEBUG", raising=False)

    def fit(*_):
        raise AssertionError("the host would be imported")

    monkeypatch.setattr(launch, "fit_unless_finished", fit)


def checkpoint(folder, **config):
    """The context of a checkpoint of NeMo, as far as its sizes go."""
    (folder / "context").mkdir(parents=True)
    (folder / "weights").mkdir()
    leaves = [{"type": "leaf", "value": value, "paths": [f"<root>.model.config.{key}"]} for key, value in config.items()]
    (folder / "context" / "io.json").write_text(json.dumps({"objects": {"x": {"items": [[None, leaf] for leaf in leaves]}}}))
    (folder / "context" / "model.yaml").write_text("config: {}\n")
    return folder


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (["trainer.devices=2", "trainer.pipeline_model_parallel_size=2"], "pipeline_model_parallel_size=2: the 3 layers"),
        (["trainer.devices=4", "trainer.tensor_model_parallel_size=4"], "tensor_model_parallel_size=4: the 6 attention heads"),
    ],
)
def test_the_checkpoint_s_sizes_are_held_against_the_layout(tmp_path, monkeypatch, capsys, layout, said):
    monkeypatch.chdir(tmp_path)
    base = checkpoint(tmp_path / "base", num_layers=3, num_attention_heads=6, num_query_groups=6)
    assert launch.main([*TINY, f"restore_from={base}", *layout]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "layout", "said"),
    [
        ("llama2_7b", "trainer.pipeline_model_parallel_size=3", "the 32 layers must divide"),
        ("llama3_8b", "trainer.tensor_model_parallel_size=3", "the 32 attention heads must divide"),
    ],
)
def test_the_class_s_sizes_are_held_against_the_layout(capsys, model, layout, said):
    asked = [f"recipe={model}", f"model={model}", "restore_from=null", "rope=null", layout, "trainer.num_nodes=3"]
    asked += ["trainer.context_parallel_size=1", "trainer.sequence_parallel=false"]
    asked += ["trainer.tensor_model_parallel_size=1"] if "pipeline" in layout else []
    assert launch.main(asked) == 2
    assert said in capsys.readouterr().err


def test_a_base_that_is_not_there_is_named_at_once(tmp_path, capsys):
    assert launch.main([*TINY, f"restore_from={tmp_path / 'none'}"]) == 2
    assert "no finished NeMo checkpoint is there; make one with `nemo-longctx import" in capsys.readouterr().err
