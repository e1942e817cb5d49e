"""`docs/families.md`: each family of transformers tried at tiny size through the commands, or the sentence that refuses it.

python docs/make_families.py            writes the table (some minutes)
python docs/make_families.py phi3       tries these alone and prints their rows
"""

import contextlib
import csv
import io
import json
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import read_config
from nemo_longctx.hf.families import DEFAULTS, WHY_NOT

PAGE = Path(__file__).parent / "families.md"
COLUMNS = ("import", "train", "guard", "eval", "export")
VOCABULARY, HEAD, TRAINED, LONG, FAR = 100, 16, 256, 512, 6000
# Tiny sizes, and what makes a family's layers differ.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "initializer_range": 0.08, "tie_word_embeddings": False,
    "max_position_embeddings": TRAINED, "rope_theta": 10_000.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MORE = {
    "mistral": {"sliding_window": 100},
    "qwen2": {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "phi3": {
        "original_max_position_embeddings": 128,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.2 * i for i in range(8)]},
    },
    "starcoder2": {"sliding_window": 100, "tie_word_embeddings": True},
}
# Options of a run, on a family that has them off: they come along in the export where a family of transformers says them.
OPTIONS = {
    "llama, model.no_rope_freq=4": ("llama", ["model.no_rope_freq=4"]),
    "mistral, model.window_size=[99,0]": ("mistral", ["model.window_size=[99,0]"]),
    "llama, rope.layers=full_attention": (
        "llama",
        ["rope=yarn", "rope.layers=full_attention", "model.window_size=[99,0]", "model.window_attn_skip_freq=4"],
    ),
}
# What no class of transformers can say: how its export is refused.
KEPT = {"llama, rope.layers=full_attention": "rope.layers='full_attention': no class of transformers"}
NOTES = {
    "llama, model.no_rope_freq=4": "each fourth layer without RoPE from this run on; exported as SmolLM3",
    "mistral, model.window_size=[99,0]": "a window from this run on; llama cannot say one, so export from it is refused",
    "llama, rope.layers=full_attention": "YaRN on layers that see all tokens, plain RoPE on those with a window (OLMo 3)",
    "llama": "Llama 1 to 3.3, Code Llama, Vicuna, ...",
    "mistral": "one window in every layer, or none",
    "qwen2": "Qwen2, Qwen2.5; windows from a layer on",
    "qwen3": "dense; windows from a layer on",
    "smollm3": "layers without RoPE; runs as NeMo's Llama",
    "phi3": "Phi-3, Phi-3.5, Phi-4 (mini: partial rotation is refused); no scaling of RoPE but LongRoPE",
    "starcoder2": "one window in every layer, or none",
}


def refused() -> dict[str, str]:
    """model_type -> why its `config.json` does not convert, for every family of which that is known."""
    reasons = {}
    for family in sorted(WHY_NOT):
        try:
            read_config({"model_type": family, **SIZES})
        except ConfigError as error:
            reasons[family] = error.mend.removeprefix("cannot be converted: ").partition("; the families that can")[0]
    return reasons


def source(family: str, folder: Path, more: dict) -> Path:
    """A small random model of transformers, its norms not one and its biases not zero, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name and "bias" not in name else 0.0, 0.2)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return folder


def corpus(folder: Path) -> Path:
    """Random documents of the vocabulary, longer than a window."""
    import numpy as np

    from nemo_longctx.data.writer import CorpusWriter

    rng = np.random.default_rng(0)
    with CorpusWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(8):
            writer.add_document(rng.integers(3, VOCABULARY, 2 * LONG))
    return folder / "corpus"


def command(*arguments: object) -> str:
    """What a command printed.

    Raises:
        RuntimeError: its status is not 0.
    """
    from nemo_longctx.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(list(map(str, arguments)))
        leave()
    if status:
        raise RuntimeError(printed.getvalue()[-1500:])
    return printed.getvalue()


def refused_with(said: str, *arguments: object) -> None:
    """Try a command that must refuse.

    Raises:
        RuntimeError: it does not, or for another reason.
    """
    try:
        command(*arguments)
    except RuntimeError as error:
        if said not in str(error):
            raise
        return
    raise RuntimeError(f"{arguments[0]} was not refused")


def leave() -> None:
    """No process group, generator or calculator of one run stays for the next one."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    get_cuda_rng_tracker().reset()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def attempt(name: str, folder: Path) -> dict[str, str]:
    """Import, three steps at twice the length under another base, evaluation, export: what came of each."""
    family, options = OPTIONS.get(name, (name, []))
    from nemo_longctx.adapters.megatron import cpu

    cpu.install()
    found = dict.fromkeys(COLUMNS, "no")
    here = source(family, folder / "hf", {"sliding_window": None} if options else MORE.get(family, {}))
    tokens = corpus(folder)
    checkpoint, run, out = folder / "ckpt", folder / "runs" / family, folder / "out"
    command("import", here, checkpoint)
    found["import"] = "yes"
    command(
        "train", "recipe=tiny_cpu_long", f"name={family}", f"output_dir={folder / 'runs'}", f"restore_from={checkpoint}",
        f"data.mix.sources=[{{path: {tokens}}}]", f"data.tokenizer={here}", "data.validation=[]",
        f"data.cache_dir={folder / 'order'}", "eval=none", "trainer.val_every_tokens=0", "optimizer.warmup_tokens=0",
        f"curriculum.stages=[{{until: 1.0, seq_length: {LONG}, micro_batch_size: 1}}]", f"curriculum.tokens_per_step={LONG}",
        f"curriculum.total_tokens={3 * LONG}", "checkpoint.every_tokens=0", *options,
    )  # fmt: skip
    found["train"] = "yes"
    found["guard"] = "yes" if json.loads((run / "results" / "settings.json").read_text())["verified"] else "no"
    if name in KEPT:
        refused_with(KEPT[name], "export", run, out)
    else:
        command("export", run, out, "--max-position-embeddings", FAR, "--verify-tokens", LONG)
        found["export"] = f"yes, {far_difference(run, out):.0e}"
    suite = folder / "suite.yaml"
    suite.write_text(f"tasks: [{{kind: position, corpus: {tokens}, seq_length: {LONG}, documents: 2, bins: 2}}]\n")
    command("eval", run, *([] if name in KEPT else [out]), "--suite", suite, "--out", folder / "evaluation")
    with (folder / "evaluation" / f"loss_by_position_{LONG}.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    half = len(losses) // 2
    same = (
        all(0 < loss < 10 for loss in losses)
        if name in KEPT
        else half and max(abs(a - b) for a, b in zip(losses[:half], losses[half:], strict=True)) < 1e-4
    )
    found["eval"] = "yes" if same else f"no: {losses}"
    return found


def far_difference(run: Path, out: Path) -> float:
    """Largest difference of two logits at the last of `FAR` positions, NeMo's against transformers', fp32.

    Raises:
        RuntimeError: it is not below 1e-4 of the largest logit (or of 1).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_longctx.adapters.nemo.checkpoint.load import load_model

    module, _, _ = load_model(run)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(0, VOCABULARY, (1, FAR), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, logits_to_keep=500).logits
        ours = module.float()(ids, torch.arange(FAR)[None], None)[:, -500:, :VOCABULARY]
    leave()
    worst = float((ours - expected).abs().max())
    if not worst < 1e-4 * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"logits differ by {worst}")
    return worst


def tried(family: str) -> dict[str, str]:
    """`attempt` in a folder of its own; a failure is written into the first cell that has no yes."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return attempt(family, Path(folder))
        except Exception:
            print(family, traceback.format_exc()[-3000:], file=sys.stderr)
            return dict.fromkeys(COLUMNS, "FAILED")


def row(family: str, cells: dict[str, str]) -> str:
    """A line of the table."""
    return f"| `{family}` | " + " | ".join(cells[column] for column in COLUMNS) + f" | {NOTES.get(family, '')} |"


def page(cells: dict[str, dict[str, str]]) -> str:
    """The whole page."""
    lines = [
        "# Families", "",
        "What `nemo-longctx import` and `export` do with each `model_type` of a Hugging Face `config.json`. Made by",
        "`python docs/make_families.py`: a random model of four layers is imported, trained for 3 steps at twice its length",
        f"under RoPE base 500,000, exported at {FAR:,} tokens and evaluated in both forms, in fp32 on a CPU. The figure beside",
        "an export is the largest difference of two logits among the last 500 positions, NeMo's against transformers'.", "",
        "| model_type | " + " | ".join(COLUMNS) + " | |", "|" + " --- |" * (len(COLUMNS) + 2),
        *(row(family, cells[family]) for family in cells), "",
        "No to all five, in one sentence before NeMo is started:", "", "| model_type | why |", "| --- | --- |",
        *(f"| `{family}` | {why} |" for family, why in refused().items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(families: list[str]) -> int:
    """Try families; all of them make the page."""
    cells = {}
    for family in families or (*DEFAULTS, *OPTIONS):
        cells[family] = tried(family)
        print(row(family, cells[family]), flush=True)
    if not families:
        PAGE.write_text(page(cells), encoding="utf-8")
    return int(any("FAILED" in each.values() for each in cells.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
