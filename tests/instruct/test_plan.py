"""What is asked about which document: a function of the documents and the settings, the same in every release."""

import hashlib
import random

import pytest
from stories import jsonl, story
from tokenizers import Tokenizer

from nemo_longctx.config import ConfigError
from nemo_longctx.instruct.chunking import chunk_document, token_ends
from nemo_longctx.instruct.pipeline import GenerateConfig, Generation
from nemo_longctx.instruct.prompts import KINDS, PromptSet
from nemo_longctx.instruct.replies import Prices

TEXTS = [story(1, 30), "", story(2, 12), story(1, 30), " \n"]


@pytest.fixture
def planned(tmp_path, tokenizer_folder):
    def plan(**settings):
        documents = jsonl(tmp_path / "documents.jsonl", TEXTS)
        settings = {"target_length": 400, "chunk_tokens": 60, "model": "m", **settings}
        config = GenerateConfig(documents=documents, tokenizer=str(tokenizer_folder), **settings)
        made = Generation(config, prompts=PromptSet.load(), completer=None, output=tmp_path / "out", prices=Prices())
        return made, made._plan()

    return plan


def plainly(tokenizer, text, *, seed, target, most=0):
    """(chunk, kind, seed of its call) of each chunk that an instance can hold."""
    sha, ends = hashlib.sha256(text.encode()).hexdigest(), token_ends(tokenizer, text)
    chunks = chunk_document(text, ends, chunk_tokens=60)
    inside = [chunk for chunk in chunks if sum(ends <= chunk.end) <= target or chunk.end <= ends[min(target, len(ends)) - 1]]
    if most and len(inside) > most:
        drawn = random.Random(f"{seed}/{sha}").sample(inside, most)
        inside = [chunk for chunk in inside if chunk in drawn]
    for chunk in inside:
        own = random.Random(f"{seed}/{sha}/{chunk.index}")
        yield f"{sha[:16]}-{chunk.index}", chunk, own.choice(KINDS), own.randrange(2**31)


@pytest.mark.parametrize(("seed", "most"), [(1234, 0), (7, 3)])
def test_the_plan_is_that_of_the_plain_way(planned, tokenizer_folder, seed, most):
    made, items = planned(**({} if seed == 1234 else {"seed": seed, "max_chunks_per_document": most}))
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    expected = [row for text in (TEXTS[0], TEXTS[2]) for row in plainly(tokenizer, text, seed=seed, target=400, most=most)]
    assert [(item.id, item.chunk, item.kind, item.seed) for item in items] == expected
    assert [item.document_id for item in items] == sorted(item.document_id for item in items)
    assert {item.document_id for item in items} == {"doc0", "doc2"}
    chunks = sum(len(chunk_document(t, token_ends(tokenizer, t), chunk_tokens=60)) for t in (TEXTS[0], TEXTS[2]))
    whole = [row for text in (TEXTS[0], TEXTS[2]) for row in plainly(tokenizer, text, seed=seed, target=400)]
    assert dict(made.counts) == {
        "documents": 5, "documents_empty": 2, "documents_repeated": 1, "asked": len(items), "chunks": chunks,
        "outside_cut_before_asking": chunks - len(whole),
        **({"chunks_not_drawn": len(whole) - len(items)} if most else {}),
    }  # fmt: skip
    assert chunks > len(whole) > 6


def test_a_call_asks_with_the_settings_and_a_seed_of_its_attempt(planned):
    made, items = planned(temperature=0.6, max_answer_tokens=77, extra_body='{"a": 1}', omit=" seed, ,max_tokens")
    item = items[1]
    part = TEXTS[0][item.chunk.start : item.chunk.end].strip()
    for attempt in (0, 2):
        asked, judged = made._question_call(item, attempt), made._critique_call(item, ("Q?", "A."), attempt)
        assert asked.prompt == made.prompts.fill(f"question_{item.kind}", chunk=part)
        assert judged.prompt == made.prompts.fill("critique", chunk=part, question="Q?", answer="A.")
        assert (asked.temperature, judged.temperature) == (0.6, 0.6 if attempt else 0.0)
        for call in (asked, judged):
            assert (call.model, call.max_tokens, call.seed, call.attempt) == ("m", 77, item.seed + attempt, attempt)
            assert (call.extra, call.omit) == ('{"a": 1}', ("seed", "max_tokens"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"extra_body": "{"}, "extra_body='{': is not JSON"),
        ({"extra_body": "[1]"}, "give a JSON object of request fields"),
        ({"omit": "seeds"}, "omit='seeds': cannot be left out of a request, did you mean 'seed'"),
    ],
)
def test_a_request_that_could_not_be_made_is_refused(planned, settings, said):
    with pytest.raises(ConfigError, match=said):
        planned(**settings)
