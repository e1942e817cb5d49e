"""RULER's tasks: exact lengths for two families of tokenizers, scores by RULER's own rule, the average and the threshold."""

import pytest
from published import STORY
from tiny_models import byte_tokenizer, sentencepiece_tokenizer

from nemo_longctx.config import ConfigError
from nemo_longctx.eval import ruler
from nemo_longctx.eval.probe_scores import score_reply
from nemo_longctx.eval.probes import ProbeConfig, make_probes

WORDS = [
    STORY * 3,
    ruler.NOISE * 3,
    "One of the special magic numbers for bobadu is: 1234567. VAR ABCDE = 12345 Question Answer",
]


@pytest.fixture(scope="module", params=[byte_tokenizer, sentencepiece_tokenizer])
def tokenizer(request):
    return request.param(WORDS, vocab=600)


def made(tokenizer, lengths, samples=1):
    unmade = {}
    return make_probes(
        ProbeConfig(suite="ruler", lengths=lengths, samples=samples), WORDS, tokenizer, prefix=[1], unmade=unmade
    ), unmade


def test_lengths_are_exact_and_answers_are_there(tokenizer):
    probes, unmade = made(tokenizer, (256, 2048, 8192))
    assert {probe.kind for probe in probes if probe.length == 8192} == set(ruler.KINDS)
    assert all(length == 256 for _, length in unmade)
    assert all("too short" in why for why in unmade.values())
    for probe in probes:
        assert len(probe.prompt) + probe.max_new_tokens == probe.length
        text = tokenizer.decode(probe.prompt)
        assert all(answer in text for answer in probe.answers)
        assert len(probe.answers) == {"vt": 5, "cwe": 10, "fwe": 3, "niah_multivalue": 4, "niah_multiquery": 4}.get(
            probe.kind.removeprefix("ruler_"), 1
        )
        assert score_reply(probe, " ".join(probe.answers).upper()) == 1.0
        assert score_reply(probe, "") == 0.0


@pytest.mark.slow
def test_lengths_are_exact_up_to_128k(tokenizer):
    probes, unmade = made(tokenizer, (256, 8192, 32768, 131072))
    assert all(length == 256 for _, length in unmade)
    assert all(len(probe.prompt) + probe.max_new_tokens == probe.length for probe in probes)


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
    assert ruler.averages([("ruler_vt", 4096, 1.0), ("ruler_cwe", 4096, float("nan"))]) == {}


def test_an_unknown_suite_is_named():
    with pytest.raises(ConfigError, match="did you mean 'ruler'"):
        ProbeConfig(suite="rular")
