"""Our `LM` against lm-eval's own Hugging Face backend: same weights, same tasks, every score equal."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from nemo_longctx.adapters.lm_eval import LongContextLM, command_line
from nemo_longctx.adapters.pretrained import load_checkpoint, tokenizer_digest
from nemo_longctx.config import ConfigError
from nemo_longctx.eval.hf import HFCausalModel

TEXT = [
    "The meeting began with a short report on the remote control, its colours, its price and the market it was meant for.",
    "Question: How many apples are left when four of the ten are eaten? Answer: six of them, and two were green.",
    "She walked along the river until the lamps were lit, and then she turned back towards the house on the hill.",
    "Which of these is a mineral? Water, granite, quartz, or wood. The answer that the book gives is quartz.",
]


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    return fast


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def theirs(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")


@pytest.fixture
def ours(model, tokenizer):
    return LongContextLM(HFCausalModel(model), tokenizer=tokenizer, read_chunk=17)


def instances(kind, rows):
    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


def test_log_likelihoods_are_equal(theirs, ours):
    stems = [text[:n] for text in TEXT for n in (0, 5, 40)] + [TEXT[0] + " ", TEXT[1] * 30]
    rows = [(stem, end) for stem in stems for end in (" quartz", " the house", "\n\nsix", "x", TEXT[2])]
    want, got = theirs.loglikelihood(instances("loglikelihood", rows)), ours.loglikelihood(instances("loglikelihood", rows))
    np.testing.assert_allclose([s for s, _ in got], [s for s, _ in want], atol=1e-4, rtol=1e-6)
    assert [g for _, g in got] == [g for _, g in want]
    # The long stem does not fit 512 tokens: both cut it from the left, and ours has it on record.
    assert {(record.policy, record.removed > 0) for record in ours.truncations} == {("left", True)}
    assert len(ours.truncations) == 5


def test_rolling_log_likelihoods_are_equal(theirs, ours):
    rows = [(TEXT[0],), (" ".join(TEXT) * 8,), (TEXT[2],), (TEXT[0],)]
    want = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", rows))
    got = ours.loglikelihood_rolling(instances("loglikelihood_rolling", rows))
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)


def test_generations_are_identical(theirs, ours):
    options = [{"until": ["\n\n"], "max_gen_toks": 20}, {"until": [" the", "e"], "max_gen_toks": 30}, {"max_gen_toks": 7}]
    rows = [(stem, dict(option)) for stem in (*TEXT, TEXT[0], TEXT[1] * 30, "a") for option in options]
    want = theirs.generate_until(instances("generate_until", rows))
    got = ours.generate_until(instances("generate_until", rows))
    assert got == want
    assert len(set(want)) > 5


def test_chat_template_and_names(theirs, ours):
    history = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.max_length == theirs.max_length


ROWS = {
    "arc/arc_easy.yaml": [
        {"id": str(i), "question": TEXT[i % 4][:60], "answerKey": "ABCD"[i % 4],
         "choices": {"text": ["water", "granite rock", "quartz", "wood"], "label": ["A", "B", "C", "D"]}}
        for i in range(6)
    ],
    "lambada/lambada_openai.yaml": [{"text": text.rstrip(".")} for text in TEXT],
    "wikitext/wikitext.yaml": [{"page": " = Title = \n\n " + text.replace(", ", " , ")} for text in TEXT],
    "gsm8k/gsm8k.yaml": [{"question": TEXT[1], "answer": f"They ate four. #### {n}"} for n in range(3)],
}  # fmt: skip


def evaluate(lm, file, tmp_path, **more):
    """Run lm-eval's own task file on local rows."""
    source = Path(lm_eval.__file__).parent / "tasks" / file
    name = yaml.load(source.read_text(encoding="utf-8").replace("!function", ""), yaml.SafeLoader)["task"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[file]), encoding="utf-8")
    splits = {split: str(data) for split in ("train", "validation", "test")}
    task = {"include": str(source), "task": f"local_{name}", "dataset_path": "json", "dataset_name": None}
    task["dataset_kwargs"] = {"data_files": splits, "cache_dir": str(tmp_path / "datasets")}
    (tmp_path / "tasks").mkdir(exist_ok=True)
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    tasks = manager.load([f"local_{name}"])["tasks"]
    for one in tasks.values():
        one.set_config("num_fewshot", more.pop("num_fewshot", 1))
        one.set_fewshot_seed(1234)
    return lm_eval.evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=True, **more)


@pytest.mark.parametrize("file", ROWS)
def test_real_tasks_give_equal_scores(theirs, ours, tmp_path, file):
    shots = {"num_fewshot": 0 if "wikitext" in file else 1}
    want, got = (evaluate(lm, file, tmp_path, **shots) for lm in (theirs, ours))
    ((name, scores),) = want["results"].items()
    metrics = {key: value for key, value in scores.items() if isinstance(value, float)}
    assert metrics
    for key, value in metrics.items():
        assert got["results"][name][key] == pytest.approx(value, rel=1e-5), key
    for a, b in zip(want["samples"][name], got["samples"][name], strict=True):
        assert a["prompt_hash"] == b["prompt_hash"]
        if "gsm8k" in file:
            assert a["resps"] == b["resps"]
        else:
            flat = [np.array(sample["filtered_resps"], dtype=object).flatten() for sample in (a, b)]
            np.testing.assert_allclose(flat[1].astype(float), flat[0].astype(float), atol=1e-4)


@pytest.mark.parametrize("multiturn", [True, False])
def test_chat_prompts_give_equal_scores(theirs, ours, tmp_path, multiturn):
    want, got = (
        evaluate(lm, "gsm8k/gsm8k.yaml", tmp_path, apply_chat_template=True, fewshot_as_multiturn=multiturn)
        for lm in (theirs, ours)
    )
    ((_, a),), ((_, b),) = want["samples"].items(), got["samples"].items()
    assert [sample["resps"] for sample in a] == [sample["resps"] for sample in b]
    theirs_asked, ours_asked = ([sample["arguments"][0][0] for sample in samples] for samples in (a, b))
    assert ours_asked == theirs_asked
    assert all(prompt.startswith("<user>") for prompt in ours_asked)


def test_repeats_are_different_draws(ours):
    (asked,) = instances(
        "generate_until", [(TEXT[0], {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0})]
    )
    first = ours.generate_until([asked] * 3)
    assert len(set(first)) == 3
    assert ours.generate_until([asked] * 3) == first


def test_cache_is_keyed_by_weights_and_requests(model, tokenizer, tmp_path):
    rows = instances("loglikelihood", [(TEXT[0], " quartz"), (TEXT[1], " wood")])
    asked = instances("generate_until", [(TEXT[0], {"until": ["e"], "max_gen_toks": 9})])

    class Refusing(HFCausalModel):
        def extend(self, tokens_S):
            raise AssertionError("the model was read although the result is known")

    def lm(kind, **identity):
        made = LongContextLM(HFCausalModel(model), tokenizer=tokenizer, results_cache=str(tmp_path / "r.db"), identity=identity)
        made.scorer.model.__class__ = kind
        return made

    first = lm(HFCausalModel, weights="a", step=1)
    want = (first.loglikelihood(rows), first.generate_until(asked))
    again = lm(Refusing, weights="a", step=1)
    assert (again.loglikelihood(rows), again.generate_until(asked)) == want
    for identity in ({"weights": "b", "step": 1}, {"weights": "a", "step": 2}):
        with pytest.raises(AssertionError, match="although the result is known"):
            lm(Refusing, **identity).loglikelihood(rows)
    with pytest.raises(AssertionError, match="although the result is known"):
        again.generate_until(instances("generate_until", [(TEXT[0], {"until": ["o"], "max_gen_toks": 9})]))
    with pytest.raises(ConfigError, match="identity"):
        LongContextLM(HFCausalModel(model), tokenizer=tokenizer, results_cache=str(tmp_path / "r.db"))
    # Another tokenizer may end the same tokens elsewhere.
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<s>")
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)
    # The same weights turned by another rope_theta give other results.
    digests = set()
    for theta in (10_000.0, 500_000.0):
        model.config.rope_theta = theta
        model.save_pretrained(tmp_path / str(theta))
        digests.add(load_checkpoint(str(tmp_path / str(theta)))[1])
    model.config.rope_theta = 10_000.0
    assert len(digests) == 2


def test_a_damaged_cache_costs_no_results(model, tokenizer, tmp_path, caplog):
    rows = instances("loglikelihood", [(TEXT[0], " quartz"), (TEXT[1], " wood")])
    (tmp_path / "r.db").write_bytes(b"no database " * 100)
    file = str(tmp_path / "r.db")
    lm = LongContextLM(HFCausalModel(model), tokenizer=tokenizer, results_cache=file, identity={"weights": "a"})
    want = LongContextLM(HFCausalModel(model), tokenizer=tokenizer).loglikelihood(rows)
    assert lm.loglikelihood(rows) == want
    assert lm.loglikelihood(rows) == want
    assert caplog.text.count("cannot be read") == 1


def test_users_mistakes_are_named(ours):
    with pytest.raises(ConfigError, match="max_gen_toks=600: leaves no prompt"):
        ours.generate_until(instances("generate_until", [(TEXT[0], {"until": [], "max_gen_toks": 600})]))
    with pytest.raises(ConfigError, match="num_beams"):
        ours.generate_until(instances("generate_until", [(TEXT[0], {"until": [], "num_beams": 3})]))
    with pytest.raises(ConfigError, match="batch_size"):
        LongContextLM(ours.causal, tokenizer=ours.tokenizer, batch_size=8)
    with pytest.raises(ConfigError, match="tokenizer"):
        LongContextLM(ours.causal, tokenizer=3)


def test_stock_command_line_sees_the_model(model, tokenizer, tmp_path):
    """`--model nemo_longctx` builds from a checkpoint folder by the arguments that lm-eval's command line passes."""
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    from lm_eval.api.registry import get_model

    lm = get_model("nemo_longctx").create_from_arg_string(
        f"pretrained={tmp_path / 'hf'},max_gen_toks=9", {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    )
    assert isinstance(lm, LongContextLM)
    assert lm.max_gen_toks == 9
    rows = instances("loglikelihood", [(TEXT[0], " quartz")])
    want = LongContextLM(HFCausalModel(model), tokenizer=tokenizer).loglikelihood(rows)
    assert lm.loglikelihood(rows)[0] == pytest.approx(want[0], abs=1e-5)


@pytest.mark.parametrize("given", ["--include_path=DIR", "--include_path DIR", ""])
def test_an_include_path_of_the_user_is_kept(given, monkeypatch, tmp_path):
    """In both spellings of the option; without it our tasks are there."""
    import lm_eval.__main__

    seen = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *given.replace("DIR", str(tmp_path)).split()])
    command_line()
    paths = " ".join(seen[0]).replace("=", " ").split().count("--include_path")
    assert paths == 1
    assert (str(tmp_path) in " ".join(seen[0])) == bool(given)
