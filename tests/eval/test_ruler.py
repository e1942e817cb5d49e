"""RULER's tasks: exact lengths for two families of tokenizers, scores by RULER's own rule, the average and the threshold."""

import dataclasses
import json

import pytest
import torch
from published import STORY
from tiny_models import byte_tokenizer, sentencepiece_tokenizer

from nemo_longctx.config import ConfigError
from nemo_longctx.eval import ruler
from nemo_longctx.eval.probe_scores import empty_rows, run_probes, score_reply
from nemo_longctx.eval.probes import ProbeConfig, make_probes
from nemo_longctx.eval.requests import Generation, plan_reading

WORDS = [
    STORY * 3,
    ruler.NOISE * 3,
    "One of the special magic numbers for bobadu is: 1234567. VAR ABCDE = 12345 Question Answer",
]
# As their authors publish them.
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{title} {n}. {STORY}",
                    "qas": [
                        {"question": f"Who was in {title} {n}?", "id": "1", "is_impossible": False, "answers": [
                            {"text": "Anna", "answer_start": 9}, {"text": "Nobody", "answer_start": 0}]},
                        {"question": "Why?", "id": "2", "is_impossible": True, "answers": []},
                    ],
                }
                for n in range(6)
            ],
        }
        for title in ("Rome", "Oslo")
    ],
}  # fmt: skip
HOTPOT = [
    {
        "_id": str(n),
        "question": f"Was house {n} dark?",
        "answer": "yes" if n % 2 else "the key",
        "supporting_facts": [["A", 0]],
        "context": [[f"House {n}", ["It was dark.", " Yes."]], [f"Door {n}", ["Anna had the key."]]],
    }
    for n in range(8)
]


@pytest.fixture(scope="module", params=[byte_tokenizer, sentencepiece_tokenizer])
def tokenizer(request):
    return request.param(WORDS, vocab=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions")
    (root / "squad.json").write_text(json.dumps(SQUAD))
    (root / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    return root


def made(tokenizer, lengths, samples=1, **more):
    unmade = {}
    config = ProbeConfig(suite="ruler", lengths=lengths, samples=samples, **more)
    return make_probes(config, WORDS, tokenizer, prefix=[1], unmade=unmade), unmade


def test_lengths_are_exact_and_answers_are_there(tokenizer, folder):
    probes, unmade = made(tokenizer, (256, 2048, 8192), data=str(folder))
    assert {probe.kind for probe in probes if probe.length == 8192} == set(ruler.KINDS)
    assert len(ruler.KINDS) == 13
    assert all(length == 256 for _, length in unmade)
    assert all("too short" in why for why in unmade.values())
    for probe in probes:
        assert len(probe.prompt) + probe.max_new_tokens == probe.length
        text = tokenizer.decode(probe.prompt)
        name = probe.kind.removeprefix("ruler_")
        if name not in ruler.QA:
            assert all(answer in text for answer in probe.answers)
            assert len(probe.answers) == {
                "vt": 5, "cwe": 10, "fwe": 3, "niah_multivalue": 4, "niah_multiquery": 4,
            }.get(name, 1)  # fmt: skip
        assert score_reply(probe, " ".join(probe.answers).upper()) == 1.0
        assert score_reply(probe, "") == 0.0


@pytest.mark.slow
def test_lengths_are_exact_at_128k(tokenizer):
    kinds = ("ruler_niah_single_2", "ruler_niah_multikey_3", "ruler_fwe")  # an essay, lines of values, words
    probes = make_probes(ProbeConfig(kinds=kinds, lengths=(131072,), samples=1), WORDS, tokenizer, prefix=[1])
    assert len(probes) >= len(kinds)
    assert all(len(probe.prompt) + probe.max_new_tokens == probe.length for probe in probes)


class Toy:
    """A model of the scorer's protocol that says what it is told, one token after the other."""

    max_length, reads_whole = 1 << 20, False

    def __init__(self, vocab, say):
        self.vocab_size, self.say, self.read = vocab, say, []

    def extend(self, tokens):
        self.read += tokens.tolist()
        return torch.arange(len(self.read) - len(tokens), len(self.read)).float()[:, None]

    def truncate(self, length):
        del self.read[length:]

    def next_logits(self, state):
        return torch.nn.functional.one_hot(torch.tensor(self.say(self.read)), self.vocab_size).float()

    def log_probs(self, states, targets):
        return torch.zeros(len(targets)), torch.ones(len(targets), dtype=torch.bool)


@pytest.mark.parametrize("copies", [True, False])
def test_a_copying_model_gets_100_and_an_empty_one_0(tokenizer, folder, copies):
    """Within the tokens that RULER lets a model generate, through the scorer, by RULER's own rules."""
    probes, _ = made(tokenizer, (4096,), samples=2, data=str(folder))
    end = tokenizer.eos_token_id
    replies = {tuple(p.prompt): [*tokenizer.encode(" ".join(p.answers), add_special_tokens=False), end] for p in probes}

    def say(read):
        if not copies:
            return end
        prompt = next(key for key in replies if tuple(read[: len(key)]) == key)
        return replies[prompt][len(read) - len(prompt)]

    rows = run_probes(Toy(len(tokenizer), say), tokenizer, probes, name="toy", stop_tokens=[end])
    cells = [(row.kind, row.length, row.score) for row in rows]
    assert ruler.tasks_scored(cells) == 13
    assert 100 * ruler.averages(cells)[4096] == (100.0 if copies else 0.0)


def test_what_samples_share_is_read_once(tokenizer, folder):
    probes, _ = made(tokenizer, (4096,), samples=8, data=str(folder))

    def share_read(name):
        asked = [p for p in probes if p.kind == f"ruler_{name}"]
        steps = plan_reading([Generation(context=p.prompt, max_new_tokens=1, stop=bool) for p in asked])
        return sum(len(step.tokens) - step.shared for step in steps) / sum(len(p.prompt) for p in asked)

    assert share_read("niah_multikey_3") < 0.35  # four samples ask another key of one haystack
    assert share_read("niah_multikey_1") < 0.35
    assert share_read("niah_single_2") < 0.8
    asked = [p for p in probes if p.kind == "ruler_niah_multikey_2"][:4]
    assert len({p.answers[0] for p in asked}) == 4


def test_without_question_data_eleven_tasks_are_left_and_the_reason_told(tokenizer):
    probes, unmade = made(tokenizer, (4096,))
    assert len({probe.kind for probe in probes}) == 11
    assert {kind for kind, _ in unmade} == {"ruler_qa_1", "ruler_qa_2"}
    assert all("give probes.data" in why for why in unmade.values())
    rows = empty_rows(ProbeConfig(suite="ruler", lengths=(4096,)), unmade, name="m")
    cells = [(probe.kind, 4096, 0.9) for probe in probes] + [(row.kind, row.length, row.score) for row in rows]
    assert ruler.averages(cells) == {4096: pytest.approx(0.9)}
    assert ruler.tasks_scored(cells) == 11


HUB = [
    {"id": "1", "title": "Rome", "context": STORY, "question": "Who?", "answers": {"text": ["Anna"], "answer_start": [0]}},
    {"id": "2", "title": "Rome", "context": STORY + "2", "question": "Why?", "answers": {"text": [], "answer_start": []}},
]
HUB_HOTPOT = {"question": "Dark?", "answer": "yes", "context": {"title": ["A", "B"], "sentences": [["It was."], ["No.", " x"]]}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("squad.jsonl", "".join(json.dumps(row) + "\n" for row in HUB)),
        ("dev-v2.0.json", json.dumps(SQUAD)),
        ("hotpotqa.jsonl", json.dumps(HUB_HOTPOT) + "\n"),
        ("hotpot_dev_distractor_v1.json", json.dumps(HOTPOT)),
    ],
)
def test_layouts_of_question_data(name, text, tmp_path):
    from nemo_longctx.eval.question_data import read_questions

    (tmp_path / name).write_text(text)
    data = read_questions(tmp_path, "squad" if name in ("squad.jsonl", "dev-v2.0.json") else "hotpotqa")
    assert all(question.answers and question.query for question in data.questions)
    assert all(data.documents[number] for question in data.questions for number in (*question.holds, *question.near))


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}\n{x", "squad.jsonl:2.*is not JSON"), ('{"a": 1}', "row 1 is neither SQuAD's"), ("[]", "holds no question")],
)
def test_bad_question_data_is_named(text, said, tmp_path):
    from nemo_longctx.eval.question_data import read_questions

    (tmp_path / "squad.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_questions(tmp_path, "squad")


def test_average_and_effective_length():
    cells = [
        ("ruler_vt", 4096, 0.9),
        ("ruler_cwe", 4096, 0.9),
        ("ruler_vt", 8192, 0.8),
        ("ruler_cwe", 8192, 0.8),
        ("needle", 8192, 1.0),
    ]
    means = ruler.averages(cells)
    assert means == {4096: pytest.approx(0.9), 8192: pytest.approx(0.8)}
    assert ruler.effective_length(means) == 4096
    assert ruler.effective_length({4096: 0.5, 8192: 0.9}) == 0


def test_an_average_never_mixes_in_empty_cells():
    cells = [("ruler_vt", 256, 1.0), ("ruler_vt", 4096, 1.0), ("ruler_cwe", 256, float("nan")), ("ruler_cwe", 4096, 0.9)]
    assert ruler.averages(cells) == {4096: pytest.approx(0.95)}
    assert ruler.averages(cells[:3]) == {256: 1.0, 4096: 1.0}  # a task that has no score at all is not counted
    assert ruler.tasks_scored(cells[:3]) == 1
    assert ruler.averages([*cells, ("ruler_vt", 8192, 1.0)]) == {4096: pytest.approx(0.95)}
    assert ruler.effective_length({4096: 0.95}, [256, 4096]) == 0  # nothing is known below


def test_a_tokenizer_that_drops_newlines_is_exact_too(folder):
    """As BERT's: words and signs, white space gone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: n for n, letter in enumerate(["[UNK]", "[CLS]", *map(chr, range(33, 127))])}
    raw = Tokenizer(models.WordPiece({**letters, **{f"##{chr(c)}": 200 + c for c in range(33, 127)}}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    probes, unmade = made(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]"), (8192,), data=str(folder))
    assert len({probe.kind for probe in probes}) + len(unmade) == 13
    assert len(unmade) <= 1
    assert all(len(probe.prompt) + probe.max_new_tokens == 8192 for probe in probes)


def test_an_unknown_suite_is_named():
    with pytest.raises(ConfigError, match="did you mean 'ruler'"):
        ProbeConfig(suite="rular")
    with pytest.raises(ConfigError, match=r"probes\.kinds=\['passkey'\]: has no effect beside suite=ruler"):
        ProbeConfig(suite="ruler", kinds=("passkey",))
    made = ProbeConfig(suite="ruler")
    assert dataclasses.replace(made, samples=1).kinds == made.kinds


def test_the_error_of_an_average_is_at_most_that_of_right_and_wrong_answers():
    assert ruler.largest_error([(0.5, 100)]) == pytest.approx(0.05)
    assert ruler.largest_error([(0.5, 100), (1.0, 7), (0.0, 1), (0.5, 25)]) == pytest.approx((0.0025 + 0.01) ** 0.5 / 4)
    assert ruler.largest_error([]) != ruler.largest_error([])
    shares = torch.arange(400) % 5 / 4  # of several answers, as vt's
    assert shares.std() / 20 < ruler.largest_error([(float(shares.mean()), 400)])
