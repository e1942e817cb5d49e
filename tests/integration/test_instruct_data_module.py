"""`LongInstructDataModule` in NeMo's place for data: its windows, its checkpoint state, and what it refuses."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_longctx.adapters.nemo.data.datasets import collate
from nemo_longctx.adapters.nemo.data.instruct_data_module import LongInstructDataModule
from nemo_longctx.config import ConfigError
from nemo_longctx.data.sft_instances import LLAMA2_CHAT_TEMPLATE
from nemo_longctx.data.tokenization import train_bpe
from nemo_longctx.data.writer import CorpusWriter

SEQ, STEPS = 96, 6
ANSWERS = {"short": "It is {}.", "long": "Captain Harrow said {}."}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a tokenizer, conversations and a corpus."""
    folder = tmp_path_factory.mktemp("instruct")
    train_bpe(
        [f"What did the captain say about {i}? It is {i * i}. " * 4 for i in range(300)], 400, str(folder / "tokenizer"), {}
    )
    for name, words in (("short", 2), ("long", 20)):
        rows = [[("user", "captain " * words + f"{i}?"), ("assistant", ANSWERS[name].format(i))] for i in range(20)]
        lines = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with CorpusWriter(str(folder / "corpus"), np.uint16) as writer:
        for number in range(20):
            writer.add_document(np.random.default_rng(number).integers(5, 300, 200))
    return folder


def module(files, **changes):
    settings = {
        "curriculum": {
            "stages": [{"until": 1.0, "seq_length": SEQ, "micro_batch_size": 2}],
            "tokens_per_step": 4 * SEQ,
            "total_tokens": STEPS * 4 * SEQ,
        },
        "tokenizer": str(files / "tokenizer"),
        "cache_dir": str(files / "cache"),
        "short": [str(files / "short.jsonl")],
        "long": [str(files / "long.jsonl")],
        "pretraining": {"sources": [{"path": str(files / "corpus")}], "share_tolerance": 0.9},
        "blend": {"short": 0.4, "long": 0.4, "pretraining": 0.2},
        "template": "llama2",
        "prompt_loss_weight": 0.5,
        "num_workers": 0,
    }
    return LongInstructDataModule(**(settings | changes))


def test_ids_of_pretraining_text_beyond_the_vocabulary_are_named(files, monkeypatch):
    monkeypatch.setattr(LongInstructDataModule, "_vocab_size", 250)
    windows = module(files).open_windows()
    numbers = [number for number in range(len(windows)) if windows.source(number) == "pretraining"]
    with pytest.raises(ConfigError, match=r"document \d+ holds the token id 2\d\d, the model's vocabulary has 250"):
        [windows[number] for number in numbers]


def test_windows_hold_the_conversations_as_they_are_asked_and_answered(files):
    data = module(files)
    windows, tokenizer = data.open_windows(), data.hf_tokenizer
    assert len(windows) == 4 * STEPS
    assert data.chat_template == LLAMA2_CHAT_TEMPLATE
    kinds = {windows.source(number): windows[number] for number in range(len(windows))}
    assert set(kinds) == {"short", "long", "pretraining"}
    for name in ("short", "long"):
        sample, seen = kinds[name], []
        edges = sample["cu_seqlens"].tolist()
        for begin, end in itertools.pairwise(edges):
            mask, labels = sample["loss_mask"][begin:end], sample["labels"][begin:end]
            if mask.any():
                seen.append(tokenizer.decode(labels[mask == 2]))
        assert all(text.endswith(f". {tokenizer.eos_token}") for text in seen)
        assert seen[0].strip().startswith(ANSWERS[name].split("{")[0].strip())
        assert (len(seen) > 1) == (name == "short")  # packed, or one a window
        assert (1.0 in sample["loss_mask"]) == (name == "long")  # half a long prompt's loss, none of a short one's
    assert (kinds["pretraining"]["loss_mask"] == 2).all()
    batch = collate([kinds["short"], kinds["long"]])
    assert batch["tokens"].shape == (2, SEQ)
    assert batch["cu_seqlens"][0, -1] == 2 * SEQ


def test_a_checkpoint_goes_on_at_its_address_and_refuses_other_data(files, monkeypatch):
    def restored(**changes):
        data = module(files, **changes)
        monkeypatch.setattr(type(data.data_sampler), "data_parallel_size", 1)
        data.open_windows()
        data.load_state_dict(state)
        return data

    first = module(files)
    first.trainer = SimpleNamespace(global_step=3)
    first.open_windows()
    state = first.state_dict()
    assert state["token_address"] == 3 * 4 * SEQ
    assert restored().data_sampler.start_token == 3 * 4 * SEQ
    for name, value in {"prompt_loss_weight": 1.0, "seed": 5, "blend": {"short": 1.0}}.items():
        with pytest.raises(ConfigError, match=f"data.{name}.* changed since the checkpoint at 1152 tokens"):
            restored(**{name: value})
    went_on = restored(prompt_loss_weight=1.0, allow_change=True)
    assert went_on.history[0]["changed"] == ["data.prompt_loss_weight"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": "nowhere/tokenizer"}, r"data\.tokenizer='nowhere/tokenizer'"),
        ({"short": ["nowhere.jsonl"]}, r"data\.short='nowhere\.jsonl': no such file"),
        ({"long": []}, r"data\.long.*40%"),
        ({"pretraining": None}, r"data\.pretraining.*20%"),
        ({"template": "tokenizer"}, "this tokenizer has none"),
        ({"blend": {"shrot": 1.0}}, "did you mean 'short'"),
        (
            {"curriculum": {"stages": [{"until": 0.5, "seq_length": 96}, {"until": 1.0, "seq_length": 192}],
                            "tokens_per_step": 384, "total_tokens": 3840}},
            "one stage",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(files, changes, said):
    with pytest.raises(ConfigError, match=said):
        module(files, **changes).open_windows()


def test_a_loss_that_would_weigh_micro_batches_alike_is_refused():
    with pytest.raises(ConfigError, match="calculate_per_token_loss"):
        LongInstructDataModule._check_loss(SimpleNamespace(calculate_per_token_loss=False))
