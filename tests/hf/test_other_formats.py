"""Directories that are no Hugging Face model: each is told by its files, with the directory to give or what makes one."""

import json

import pytest
from hf_files import config_of

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import KEY
from nemo_longctx.hf.directory import check_directory
from nemo_longctx.hf.families import DEFAULTS, WHY_NOT, reason
from nemo_longctx.hf.other_formats import no_nemo_checkpoint


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "holds a LoRA adapter alone"),
        (["model-Q4_K_M.gguf"], r"holds a GGUF file \(model-Q4_K_M.gguf\)"),
        (["params.json", "consolidated.00.pth"], "holds Meta's own format"),
        (["params.json", "consolidated.safetensors", "tekken.json"], "holds Mistral's own format"),
        (["zero_to_fp32.py", "global_step10/x"], "holds a trainer's sharded state; .*zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/x"], "holds a trainer's sharded state; .*accelerate merge-weights"),
        (["model.safetensors.incomplete"], "holds a download that did not end"),
        (["onnx/model.onnx"], "holds ONNX's weights"),
    ],
)
def test_what_other_tools_write_is_named(tmp_path, names, message, configured):
    for name in [*names, *(["config.json"] if configured else [])]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config_of()) if name == "config.json" else "{}")
    with pytest.raises(ConfigError, match=message) as caught:
        check_directory(tmp_path)
    assert ("no config.json" in str(caught.value)) is not configured


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", "named model.fp16.safetensors, a variant"),
        ("pytorch_model-00001-of-00002.bin", "without pytorch_model.bin.index.json"),
        ("model-00001-of-00002.safetensors", "without model.safetensors.index.json"),
        ("weights.pt", "there is weights.pt"),
    ],
)
def test_weights_by_another_name_are_named(directory, name, message):
    folder = directory(files={name: "x"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=message) as caught:
        check_directory(folder)
    assert (caught.value.key, caught.value.value) == (KEY, str(folder))


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (["snapshots/abc/config.json", "refs/main"], "is a cache's entry of the hub; .*snapshots/abc$"),
        (["checkpoint-90/config.json", "checkpoint-500/config.json"], "is a trainer's output; .*checkpoint-500$"),
        (["merged/config.json"], "no config.json there, but in .*merged;"),
        (["weights/x", "context/io.json"], "is a NeMo checkpoint, which needs no import"),
        (["tokenizer_config.json"], "a tokenizer alone"),
    ],
)
def test_the_directory_to_give_is_named(tmp_path, capsys, inside, message):
    for name in inside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=message):
        check_directory(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--curriculum", "4096"]) == 2
    assert "Errno" not in capsys.readouterr().err


def test_init_generate_and_eval_name_it_too(tmp_path, capsys):
    """Before the host is imported, which would look for a NeMo checkpoint there."""
    from nemo_longctx.adapters.pretrained import check_source

    (tmp_path / "hub" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "hub" / "snapshots" / "abc" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"checkpoint=.*is a cache's entry of the hub; .*snapshots/abc$"):
        check_source(str(tmp_path / "hub"))
    assert main(["init", "--checkpoint", str(tmp_path / "hub"), "--target", "4096", "--data", str(tmp_path)]) == 2
    assert "is a cache's entry of the hub" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "x.gguf").write_text("")
    check_source(str(tmp_path / "run"))


def test_a_name_of_the_hub_is_told_how_to_be_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"hf download meta-llama/Llama-3.2-1B --local-dir DIR"):
        check_directory("meta-llama/Llama-3.2-1B")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a file; give the Hugging Face model directory"):
        check_directory(tmp_path / "config.json")


def test_no_mend_of_quantised_weights_where_the_family_is_refused(directory):
    """Who dequantised these would be refused again."""
    folder = directory("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ConfigError, match=r"it has experts.*attention sinks"):
        check_directory(folder)
    with pytest.raises(ConfigError, match=r"quantization=.*its weights are quantised"):
        check_directory(directory(quantization={"group_size": 64, "bits": 4}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava", "text_config": {"model_type": "mistral"}}, "its language model (mistral) can be by itself"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, "its language model (qwen2) can be by itself"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, "(ministral3): it scales queries"),
        ({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}}, "(gemma3n_text): its norms are of 1 +"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, "(qwen3_5_text): some of its layers are no"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "(llama4_text): it has experts"),
        ({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}}, "M-RoPE"),
        ({"text_config": {"model_type": "llama"}}, "it is multimodal; its language model (llama) can be by itself"),
        ({"model_type": "x", "vision_config": {}}, "it is multimodal"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "y"}}, "its code comes with the directory"),
        ({"model_type": "nemotron-nas", "auto_map": {"AutoConfig": "y"}}, "block_configs"),
    ],
)
def test_import_and_plan_give_the_same_reason(tmp_path, capsys, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for line in (["import", str(tmp_path), str(tmp_path.parent / "out")], ["plan", "--model", str(tmp_path)]):
        assert main(line) == 2
        assert message in capsys.readouterr().err


def test_language_models_of_transformers_convert_or_are_refused_with_a_reason_of_their_own():
    decoders = {
        "apertus", "arcee", "code_llama", "cohere2", "cwm", "deepseek_v3", "diffllama", "ernie4_5", "exaone4", "falcon_mamba",
        "gemma3n_text", "glm4", "gpt_oss", "granitemoehybrid", "helium", "hunyuan_v1_dense", "llama4_text", "minimax", "olmo3",
        "qwen3_next", "seed_oss", "smollm3", "vaultgemma", "xlstm",
    }  # fmt: skip
    assert not {each for each in decoders - set(DEFAULTS) if reason(each, {}) == "no converter knows it"}
    assert not set(WHY_NOT) & set(DEFAULTS)
    assert all("-" not in each and each == each.lower() for each in WHY_NOT)


def test_the_first_llamas_name_of_their_tokenizer_s_class():
    from nemo_longctx.hf.tokenizer import as_transformers_4

    assert as_transformers_4({"tokenizer_class": "LLaMATokenizer"})["tokenizer_class"] == "LlamaTokenizer"


def test_a_plain_phi_3_says_no_shorter_trained_length():
    """Its class would write 4,096, which tools that read the file take for a stretch from there."""
    from nemo_longctx.hf.config import family_rope, read_config
    from nemo_longctx.rope import Rope

    rope = Rope(base=250_000.0)
    keys = family_rope("phi3", rope, rope.to_hf(rotary_dim=16, max_position_embeddings=16_384))
    assert keys["original_max_position_embeddings"] == 16_384
    assert read_config(config_of("phi3") | keys | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}).variant == rope


def nemo_checkpoint(folder):
    for part in ("weights", "context"):
        (folder / part).mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none", "no finished NeMo checkpoint is there; make one with `nemo-longctx import HF_DIR CKPT`, or name another"),
        ("owner/name", "if it is a model of the hub: hf download owner/name --local-dir HF_DIR"),
        ("model.nemo", "is an archive of NeMo 1"),
        ("file.txt", "is a file; give the directory"),
        ("hf", "is a Hugging Face directory; make a NeMo checkpoint of it: nemo-longctx import hf CKPT"),
        ("models--a--b", "make a NeMo checkpoint of the model in it: nemo-longctx import models--a--b/snapshots/0f CKPT"),
        ("models--a--b/snapshots", "of the model in it: nemo-longctx import models--a--b/snapshots/0f CKPT"),
        ("ck/weights", "is a part of a checkpoint; give ck"),
        ("runs/a/checkpoints", "holds its checkpoints; give the run, runs/a, or runs/a/checkpoints/a--step=1-last"),
        ("runs", "holds runs; give the run, runs/a, or runs/a/checkpoints/a--step=1-last"),
        ("best", "holds checkpoints, none of them a run's last; give one, such as best/checkpoints/b--step=1"),
        ("bare", "is a run without a finished checkpoint; no finished NeMo checkpoint is there"),
        ("checkpoints", "holds checkpoints, none of them a run's last; give one, such as checkpoints/imported"),
        ("gguf", "has no config.json and holds a GGUF file"),
    ],
)
def test_what_is_no_nemo_checkpoint_is_told_with_what_to_give(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    for folder in ("hf", "models--a--b/snapshots/0f"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    for folder in ("ck", "runs/a/checkpoints/a--step=1-last", "best/checkpoints/b--step=1", "checkpoints/imported"):
        nemo_checkpoint(tmp_path / folder)
    for file in ("model.nemo", "file.txt", "gguf/m.gguf", "bare/checkpoints/x"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert said in no_nemo_checkpoint(given)
