import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from tiny_models import byte_tokenizer, sentencepiece_tokenizer, tiny_llama

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.hf import HFCausalModel
from nemo_longctx.eval.probe_scores import (
    ProbeRow,
    effective_length,
    empty_rows,
    fits,
    longest_asked,
    probe_rows,
    read_csv,
    run_probes,
    score_reply,
    told_length,
    too_weak,
    write_csv,
)
from nemo_longctx.eval.probes import KINDS, PAPER_LENGTHS, SUITES, Probe, ProbeConfig, make_probes
from nemo_longctx.eval.requests import Score
from nemo_longctx.hf import chat
from nemo_longctx.report.plots import plot_probes

TEXTS = [
    "It was a bright cold day in the valley, and the clocks were late. The smith opened his door to the street before six. "
    "Nobody in the town had ever seen such a machine at work! What would the council say about it when they met? " * 3,
    "Chapter Two\nThe river had risen during the night and taken the bridge. They waited for the ferry until noon. ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(TEXTS)


def everything(**more):
    kinds = tuple(kind for kind in KINDS if not any(kind in suite for suite in SUITES.values()))
    return ProbeConfig(**{"kinds": kinds, "lengths": (400, 1000), "depths": (0.0, 0.5, 1.0), "samples": 2, **more})


def test_every_probe_is_exact_to_the_token(tokenizer):
    probes = make_probes(everything(), TEXTS, tokenizer, prefix=[7])
    assert {probe.kind for probe in probes} == set(everything().kinds)
    for probe in probes:
        assert len(probe.prompt) == probe.length
        assert probe.prompt[0] == 7
        text = tokenizer.decode(probe.prompt[1:])
        if probe.kind == "record":
            assert "One of the special magic" not in text
        if probe.kind == "first_sentence":
            assert text.startswith(probe.answers[0])
            assert not text[len(probe.answers[0]) :].lstrip().startswith(probe.answers[0])  # it stands there once
        elif probe.kind == "variable_tracking":
            assert re.search(rf"VAR {probe.answers[0]} = \d{{5}}\.", text)
            assert all(f"VAR {b} = VAR {a}." in text for a, b in zip(probe.answers, probe.answers[1:], strict=False))
        else:
            assert all(answer in text for answer in probe.answers)
        asked = ", ".join(probe.answers) if probe.kind == "needle_multi_value" else probe.answers[0]
        if probe.kind == "code":  # it goes on where the question ends
            assert tokenizer.decode(probe.first) == asked
            begun = re.search(r"The code is ([A-Z]{3})$", text).group(1)
            assert f"The code is {begun}{asked}." in text
            assert len(begun + asked) == len(set(begun + asked)) == 8
        else:
            assert tokenizer.decode(probe.first) == " " + asked


def test_a_tokenizer_without_capitals_is_told(tokenizer):
    class Lowering:
        encode = staticmethod(lambda text, *, add_special_tokens: tokenizer.encode(text.lower(), add_special_tokens=False))
        decode = staticmethod(tokenizer.decode)

    with pytest.raises(ConfigError, match="kinds='code': this tokenizer does not give capital letters back"):
        make_probes(everything(kinds=("code",)), TEXTS, Lowering)


def test_needles_lie_at_their_depth(tokenizer):
    for probe in make_probes(everything(kinds=("needle", "passkey", "code"), lengths=(3000,)), TEXTS, tokenizer):
        text = tokenizer.decode(probe.prompt)
        place = text.index(probe.answers[0]) / len(text)
        assert abs(place - probe.depth) < 0.12, (probe.kind, probe.depth, place)


def test_needles_come_in_their_numbers(tokenizer):
    for kind, count in (("needle", 1), ("needle_multi_key", 4), ("needle_multi_value", 4)):
        for probe in make_probes(everything(kinds=(kind,)), TEXTS, tokenizer):
            hidden = re.findall(r"One of the special magic numbers for (\w+) is: (\d{7})\.", tokenizer.decode(probe.prompt))
            assert len(hidden) == count
            assert len({key for key, _ in hidden}) == (1 if kind == "needle_multi_value" else count)
            assert {number for key, number in hidden if key in tokenizer.decode(probe.prompt[-60:])} == set(probe.answers)


def test_seed_and_cache(tokenizer, tmp_path):
    first = make_probes(everything(), TEXTS, tokenizer, cache=tmp_path)
    again = make_probes(everything(), TEXTS, tokenizer, cache=tmp_path)
    plain = make_probes(everything(), TEXTS, tokenizer)
    assert first == again == plain
    assert len(list(tmp_path.iterdir())) == 1
    assert [p.content_hash for p in first] == [p.content_hash for p in plain]
    other = make_probes(everything(seed=1), TEXTS, tokenizer, cache=tmp_path)
    assert not {p.content_hash for p in other} & {p.content_hash for p in first}
    make_probes(everything(), [TEXTS[0]], tokenizer, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    other = byte_tokenizer(["quite another text, of other words and so of other pieces; a bell, a bridge, a ballad" * 3])
    assert make_probes(everything(), TEXTS, other, cache=tmp_path) == make_probes(everything(), TEXTS, other) != first
    # A larger set holds the smaller one's probes unchanged.
    more = make_probes(everything(samples=3), TEXTS, tokenizer)
    assert {p.content_hash for p in first} < {p.content_hash for p in more}


def test_replies_are_scored(tokenizer):
    by_kind = {probe.kind: probe for probe in make_probes(everything(), TEXTS, tokenizer)}
    for kind, probe in by_kind.items():
        assert score_reply(probe, " " + ", ".join(probe.answers) + "\nand more") == 1
        assert score_reply(probe, "zzz") == 0
        if len(probe.answers) > 1:
            assert score_reply(probe, probe.answers[0]) == pytest.approx(1 / len(probe.answers)), kind


def test_run_counts_what_does_not_fit(tokenizer):
    model = HFCausalModel(tiny_llama(vocab=len(tokenizer), length=600))
    probes = make_probes(everything(kinds=("passkey", "first_sentence"), depths=(0.5,)), TEXTS, tokenizer)
    rows = run_probes(model, tokenizer, probes, name="tiny")
    assert [(r.kind, r.length, r.samples, r.skipped) for r in rows] == [
        ("passkey", 400, 2, 0), ("passkey", 1000, 0, 2), ("first_sentence", 400, 2, 0), ("first_sentence", 1000, 0, 2),
    ]  # fmt: skip
    for row in rows:
        assert (row.score >= 0) == (row.samples > 0)
        assert (row.answer_loss > 0) == (row.samples > 0)
    # The loss is that of the answer's tokens after the prompt.
    probe = next(p for p in probes if fits(p, 600))
    tokens = torch.tensor([[*probe.prompt, *probe.first]])
    with torch.no_grad():
        logp = model.model(tokens).logits[0].log_softmax(-1)[len(probe.prompt) - 1 : -1]
    told = []
    one = run_probes(model, tokenizer, [probe], name="tiny", progress=told.append)[0]
    assert sum(told) == len(probe.prompt) + len(probe.first) - 1  # tokens read; reply and answer share the prompt
    assert one.answer_loss == pytest.approx(-logp.gather(-1, torch.tensor(probe.first)[:, None]).mean().item(), abs=1e-4)


def asked(sample=0, prompt=8, first=2, new=4, depth=0.0):
    return Probe(
        kind="passkey", length=8, depth=depth, sample=sample, prompt=[1] * prompt, answers=["ab"], first=[1] * first,
        max_new_tokens=new,
    )  # fmt: skip


def test_a_probe_fits_with_its_longest_reply_or_answer():
    assert fits(asked(first=2, new=4), 12)
    assert not fits(asked(first=2, new=4), 11)
    assert fits(asked(first=5, new=4), 13)
    assert not fits(asked(first=5, new=4), 12)


def test_a_cell_is_the_mean_of_the_probes_that_were_asked():
    """By hand: replies that hold the answer and not, losses of answers of unlike length, one that does not fit."""

    class Letters:
        decode = staticmethod(lambda tokens: "".join(map(chr, tokens)))

    scores = [Score(token_log_probs=torch.tensor(logs).numpy(), is_greedy=False) for logs in ([-1.0, -3.0], [-0.5], [-4.0])]
    probes = [asked(0), asked(1, prompt=90), asked(2, first=1), asked(3, first=1, depth=0.5)]
    replies = [[*map(ord, "it is ab")], [*map(ord, "it is ba")], [*map(ord, "ab")]]
    found = [result for pair in zip(replies, scores, strict=True) for result in pair]
    first, second = probe_rows(probes, found, Letters, name="m", max_length=20)
    assert (first.model, first.depth, first.samples, first.skipped) == ("m", 0.0, 2, 1)
    assert (first.score, first.answer_loss) == (0.5, 1.25)
    assert (second.depth, second.score, second.answer_loss, second.samples, second.skipped) == (0.5, 1.0, 4.0, 1, 0)
    for wrong in (found[::-1], [found[0], found[0]] * 3, [found[1], found[1]] * 3):
        with pytest.raises(TypeError, match="a reply, then a score, for each probe"):
            probe_rows(probes, wrong, Letters, name="m", max_length=20)


def test_a_stop_token_is_no_part_of_the_reply():
    """A label is right as a whole, so the text of the token that ended a right reply made it wrong."""

    class Letters:
        decode = staticmethod(lambda tokens: "".join("</s>" if token == 0 else chr(token) for token in tokens))

    probe = replace(asked(), kind="helmet_icl", answers=["3"])
    score = Score(token_log_probs=torch.tensor([-1.0, -1.0]).numpy(), is_greedy=False)
    for reply, stops, right in (("3\0", (0,), 1), ("3\0", (), 0), ("3", (0,), 1), ("3", (ord("3"),), 0), ("", (0,), 0)):
        (row,) = probe_rows([probe], [[*map(ord, reply)], score], Letters, name="m", max_length=20, stop_tokens=stops)
        assert row.score == right, (reply, stops)


TURN = "{% for m in messages %}<s>[{{ m['role'] }} {{ strftime_now('%d %b %Y') }}] {{ m['content'] }} [over]{% endfor %}A:"


@pytest.mark.parametrize(
    "kind", ["first_sentence", "passkey", "needle_multi_value", "nolima", "ruler_vt", "helmet_json_kv", "mrcr_2"]
)
def test_a_tuned_model_is_asked_in_its_template_and_the_length_stays_exact(kind, tokenizer):
    """Every probe asked tuned models in plain text, as if to go on with a book."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TURN
    made = {}
    for tuned in (False, True):
        config = ProbeConfig(kinds=(kind,), lengths=(1500,), depths=(0.5,), samples=1, chat=tuned)
        (made[tuned],) = make_probes(config, TEXTS, tokenizer, prefix=[tokenizer.bos_token_id])
    plain, asked = made[False], made[True]
    assert len(plain.prompt) == len(asked.prompt)
    text = tokenizer.decode(asked.prompt)
    if not kind.startswith("mrcr"):  # which is a talk in the template anyway
        assert text.startswith("<s>[user 26 Jul 2024] ")
        assert text.endswith(" [over]A:")
        assert text.count("[over]") == 1
        assert "[over]" not in tokenizer.decode(plain.prompt)
    assert asked.answers == plain.answers
    assert tokenizer.decode(asked.first).strip() == tokenizer.decode(plain.first).strip()
    assert asked.length == 1500


def test_the_day_of_a_template_is_one_and_the_same_but_in_a_talk(monkeypatch, capsys, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TURN
    turns = [{"role": "user", "content": "Hi"}]
    monkeypatch.setattr(chat, "_told", set())
    said = [chat.render(tokenizer, turns, tokenize=False, today=today) for today in (False, False, True)]
    assert said[0] == said[1] == "<s>[user 26 Jul 2024] Hi [over]A:"
    assert said[2] == tokenizer.apply_chat_template(turns, tokenize=False) != said[0]
    assert capsys.readouterr().err.count("the chat template writes the day: it is 26 Jul 2024") == 1  # once
    assert chat.render(tokenizer, turns, tokenize=False, chat_template="{{ messages[0].content }}") == "Hi"
    assert chat.day_of(tokenizer, "{{ messages }}") == ""
    tokenizer.chat_template = None
    assert chat.day_of(tokenizer) == ""


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, "has no chat template"), ("fixed", "does not write what is asked once"),
     ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not write what is asked once")],
)  # fmt: skip
def test_a_template_in_which_nothing_can_be_asked_is_refused(template, said, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=f"probes.chat=True: .*{said}"):
        make_probes(ProbeConfig(kinds=("passkey",), lengths=(512,), chat=True), TEXTS, tokenizer)
    with pytest.raises(ConfigError, match=r"probes\.kinds='code': begins the answer's word itself"):
        ProbeConfig(kinds=("code",), chat=True)


def test_what_is_asked_ends_where_the_reply_begins(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    turn = "<{{ messages[0].role }}>{{ messages[0].content }}{% if add_generation_prompt %}<reply>{% endif %}"
    tokenizer.chat_template = turn + "{% if enable_thinking is defined and not enable_thinking %}<no thought>{% endif %}"
    assert chat.asked(tokenizer) == ("<user>", "<reply><no thought>")


def cell(length, score, kind="needle", depth=0.0, model="m"):
    return ProbeRow(model=model, kind=kind, length=length, depth=depth, score=score, answer_loss=1.0, samples=1, skipped=0)


def test_effective_length():
    rows = [cell(256, 1.0), cell(1024, 0.95), cell(2048, 0.91), cell(4096, 0.5), cell(8192, 1.0)]
    rows += [cell(256, 0.0, model="weak"), cell(256, 1.0, depth=0.5, kind="passkey"), cell(256, 0.8, depth=1.0, kind="passkey")]
    rows += [cell(512, float("nan"), kind="passkey")]
    assert effective_length(rows) == {("m", "needle"): 2048, ("weak", "needle"): 0, ("m", "passkey"): 256}
    assert effective_length(rows, share=0.99)[("m", "needle")] == 256


def test_a_score_at_the_share_or_the_floor_counts_and_a_weak_model_is_told():
    at = [cell(256, 0.5), cell(512, 0.5), cell(1024, 0.4999), cell(2048, 0.5)]
    assert effective_length(at) == {("m", "needle"): 512}
    assert too_weak(at) == {}
    shared = [cell(256, 1.0), cell(512, 0.75), cell(1024, 0.7499)]
    assert effective_length(shared, share=0.75) == {("m", "needle"): 512}
    weak = [cell(512, 1.0), cell(256, 0.2, depth=0.0), cell(256, 0.4, depth=1.0), cell(512, 0.9, kind="code", model="other")]
    assert too_weak(weak) == {("m", "needle"): pytest.approx(0.3)}
    key = ("m", "needle")
    assert told_length(key, effective_length(weak), too_weak(weak), {}) == "too weak to tell (0.30 at the shortest)"
    assert told_length(key, effective_length(at), too_weak(at), longest_asked(at)) == 512
    assert told_length(key, {key: 0}, {}, {key: 512}) == "not scored"
    assert told_length(("m", "code"), {key: 512}, {}, {}) == "–"


def test_a_model_that_keeps_its_score_to_the_longest_length_may_keep_it_beyond():
    key, kept = ("m", "needle"), [cell(256, 1.0), cell(4096, 1.0)]
    assert told_length(key, effective_length(kept), {}, longest_asked(kept)) == "at least 4,096"
    unread = [*kept, cell(8192, float("nan"))]  # longer than the model reads: that is its limit
    assert told_length(key, effective_length(unread), {}, longest_asked(unread)) == 4096


def test_csv_and_figure(tmp_path):
    rows = [cell(n, 0.1 * d, depth=d / 10, model=m) for n in (256, 4096) for d in range(0, 11, 5) for m in ("before", "after")]
    rows += [cell(n, 0.5, kind="first_sentence", model=m) for n in (256, 4096) for m in ("before", "after")]
    write_csv(tmp_path / "not" / "there" / "probes.csv", rows)
    assert read_csv(tmp_path / "not" / "there" / "probes.csv") == rows
    for value in ("score", "answer_loss"):
        assert plot_probes(rows, tmp_path / f"{value}.png", value=value).stat().st_size > 20_000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_probes([], tmp_path / "none.png")


def test_the_papers_thirteen_lengths():
    assert len(PAPER_LENGTHS) == 13
    assert (PAPER_LENGTHS[0], PAPER_LENGTHS[-1]) == (256, 30 * 1024)
    assert json.loads(json.dumps(PAPER_LENGTHS)) == sorted(PAPER_LENGTHS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kinds": ("neddle",)}, "did you mean 'needle'"),
        ({"lengths": ()}, "at least one positive length"),
        ({"depths": (1.5,)}, "between 0"),
        ({"samples": 0}, "at least 1 sample"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ConfigError, match=message):
        everything(**bad)


def test_texts_that_cannot_hold_a_probe(tokenizer):
    with pytest.raises(ConfigError, match="too short for a passkey probe, which needs"):
        make_probes(everything(kinds=("passkey",), lengths=(20,)), TEXTS, tokenizer)
    with pytest.raises(ValueError, match="none was given"):
        make_probes(everything(), [" "], tokenizer)
    with pytest.raises(ValueError, match="needs prose"):
        make_probes(everything(kinds=("first_sentence",)), ["no sentences here"], tokenizer)


def test_a_sentencepiece_answer_follows_its_prompt():
    """No lone piece for a space at the seam: prompt and answer are the tokens of their text."""
    tokenizer = sentencepiece_tokenizer(TEXTS)
    for probe in make_probes(everything(lengths=(700,), samples=1), TEXTS, tokenizer):
        assert len(probe.prompt) == 700
        asked = tokenizer.decode(probe.prompt[-20:] + probe.first)
        assert asked.endswith((probe.answers[0], ", ".join(probe.answers)))
        question = tokenizer.decode(probe.prompt[-12:])
        tail = tokenizer.encode(f"{question} {tokenizer.decode(probe.first)}", add_special_tokens=False)
        assert tail[-len(probe.first) :] == probe.first


def test_all_values_of_a_key_are_asked_and_have_room():
    tokenizer = byte_tokenizer(["x"], vocab=258)  # a token a digit: 35 for four values, as with tokenizers that split numbers
    for probe in make_probes(everything(kinds=("needle_multi_value",), lengths=(3000,)), TEXTS, tokenizer):
        said = ", ".join(probe.answers[:-1]) + ", and " + probe.answers[-1]
        assert len(tokenizer.encode(" " + said)) <= probe.max_new_tokens
        assert tokenizer.decode(probe.first) == " " + ", ".join(probe.answers)
        text = tokenizer.decode(probe.prompt)
        places = [text.index(f"is: {value}.") / len(text) for value in probe.answers]
        assert places == sorted(places)
        assert max(abs(place - probe.depth) for place in places) < 0.2


def test_a_kind_that_is_too_long_leaves_its_cells_empty(tokenizer, tmp_path):
    config = everything(kinds=("needle", "passkey"), lengths=(150, 500), samples=1)
    for _ in range(2):  # made, and read from the cache
        unmade = {}
        made = make_probes(config, TEXTS, tokenizer, cache=tmp_path, unmade=unmade)
        assert {(probe.kind, probe.length) for probe in made} == {("needle", 150), ("needle", 500), ("passkey", 500)}
        assert list(unmade) == [("passkey", 150)]
        assert "too short for a passkey probe" in unmade["passkey", 150]
    rows = empty_rows(config, unmade, name="m")
    assert [(row.samples, row.skipped, row.reason) for row in rows] == [(0, 1, unmade["passkey", 150])] * 3
    assert [row.depth for row in rows] == [0.0, 0.5, 1.0]
    flat = empty_rows(everything(samples=7), {("variable_tracking", 150): "why"}, name="m")
    assert [(row.depth, row.skipped, row.model) for row in flat] == [(0.0, 7, "m")]
    write_csv(tmp_path / "rows.csv", rows)
    assert read_csv(tmp_path / "rows.csv")[0].reason == rows[0].reason
    with pytest.raises(ConfigError, match="too short for a passkey"):
        make_probes(config, TEXTS, tokenizer, cache=tmp_path)
    with pytest.raises(ConfigError, match="too short"):
        make_probes(everything(lengths=(3,)), TEXTS, tokenizer, unmade={})
