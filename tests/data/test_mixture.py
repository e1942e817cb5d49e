"""What a mix asks is what it delivers, by source and by length; what cannot be delivered is said."""

import dataclasses
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.best_fit import open_windows
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.data.documents import Pieces
from nemo_longctx.data.mixture import Documents, MixConfig, SourceConfig, mix_dict, plan_mix
from nemo_longctx.data.order import open_order, order_key
from nemo_longctx.data.seen import Remaining
from nemo_longctx.data.writer import CorpusWriter

RNG = np.random.default_rng(0)
BOOKS = RNG.integers(20, 400, 300).tolist()
WEB = RNG.integers(1, 80, 3000).tolist()
LONG = 60


@pytest.fixture
def prefixes(telling_corpora):
    return telling_corpora([BOOKS, WEB])


def mix_of(prefixes, weights=(None, None), **rules):
    sources = [
        {"path": path, "name": name, "weight": weight}
        for path, name, weight in zip(prefixes, ("books", "web"), weights, strict=True)
    ]
    return build(MixConfig, {"sources": sources, **rules}, where="data.mix")


def strata_of(mix, total_tokens=100_000):
    return {stratum.name: stratum for stratum in plan_mix(mix, Documents.open(mix), total_tokens)}


def tokens_of(lengths, low=0, high=10**9):
    return sum(length for length in lengths if low <= length <= high)


def test_natural_shares_are_those_of_tokens(prefixes):
    strata = strata_of(mix_of(prefixes))
    assert strata["books"].share == pytest.approx(tokens_of(BOOKS) / (tokens_of(BOOKS) + tokens_of(WEB)))
    repeats = {round(stratum.repeats(100_000), 9) for stratum in strata.values()}
    assert len(repeats) == 1  # all documents come equally often


def test_up_weighting_by_source_keeps_the_sources_shares(prefixes):
    strata = strata_of(mix_of(prefixes, (0.25, 0.75), long_length=LONG, long_share=0.5, balance="source"))
    assert {name: stratum.share for name, stratum in strata.items()} == pytest.approx(
        {"books < 60": 0.125, "books >= 60": 0.125, "web < 60": 0.375, "web >= 60": 0.375}
    )
    assert strata["books >= 60"].tokens == tokens_of(BOOKS, LONG)


def test_up_weighting_over_all_keeps_proportions_among_the_long_and_among_the_short(prefixes):
    strata = strata_of(mix_of(prefixes, (0.25, 0.75), long_length=LONG, long_share=0.5, balance="all"))
    long = {name: stratum.share for name, stratum in strata.items() if ">=" in name}
    assert sum(long.values()) == pytest.approx(0.5)
    asked = {
        "books >= 60": 0.25 * tokens_of(BOOKS, LONG) / tokens_of(BOOKS),
        "web >= 60": 0.75 * tokens_of(WEB, LONG) / tokens_of(WEB),
    }
    assert long["books >= 60"] / long["web >= 60"] == pytest.approx(asked["books >= 60"] / asked["web >= 60"])
    assert sum(stratum.share for stratum in strata.values()) == pytest.approx(1)


def test_length_rules_choose_documents_and_a_source_may_have_its_own(prefixes):
    mix = mix_of(prefixes, drop_shorter=30, drop_longer=60)
    assert strata_of(mix)["web"].tokens == tokens_of(WEB, 30, 60)
    sources = [{"path": prefixes[0], "name": "books", "drop_longer": 100}, {"path": prefixes[1], "name": "web"}]
    strata = strata_of(build(MixConfig, {"sources": sources, "drop_longer": 60}))
    assert strata["books"].tokens == tokens_of(BOOKS, 0, 100)
    documents = Documents.open(mix)
    members = strata_of(mix)["web"].members(documents)
    assert members.dtype == np.uint32
    assert documents.lengths(members).tolist() == [length for length in WEB if 30 <= length <= 60]
    assert set(documents.sources_of(members).tolist()) == {1}


def test_a_cap_is_an_error_or_gives_to_the_others(prefixes):
    books, total = tokens_of(BOOKS), 10 * tokens_of(BOOKS)
    with pytest.raises(ConfigError, match=r"books would have to come 5\.00 times"):
        strata_of(mix_of(prefixes, (0.5, 0.5), max_repeats=2), total)
    with pytest.raises(ConfigError, match="all documents together give"):
        strata_of(mix_of(prefixes, (0.5, 0.5), max_repeats=2, on_cap="renormalize"), total)
    capped = strata_of(mix_of(prefixes, (0.5, 0.5), max_repeats=4, on_cap="renormalize"), 5 * books)
    assert sum(stratum.share for stratum in capped.values()) == pytest.approx(1)
    assert max(stratum.repeats(5 * books) for stratum in capped.values()) <= 4 + 1e-9
    assert capped["books"].share == pytest.approx(0.5)  # 2.5 times: under the cap, and there is nothing to give
    over = strata_of(mix_of(prefixes, (0.9, 0.1), max_repeats=3, on_cap="renormalize"), 4 * books)
    assert over["books"].repeats(4 * books) == pytest.approx(3)
    assert over["web"].share == pytest.approx(0.25)


def test_what_a_cap_leaves_may_push_another_source_over_its_own(telling_corpora):
    prefixes = telling_corpora([[10] * 10, [10] * 25, [10] * 1000])
    sources = [{"path": path, "weight": weight} for path, weight in zip(prefixes, (0.6, 0.3, 0.1), strict=True)]
    strata = strata_of(build(MixConfig, {"sources": sources, "max_repeats": 2, "on_cap": "renormalize"}), 1000)
    # The first may give 0.2; of the 0.8 left three quarters would be the second's, which may give 0.5.
    assert [stratum.share for stratum in strata.values()] == pytest.approx([0.2, 0.5, 0.3])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"weights": (0.5, None)}, "weigh every source, or none"),
        ({"weights": (1.0, 0.0)}, "a share above 0"),
        ({"long_length": 10}, "go together"),
        ({"long_length": 10, "long_share": 1.0}, r"a share in \(0, 1\)"),
        ({"balance": "sources"}, r"data\.mix\.balance='sources'.*'source'"),
        ({"on_cap": "stop"}, r"data\.mix\.on_cap='stop'.*renormalize"),
        ({"max_repeats": 0}, "above 0"),
        ({"max_repeats": float("nan")}, "max_repeats=nan: "),
        ({"max_repeats": float("inf")}, "max_repeats=inf: "),
        ({"on_cap": "renormalize"}, "no effect without max_repeats"),
        ({"drop_shorter": -5}, r"data\.mix\.drop_shorter=-5: a length in tokens"),
        ({"drop_longer": 0}, r"data\.mix\.drop_longer=0"),
        ({"long_length": 0, "long_share": 0.5}, r"data\.mix\.long_length=0"),
        ({"drop_shortr": 3}, "did you mean 'drop_shorter'"),
        ({"share_tolerance": 0}, "share_tolerance"),
        ({"weights": (1e308, 1e308)}, r"data\.mix\.sources\.weight=\[1e\+308, 1e\+308\]: differ beyond"),
        ({"weights": (5e-324, 1e308)}, r"data\.mix\.sources\.weight=\[5e-324, 1e\+308\]: differ beyond"),
    ],
)
def test_a_mix_that_contradicts_itself(prefixes, rules, message):
    rules = dict(rules)
    with pytest.raises(ConfigError, match=message):
        mix_of(prefixes, rules.pop("weights", (None, None)), **rules)


def test_each_path_of_a_source_names_something():
    for path in ("  ", ["a", ""], ["", ""]):
        with pytest.raises(ConfigError, match=r"data\.mix\.sources\.path=.*: name a prefix"):
            SourceConfig(path=path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"drop_shorter": 401}, "books'.*no document of 401"),
        ({"drop_shorter": 81}, "web'.*no document of 81"),
        ({"long_length": 100, "long_share": 0.5}, "source web has no documents of at least 100"),
        ({"long_length": 500, "long_share": 0.5, "balance": "all"}, "no source has documents of at least 500"),
        ({"long_length": 1, "long_share": 0.5, "balance": "all"}, "no source has documents shorter than 1"),
    ],
)
def test_rules_that_leave_nothing(prefixes, rules, message):
    with pytest.raises(ConfigError, match=message):
        strata_of(mix_of(prefixes, **rules))


def test_a_source_has_lengths_of_at_least_one_token():
    with pytest.raises(ConfigError, match=r"data\.mix\.sources\.drop_longer=-1"):
        SourceConfig(path="a", drop_longer=-1)


@pytest.mark.parametrize("weights", [(7, 3), (0.7, 0.3), (70.0, 30)])
def test_weights_are_parts_of_their_sum(prefixes, weights):
    mix = mix_of(prefixes, weights)
    assert [source.weight for source in mix.sources] == pytest.approx([0.7, 0.3])
    assert [stratum.share for stratum in strata_of(mix).values()] == pytest.approx([0.7, 0.3])


def test_two_sources_of_one_name(prefixes):
    with pytest.raises(ConfigError, match="two sources have this name"):
        MixConfig(sources=build(MixConfig, {"sources": [{"path": prefixes[0]}]}).sources * 2)


def test_shares_are_delivered_in_every_stage(prefixes, tmp_path):
    stages = [
        StageConfig(until=0.5, seq_length=16),
        StageConfig(until=0.6, seq_length=32),
        StageConfig(until=1, seq_length=128),
    ]
    curriculum = Curriculum(stages=stages, tokens_per_step=256, total_tokens=256 * 2000)
    mix = mix_of(prefixes, (0.25, 0.75), long_length=LONG, long_share=0.5, share_tolerance=0.001)
    order = open_order(mix, Documents.open(mix), curriculum, seed=3, cache_dir=str(tmp_path))
    for row, stage in zip(order.delivered(curriculum), curriculum.plan, strict=True):
        counted = order.tokens_by_stratum(stage.first_token, stage.end_token)
        assert counted.tolist() == row.tolist()
        shares = counted / (stage.end_token - stage.first_token)
        np.testing.assert_allclose(shares, [stratum.share for stratum in order.strata], atol=0.001)


def test_documents_too_long_for_their_share_are_an_error_before_training(telling_corpora, tmp_path):
    mix = mix_of(telling_corpora([[900], [10] * 50]), (0.5, 0.5))
    curriculum = Curriculum.constant(seq_length=16, global_batch_size=2, total_steps=5)
    order = open_order(mix, Documents.open(mix), curriculum, seed=3, cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="too long to meet it"):
        open_windows(order, curriculum, seed=3, document_masking=False)


def test_the_key_of_an_order_follows_contents_not_places(prefixes, telling_corpora):
    curriculum = Curriculum.constant(seq_length=16, global_batch_size=2, total_steps=5)

    def key(mix, seed=1):
        return order_key(mix, Documents.open(mix), curriculum, seed)

    here, copy = mix_of(prefixes), mix_of(telling_corpora([BOOKS, WEB]))
    assert mix_dict(here) == mix_dict(copy)
    assert key(here) == key(copy)
    others = {key(here), key(here, seed=2), key(mix_of(prefixes, (0.5, 0.5))), key(mix_of(telling_corpora([BOOKS, WEB[1:]])))}
    assert len(others) == 4


def test_shards_are_one_source(telling_corpora):
    parts, whole = telling_corpora([BOOKS[:100], BOOKS[100:]]), telling_corpora([BOOKS])
    split = build(MixConfig, {"sources": [{"path": parts, "name": "books"}]})
    one = build(MixConfig, {"sources": [{"path": whole[0], "name": "books"}]})
    a, b = Documents.open(split), Documents.open(one)
    assert plan_mix(split, a, 1000) == plan_mix(one, b, 1000)
    everything = np.random.default_rng(1).permutation(len(a)).astype(np.uint32)
    assert a.lengths(everything).tolist() == b.lengths(everything).tolist()
    for (corpus, first), (other, place) in zip(a.places(everything), b.places(everything), strict=False):
        assert corpus.read(first, first + 3).tolist() == other.read(place, place + 3).tolist()


@pytest.mark.parametrize("lengths", [[6000, 9000, 20000], [10, 20, 30]])
def test_the_mend_for_a_corpus_of_books_alone_works(tmp_path, lengths):
    """Of a corpus that is all long (or all short) the refusal names a length that divides it, and how to do without."""
    with CorpusWriter(tmp_path / "books", np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.arange(length) % 100)
    sources = [{"path": str(tmp_path / "books")}]
    mix = build(MixConfig, {"sources": sources, "long_length": 4096, "long_share": 0.5, "balance": "all"})
    with pytest.raises(ConfigError, match=r"data\.mix\.long_length=null data\.mix\.long_share=null") as error:
        plan_mix(mix, Documents.open(mix), 10_000)
    named = int(re.search(r"their mean, (\d+)", str(error.value)).group(1))
    for mended in (dataclasses.replace(mix, long_length=named), dataclasses.replace(mix, long_length=None, long_share=None)):
        assert sum(stratum.share for stratum in plan_mix(mended, Documents.open(mended), 10_000)) == pytest.approx(1)


def plain_shares(mix, sources, total, read):
    """As `plan_mix`, a stratum at a time: {name: (its documents, tokens, share)}, or the numbers of what it refuses.

    `read` are the tokens read of each document.
    """
    groups, first = [], 0
    for source, lengths in zip(mix.sources, sources, strict=True):
        low = source.drop_shorter or mix.drop_shorter or 1
        high = source.drop_longer or mix.drop_longer or math.inf
        kept = {first + d: n for d, n in enumerate(lengths) if low <= n <= high}
        sides = {source.label: kept}
        if mix.long_length:
            sides = {
                f"{source.label} < {mix.long_length}": {d: n for d, n in kept.items() if n < mix.long_length},
                f"{source.label} >= {mix.long_length}": {d: n for d, n in kept.items() if n >= mix.long_length},
            }
        groups += [(source, name, documents) for name, documents in sides.items() if documents]
        first += len(lengths)
    tokens = {name: sum(documents.values()) for _, name, documents in groups}
    given = {name: sum(read[d] for d in documents) for _, name, documents in groups}
    level = min(given[name] // tokens[name] for name in tokens)  # so often all was read
    nature = {name: max(0, tokens[name] * (level + 1) - given[name]) for name in tokens}
    more = max(0, total - sum(nature.values())) if any(read) else 0
    nature = {name: nature[name] + more * tokens[name] / sum(tokens.values()) for name in tokens}
    shares = {}
    for source in mix.sources:
        own = [name for of, name, _ in groups if of is source]
        weight = sum(nature[name] for name in own) / sum(nature.values()) if source.weight is None else source.weight
        parts = nature if any(nature[name] for name in own) else tokens
        shares |= {name: weight * parts[name] / sum(parts[each] for each in own) for name in own}
        if mix.long_share and mix.balance == "source":
            shares |= {name: weight * (mix.long_share if ">=" in name else 1 - mix.long_share) for name in own}
    if mix.long_share and mix.balance == "all":
        whole = {name: sum(tokens[each] for other, each, _ in groups if other is of) for of, name, _ in groups}
        for side in (True, False):
            if not sum(share for name, share in shares.items() if (">=" in name) == side):  # all of it was read
                own = {name: of for of, name, _ in groups if (">=" in name) == side}
                shares |= {name: (of.weight or whole[name]) * tokens[name] / whole[name] for name, of in own.items()}
        long = sum(share for name, share in shares.items() if ">=" in name)
        short = sum(share for name, share in shares.items() if ">=" not in name)
        factors = {True: mix.long_share / long, False: (1 - mix.long_share) / short}
        shares = {name: share * factors[">=" in name] for name, share in shares.items()}
    if mix.max_repeats:
        caps = {name: max(0, mix.max_repeats * tokens[name] - given[name]) / total for name in tokens}
        over = [name for name in shares if shares[name] > caps[name] * (1 + 1e-12)]
        if over and mix.on_cap == "error":
            times = {name: (given[name] + shares[name] * total) / tokens[name] for name in over}
            return {name: (times[name], 100 * shares[name]) for name in over if times[name] > max(times.values()) - 1e-9}
        if over and sum(caps.values()) < 1:
            return {"all documents": (100 * sum(caps.values()),)}
        if over:  # all grow alike until they are at their cap
            low, high = 0.0, 1e6
            for _ in range(200):
                factor = (low + high) / 2
                full = sum(min(caps[name], factor * shares[name]) for name in shares) < 1
                low, high = (factor, high) if full else (low, factor)
            shares = {name: min(caps[name], high * share) for name, share in shares.items()}
    return {name: (list(documents), tokens[name], shares[name]) for _, name, documents in groups if shares[name] > 0}


@st.composite
def mixes(draw):
    """A mix of one to three sources, their lengths, what was read of them, and tokens of a run."""
    sources = draw(st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=12), min_size=1, max_size=3))
    weighed = draw(st.booleans())
    some = st.none() | st.integers(1, 30)
    configs = [
        {"path": f"s{number}", "weight": draw(st.integers(1, 5)) if weighed else None, "drop_shorter": draw(some)}
        | {"drop_longer": draw(st.none() | st.integers(25, 70))}
        for number in range(len(sources))
    ]
    rules = {"sources": configs, "drop_shorter": draw(some), "drop_longer": draw(st.none() | st.integers(25, 70))}
    if draw(st.booleans()):
        rules |= {"long_length": draw(st.integers(2, 40)), "long_share": draw(st.sampled_from([0.25, 0.8]))}
        rules |= {"balance": draw(st.sampled_from(["source", "all"]))}
    if draw(st.booleans()):
        rules |= {
            "max_repeats": draw(st.sampled_from([0.5, 1, 2, 4.5])),
            "on_cap": draw(st.sampled_from(["error", "renormalize"])),
        }
    lengths = [n for source in sources for n in source]
    times = [draw(st.integers(0, 2)) for _ in sources]  # some sources are used up, others hardly begun
    times = [max(0, came - draw(st.integers(0, 3)) // 3) for came, source in zip(times, sources, strict=True) for _ in source]
    times = times if draw(st.booleans()) else None
    parts = [(d, n // 3, n - n // 3) for d, n in enumerate(lengths) if times and times[d] and n > 3 and draw(st.booleans())]
    past = times and Remaining(np.array(times, np.int32), Pieces(*np.array(parts, np.int64).reshape(-1, 3).T))
    return build(MixConfig, rules), sources, times or [0] * len(lengths), parts, past, draw(st.integers(20, 2000))


@settings(max_examples=80, deadline=None)
@given(case=mixes())
def test_a_plan_is_that_of_a_stratum_at_a_time(case):
    """`plan_mix` with `_strata_of`, `_up_weigh`, `_cap`, `_unread_first`, `_tokens_read`; `Stratum.members`."""
    mix, sources, times, parts, past, total = case
    lengths, reasons = [n for source in sources for n in source], ("is left after", "has no documents", "no source has")
    shards = [SimpleNamespace(n_documents=len(each), lengths=np.array(each, np.int32), shards=None) for each in sources]
    documents = Documents([source.label for source in mix.sources], shards)
    documents.check = lambda: None
    read = [n * times[d] for d, n in enumerate(lengths)]
    for document, start, stop in parts:
        read[document] -= stop - start
    try:
        planned = plan_mix(mix, documents, total, past)
    except ConfigError as error:
        planned = error.mend
    if isinstance(planned, str):
        if not any(reason in planned for reason in reasons):
            told = re.match(r"(.*?) (?:would have to come|together give) ([\d.]+)(?: times for ([\d.]+))?", planned).groups()
            numbers = [float(number) for number in told[1:] if number]
            assert numbers == pytest.approx(plain_shares(mix, sources, total, read)[told[0]], abs=0.051)
        return
    expected = plain_shares(mix, sources, total, read)
    assert [stratum.name for stratum in planned] == list(expected)
    assert sum(stratum.share for stratum in planned) == pytest.approx(1)
    for stratum, (members, tokens, share) in zip(planned, expected.values(), strict=True):
        assert (stratum.documents, stratum.tokens) == (len(members), tokens)
        assert stratum.share == pytest.approx(share, rel=1e-9, abs=1e-12)
        assert stratum.members(documents).tolist() == members
        assert stratum.members(documents).dtype == np.uint32
        assert stratum.repeats(total) == pytest.approx(share * total / tokens)
        assert stratum.most_repeats(total) in (math.ceil(share * total / tokens), round(share * total / tokens))


@pytest.mark.parametrize(("weights", "within"), [((None, None), 0.5), ((0.8, 0.2), 0.8)])
def test_a_side_that_was_read_through_keeps_its_share(weights, within):
    """Over all sources: of the unread alone it has none, which divided by zero, and the other side was all of the mix."""
    sources = [{"path": path, "weight": weight} for path, weight in zip("ab", weights, strict=True)]
    mix = build(MixConfig, {"sources": sources, "long_length": 50, "long_share": 0.75, "balance": "all"})
    lengths = [np.array([4] * 10 + [100] * 10, np.int32)] * 2
    documents = Documents("ab", [SimpleNamespace(n_documents=20, lengths=each) for each in lengths])
    documents.check = lambda: None
    past = Remaining(np.array(([1] * 10 + [0] * 10) * 2, np.int32), Pieces.none())
    planned = {stratum.name: stratum.share for stratum in plan_mix(mix, documents, 500, past)}
    assert planned == pytest.approx(
        {"a < 50": 0.25 * within, "a >= 50": 0.75 * within, "b < 50": 0.25 * (1 - within), "b >= 50": 0.75 * (1 - within)}
    )
