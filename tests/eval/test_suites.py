"""HELMET's recall, NoLiMa-like needles and MRCR-like talks: exact, seeded, answered by what they hide."""

import itertools
import json
import re

import pytest
from published import STORY
from tiny_models import byte_tokenizer, sentencepiece_tokenizer

from nemo_longctx.config import ConfigError
from nemo_longctx.eval import helmet, metrics, mrcr, nolima
from nemo_longctx.eval.probe_scores import score_reply
from nemo_longctx.eval.probes import ProbeConfig, make_probes

TEXTS = [STORY * 8, "label: Document (Title: ) [ID: 1234567] > Write a poem about tapirs"]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}[assistant]"
SUITES = ("helmet", "nolima", "mrcr")


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "chat"])
def tokenizer(request):
    made = (sentencepiece_tokenizer if request.param == "sentencepiece" else byte_tokenizer)(TEXTS, vocab=600)
    if request.param == "chat":
        made.chat_template = CHAT
    return made


def made(tokenizer, suite, lengths=(1500, 3000), samples=2, **more):
    unmade = {}
    config = ProbeConfig(suite=suite, lengths=lengths, depths=(0.0, 1.0), samples=samples, **more)
    return make_probes(config, TEXTS, tokenizer, prefix=[1], unmade=unmade), unmade


@pytest.mark.parametrize("suite", SUITES)
def test_probes_are_exact_seeded_and_answered(tokenizer, suite):
    probes, unmade = made(tokenizer, suite)
    assert all(length == 1500 and "too short" in why for (_, length), why in unmade.items())
    for probe in probes:
        assert len(probe.prompt) == probe.length
        assert probe.prompt[0] in (0, 1)  # BOS, of the tokenizer or of its template
        reply = (" > " if probe.grades else ", ").join(probe.answers)
        assert score_reply(probe, " " + reply) == pytest.approx(1.0)
        assert score_reply(probe, "") == 0.0
        assert len(tokenizer.encode(" " + reply)) <= probe.max_new_tokens + 1
    assert probes == made(tokenizer, suite)[0]
    assert made(tokenizer, suite, seed=1)[0] != probes


def test_classes_are_told_by_the_examples_alone(tokenizer):
    for probe in (p for p in made(tokenizer, "helmet")[0] if p.kind == "helmet_icl"):
        text = tokenizer.decode(probe.prompt)
        question = text.rpartition("\n\n")[2].removesuffix("\nlabel:")
        assert text.count(question) == 1
        (label,) = {label for label, some in helmet.INTENTS.items() if any(question.endswith(one) for one in some)}
        shown = [number for one in helmet.INTENTS[label] for number in re.findall(rf"{re.escape(one)}\nlabel: (\d+)\n", text)]
        assert shown
        assert set(shown) == set(probe.answers)
        assert score_reply(probe, f"label: {probe.answers[0]}\n\nmore") == 1.0
        assert score_reply(probe, f"{probe.answers[0]}7") == 0.0


def test_labelled_texts_of_the_users(tokenizer, tmp_path):
    rows = [{"text": f"{word} {n}", "label": word} for word in ("alpha", "beta") for n in range(3)]
    (tmp_path / "icl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probes, _ = made(tokenizer, "helmet", data=str(tmp_path))
    probe = next(p for p in probes if p.kind == "helmet_icl")
    assert re.search(r"(alpha|beta) \d\nlabel: \d\n", tokenizer.decode(probe.prompt))
    (tmp_path / "icl.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError, match="row 1 is no"):
        make_probes(ProbeConfig(kinds=("helmet_icl",), lengths=(999,), data=str(tmp_path)), TEXTS, tokenizer)


def test_documents_are_ranked_by_what_they_tell(tokenizer):
    probe = next(p for p in made(tokenizer, "helmet")[0] if p.kind == "helmet_rerank")
    assert probe.grades == [3, 2, 2, 2]
    text = tokenizer.decode(probe.prompt)
    trade, town, trait = re.search(r"Query: (.*) in (.*) with (.*)\nRanking:", text).groups()
    best = re.search(rf"\[ID: {probe.answers[0]}\] (.*)", text)[1]
    assert all(part in best for part in (trade, town, trait))
    assert metrics.ndcg([probe.answers[1], probe.answers[0]], {probe.answers[0]: 3, probe.answers[1]: 2}) < 1


def test_nolima_needles_share_no_word_with_their_question():
    common = {
        "character",
        "which",
        "has",
        "been",
        "to",
        "the",
        "in",
        "is",
        "a",
        "of",
        "for",
        "be",
        "would",
        "with",
        "was",
        "you",
    }
    for told, question in nolima.PAIRS:
        a, b = ({word.lower() for word in re.findall(r"[A-Za-z]+", text)} - common for text in (told, question))
        assert not {x for x in a for y in b if x[:5] == y[:5]}, question


def test_a_name_that_the_users_text_tells_of_is_no_answer(tokenizer):
    """The text would answer the question too. Where it tells of all of them, one is taken all the same."""
    *told, unknown = nolima.CHARACTERS
    for names, answers in ((told, {unknown}), (nolima.CHARACTERS, set(nolima.CHARACTERS))):
        config = ProbeConfig(suite="nolima", lengths=(900,), depths=(0.5,), samples=4)
        probes = make_probes(config, [f"{', '.join(names)} went home. " * 40], tokenizer)
        assert {name for probe in probes for name in probe.answers} <= answers


def test_the_order_asked_for_is_that_of_the_talk(tokenizer):
    apart = []
    for probe in made(tokenizer, "mrcr")[0]:
        text = tokenizer.decode(probe.prompt)
        word, ordinal, what = re.search(r"Prepend (\w{10}) to the (\w+) (.*)\. Do not include", text).groups()
        assert probe.answers[0].startswith(word)
        said = probe.answers[0].removeprefix(word)
        parts = re.split(rf"Write a {re.escape(what)}\n", text)
        assert len(parts) == mrcr.NEEDLES[probe.kind] + 1
        assert said.split("\n")[0] in parts[1 + mrcr.ORDINALS.index(ordinal)]
        assert score_reply(probe, said) == 0.0  # without the word
        if tokenizer.chat_template:
            assert text.count("<s>") == 1
            assert text.endswith("[assistant]")
        asked = [form == what for form in re.findall(r"Write a ([a-z ]+ about [a-z]+)\n", text)]
        assert len(asked) >= 8 + mrcr.NEEDLES[probe.kind]  # other turns fill the window, not one long answer
        places = [place for place, own in enumerate(asked) if own]
        apart += [after - before for before, after in itertools.pairwise(places)]
    assert sum(apart) / len(apart) > 4  # and lie between the needles, too
