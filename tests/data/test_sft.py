"""Instruction windows: every label is the next token of its own instance, weighed by its role; shares are kept."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data.sft import InstructionConfig, InstructionWindows, epochs, loss_units, pack_best_fit, plan_blend, window
from nemo_longctx.data.sft_instances import ANSWER, PROMPT

PAD = 0


class Listed:
    """Instances in memory, in the form of `Instances`: token = 1,000 * instance + place; the last third answers."""

    def __init__(self, lengths, first=1):
        self.lengths = np.array(lengths)
        self.first = first

    def __getitem__(self, number):
        n = int(self.lengths[number])
        roles = np.where(np.arange(n) >= n - n // 3, ANSWER, PROMPT).astype(np.uint8)
        return 1000 * (self.first + number) + np.arange(n), roles


def pretraining_of(seq_length):
    def make(n):
        window = {
            "tokens": np.arange(seq_length) + 900_000,
            "labels": np.arange(seq_length) + 900_001,
            "loss_mask": np.ones(seq_length, np.float32),
            "position_ids": np.arange(seq_length),
            "cu_seqlens": np.array([0, seq_length], np.int32),
        }
        return [window] * n

    return make


@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=30),
    seed=st.integers(0, 5),
    weight=st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    kind=st.sampled_from(["short", "long"]),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_instance_once_with_its_weights(lengths, seed, weight, kind):
    instances = Listed(lengths)
    config = InstructionConfig(seq_length=40, blend={kind: 1.0}, prompt_loss_weight=weight, seed=seed)
    epoch = len(InstructionWindows(config, n_samples=1, pad_id=PAD, **{kind: [instances]})._bins[kind])
    windows = InstructionWindows(config, n_samples=epoch, pad_id=PAD, **{kind: [instances]})
    seen = []
    for sample in windows:
        edges = sample["cu_seqlens"].tolist()
        assert edges[0] == 0
        assert edges[-1] == 40
        assert kind == "short" or len(edges) <= 3
        for begin, end in itertools.pairwise(edges):
            tokens, labels, mask = (sample[key][begin:end] for key in ("tokens", "labels", "loss_mask"))
            np.testing.assert_array_equal(sample["position_ids"][begin:end], np.arange(end - begin))
            if tokens[0] == PAD:
                assert not mask.any()
                assert end == 40
                continue
            number = int(tokens[0]) // 1000 - 1
            ids, roles = instances[number]
            seen.append(number)
            np.testing.assert_array_equal(np.append(tokens, labels[-1]), ids)
            np.testing.assert_array_equal(labels[:-1], tokens[1:])
            answered = mask[roles[1:] == ANSWER]
            prompted = mask[roles[1:] == PROMPT]
            assert (answered == answered[0]).all()
            np.testing.assert_allclose(prompted / answered[0], weight if kind == "long" else 0.0, rtol=1e-6)
            assert (mask == np.round(mask)).all()
    assert sorted(seen) == list(range(len(lengths)))


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=80))
@settings(max_examples=60, deadline=None)
def test_packs_fit_and_waste_little(lengths):
    bins = pack_best_fit(np.array(lengths), 100)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in members) for members in bins]
    assert max(loads) <= 100
    assert sum(load <= 50 for load in loads) <= 1  # two half-empty bins would have been one


def test_blend_keeps_shares_of_tokens_to_a_window():
    draw = np.random.default_rng(0)
    tokens = {"short": draw.integers(90, 101, 50), "long": draw.integers(5, 101, 37), "pretraining": np.array([100])}
    shares = {"short": 0.5, "long": 0.3, "pretraining": 0.2}
    streams = {name: epochs(counts, (7, number)) for number, (name, counts) in enumerate(tokens.items())}
    plan = plan_blend(streams, shares, 2000)
    given_tokens, taken = dict.fromkeys(shares, 0), {name: [] for name in shares}
    for name, sample in plan:
        taken[name].append(sample)
        given_tokens[name] += int(tokens[name][sample])
        total = sum(given_tokens.values())
        assert all(abs(given_tokens[source] - shares[source] * total) <= 200 for source in shares)
    for name, counts in tokens.items():
        n = len(counts)
        whole = [taken[name][at : at + n] for at in range(0, len(taken[name]) - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in whole)
        assert n == 1 or whole[0] != whole[1]  # each epoch in an order of its own


def test_blended_windows_are_the_same_whoever_reads_them():
    config = InstructionConfig(seq_length=64, blend={"short": 0.4, "long": 0.4, "pretraining": 0.2}, prompt_loss_weight=0.5)

    def make():
        sources = {"short": [Listed([10, 20, 30] * 5)], "long": [Listed([50, 60], first=20), Listed([64], first=30)]}
        return InstructionWindows(config, n_samples=30, pad_id=PAD, pretraining=pretraining_of(64), **sources)

    first, second = make(), make()
    order = np.random.default_rng(0).permutation(30)
    for number in order.tolist():
        for key, values in first[number].items():
            np.testing.assert_array_equal(values, second[number][key])
    kinds = [first.source(number) for number in range(30)]
    assert set(kinds) == {"short", "long", "pretraining"}
    unit = {kind: first[kinds.index(kind)]["loss_mask"].max() for kind in set(kinds)}
    assert unit == {"short": 2.0, "long": 2.0, "pretraining": 2.0}  # an answer's token and a pretraining token count alike
    with pytest.raises(IndexError):
        first[30]


def test_pretraining_alone_counts_every_token():
    config = InstructionConfig(seq_length=8, blend={"pretraining": 1.0}, prompt_loss_weight=0.25)
    sample = InstructionWindows(config, n_samples=3, pad_id=PAD, pretraining=pretraining_of(8))[2]
    assert (sample["loss_mask"] == 4).all()


def test_padding_equal_to_a_real_token_changes_nothing():
    """A pad id that also occurs in the text keeps its weight there: places are masked, not ids."""
    ids, roles = np.array([5, PAD, PAD, 7, PAD]), np.array([PROMPT, PROMPT, ANSWER, ANSWER, ANSWER], dtype=np.uint8)
    sample = window([(ids, roles)], seq_length=7, pad_id=PAD, units=(0, 1))
    assert sample["loss_mask"].tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert sample["labels"].tolist()[:4] == [PAD, PAD, 7, PAD]
    assert sample["cu_seqlens"].tolist() == [0, 4, 7]


def test_too_long_instances_are_never_cut():
    config = {"seq_length": 20, "blend": {"long": 1.0}}
    with pytest.raises(ConfigError, match="long instance 1 needs windows of 29"):
        InstructionWindows(InstructionConfig(**config), n_samples=4, pad_id=PAD, long=[Listed([21, 30, 5])])
    windows = InstructionWindows(
        InstructionConfig(**config, on_too_long="drop"), n_samples=4, pad_id=PAD, long=[Listed([21, 30, 5])]
    )
    assert windows.too_long == 1
    with pytest.raises(ConfigError, match="none of its instances fits"):
        InstructionWindows(InstructionConfig(**config, on_too_long="drop"), n_samples=4, pad_id=PAD, long=[Listed([30])])


@pytest.mark.parametrize(("weight", "units"), [(1, (1, 1)), (0, (0, 1)), (0.1, (1, 10)), (1 / 3, (1, 3)), (0.37, (37, 100))])
def test_units_are_whole_and_exact(weight, units):
    assert loss_units(weight) == units


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt_loss_weight": 0.123}, "nearest is"),
        ({"prompt_loss_weight": 1.5}, r"in \[0, 1\]"),
        ({"blend": {"shrot": 1.0}}, "short"),
        ({"blend": {"short": 0.5}}, "add up to 1"),
        ({"blend": {"short": 1.5, "long": -0.5}}, "above 0"),
        ({"seq_length": 1}, "at least 2"),
        ({"on_too_long": "cut"}, "drop"),
    ],
)
def test_bad_settings(values, said):
    with pytest.raises(ConfigError, match=said):
        InstructionConfig(**values)


def test_a_source_without_data_is_named():
    with pytest.raises(ConfigError, match=r"data\.long.*50%"):
        InstructionWindows(InstructionConfig(blend={"short": 0.5, "long": 0.5}), n_samples=1, pad_id=0, short=[Listed([5])])


def test_settings_by_default_and_at_their_bounds():
    plain = InstructionConfig()
    assert (plain.seq_length, dict(plain.blend), plain.prompt_loss_weight) == (16_384, {"short": 1.0}, 1.0)
    assert (plain.on_too_long, plain.seed) == ("error", 1234)
    InstructionConfig(seq_length=2, blend={"short": 0.5 + 4e-7, "long": 0.5}, prompt_loss_weight=0, on_too_long="drop")
    for bad in (0.5 - 2e-6, 0.5 + 2e-6):
        with pytest.raises(ConfigError, match="shares of tokens add up to 1"):
            InstructionConfig(blend={"short": 0.5, "long": bad})
    for weight in (-0.01, 1.01):
        with pytest.raises(ConfigError, match=r"prompt_loss_weight=.*: must be in \[0, 1\]"):
            loss_units(weight)
    assert (loss_units(0.99), loss_units(1 / 100 + 5e-10)) == ((99, 100), (1, 100))
    with pytest.raises(ConfigError, match=r"at most 100 parts, for exact counts; the nearest is 0\.01 \(1/100\)"):
        loss_units(1 / 101 + 5e-5)


def test_the_order_of_a_seed_and_what_windows_hold_are_told():
    lengths = {"short": [10, 20, 30, 9, 21], "long": [41, 30]}
    config = InstructionConfig(seq_length=40, blend={"long": 0.5, "short": 0.5}, prompt_loss_weight=0.25, seed=5)
    sources = {name: [Listed(counts[:1]), Listed(counts[1:], first=1)] for name, counts in lengths.items()}
    windows = InstructionWindows(config, n_samples=9, pad_id=PAD, **sources)
    fit = pack_best_fit(np.array(lengths["short"]) - 1, 40)
    bins = {"short": fit, "long": [[0], [1]]}
    sizes = {name: [sum(lengths[name][item] - 1 for item in members) for members in bins[name]] for name in bins}

    def stream(place, n):
        for epoch in itertools.count():
            yield from np.random.default_rng([5, place, epoch]).permutation(n).tolist()

    streams = {"short": stream(0, len(fit)), "long": stream(1, 2)}
    given_tokens = {"long": 0, "short": 0}
    for number in range(9):
        name = "long" if given_tokens["long"] <= given_tokens["short"] else "short"
        members = bins[name][next(streams[name])]
        given_tokens[name] += sum(lengths[name][item] - 1 for item in members)
        assert windows.source(number) == name
        inside = ["[0]:0" if item == 0 else f"[1]:{item - 1}" for item in members]  # numbered in their files
        assert windows.documents_of([number]) == [f"{name}{item}" for item in inside]
        mask = windows[number]["loss_mask"]
        assert set(mask.tolist()) <= ({0.0, 1.0, 4.0} if name == "long" else {0.0, 4.0})
    assert sizes["long"] == [40, 29]
    whole = windows.documents_of(range(9))
    assert len(whole) == len(set(whole)) == 7  # one number may be of two files
    alone = InstructionWindows(config, n_samples=2, pad_id=PAD, **{name: [Listed(counts)] for name, counts in lengths.items()})
    assert alone.documents_of([0]) in (["long:0"], ["long:1"])
