"""The stream is a function of (seed, config, token address): what that promises, over random corpora, curricula and ranks."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data.best_fit import open_windows as open_packed
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.data.mixture import Documents, MixConfig, SourceConfig
from nemo_longctx.data.order import open_order
from nemo_longctx.data.writer import CorpusWriter

PER_DOCUMENT = 1000  # tests/data/conftest.py
property_test = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def open_windows(prefixes, curriculum, cache_dir, *, seed=1, document_masking=False, packing="concatenate", **mix):
    weights = mix.pop("weights", [None] * len(prefixes))
    sources = [SourceConfig(path=path, weight=weight) for path, weight in zip(prefixes, weights, strict=True)]
    mix = MixConfig(sources=sources, share_tolerance=0.999, **mix)
    documents = Documents.open(mix)
    order = open_order(mix, documents, curriculum, seed=seed, cache_dir=str(cache_dir))
    return open_packed(order, curriculum, packing=packing, seed=seed, document_masking=document_masking)


@st.composite
def runs(draw):
    """Lengths of one to three sources, and a curriculum of one to four stages whose lengths rise and fall."""
    sources = draw(st.lists(st.lists(st.integers(1, 120), min_size=1, max_size=40), min_size=1, max_size=3))
    lengths = draw(st.lists(st.sampled_from([8, 16, 32, 64]), min_size=1, max_size=4))
    steps = draw(st.lists(st.integers(1, 6), min_size=len(lengths), max_size=len(lengths)))
    ends = np.cumsum(steps)
    stages = [
        StageConfig(until=end / sum(steps), seq_length=length) for end, length in zip(ends.tolist(), lengths, strict=True)
    ]
    return sources, Curriculum(stages=stages, tokens_per_step=128, total_tokens=128 * sum(steps))


def stream_of(windows):
    """All tokens by address, put together from the samples in the order of training."""
    stream = np.full(windows.curriculum.total_tokens, -1)
    for number in range(len(windows)):
        stage = windows.curriculum.stage_of_sample(number)
        window = windows.stages[stage.number].window(number - stage.first_sample)
        place = slice(window.address, window.address + window.seq_length)
        assert (stream[place] == -1).all(), "an address came twice"
        stream[place] = windows[number]["tokens"]
    assert (stream >= 0).all(), "an address never came"
    return stream


@property_test
@given(run=runs(), seed=st.integers(0, 2**40))
def test_every_address_comes_once_and_visits_are_whole(telling_corpora, tmp_path_factory, run, seed):
    sources, curriculum = run
    windows = open_windows(telling_corpora(sources), curriculum, tmp_path_factory.mktemp("cache"), seed=seed)
    stream = stream_of(windows)
    # Read as a whole the stream is whole documents, one after the other; only the last may be cut.
    lengths, position = [n for source in sources for n in source], 0
    while position < len(stream):
        document = int(stream[position]) // PER_DOCUMENT
        piece = stream[position : position + lengths[document]]
        assert piece.tolist() == list(range(document * PER_DOCUMENT, document * PER_DOCUMENT + len(piece)))
        position += len(piece)


@property_test
@given(run=runs(), seed=st.integers(0, 9))
def test_no_document_comes_again_before_all_have_come(telling_corpora, tmp_path_factory, run, seed):
    sources, curriculum = run
    windows = open_windows(telling_corpora(sources), curriculum, tmp_path_factory.mktemp("cache"), seed=seed)
    source_of = np.repeat(np.arange(len(sources)), [len(lengths) for lengths in sources])
    missing = [sum(lengths) for lengths in sources]  # tokens of each source that have not come in this epoch
    times = [Counter() for _ in sources]
    epoch = [0] * len(sources)
    for number in range(len(windows)):  # the order of training, across stages
        for token in windows[number]["tokens"].tolist():
            source = int(source_of[token // PER_DOCUMENT])
            assert times[source][token] == epoch[source], "it came again while others had not come"
            times[source][token] += 1
            missing[source] -= 1
            if not missing[source]:
                epoch[source] += 1
                missing[source] = sum(sources[source])


@property_test
@given(run=runs(), ranks=st.sampled_from([1, 2, 4]), kills=st.lists(st.integers(1, 400), max_size=4))
def test_ranks_and_restarts_do_not_change_what_a_step_sees(telling_corpora, tmp_path_factory, run, ranks, kills):
    sources, curriculum = run
    prefixes, cache = telling_corpora(sources), tmp_path_factory.mktemp("cache")
    windows = open_windows(prefixes, curriculum, cache)
    expected = [windows[number]["tokens"].tolist() for number in range(len(windows))]
    seen, address = [], 0
    for steps in [*kills, curriculum.total_steps]:
        again = open_windows(prefixes, curriculum, cache)  # another process
        for _ in range(steps):
            if address == curriculum.total_tokens:
                break
            stage = curriculum.stage_at_token(address)
            first = curriculum.samples_at_token(address)
            if stage.global_batch_size % ranks:
                dealt = range(first, first + stage.global_batch_size)
            else:
                dealt = sorted(n for r in range(ranks) for n in range(first + r, first + stage.global_batch_size, ranks))
            seen += [again[number]["tokens"].tolist() for number in dealt]
            address += curriculum.tokens_per_step
            assert curriculum.samples_at_token(address) == len(seen)
            assert curriculum.tokens_at_sample(len(seen)) == address
    assert seen == expected


@property_test
@given(run=runs(), masking=st.booleans())
def test_labels_masks_and_positions(telling_corpora, tmp_path_factory, run, masking):
    sources, curriculum = run
    windows = open_windows(telling_corpora(sources), curriculum, tmp_path_factory.mktemp("cache"), document_masking=masking)
    stream = stream_of(windows)
    for number in range(len(windows)):
        sample = windows[number]
        stage = curriculum.stage_of_sample(number)
        address, length = windows.stages[stage.number].window(number - stage.first_sample).address, stage.seq_length
        tokens, labels = sample["tokens"], sample["labels"]
        assert labels[:-1].tolist() == tokens[1:].tolist()
        if address + length < len(stream):
            assert labels[-1] == stream[address + length]
        assert [sample[key].dtype for key in ("tokens", "labels", "loss_mask", "position_ids")] == [
            np.int64,
            np.int64,
            np.float32,
            np.int64,
        ]
        if not masking:
            assert "cu_seqlens" not in sample
            assert sample["loss_mask"].all()
            assert sample["position_ids"].tolist() == list(range(length))
            continue
        # The naive way: a document begins where the position in it is 0, or with the window.
        begins = [i for i in range(length) if i == 0 or tokens[i] % PER_DOCUMENT == 0]
        assert sample["cu_seqlens"].tolist() == [*begins, length]
        assert sample["cu_seqlens"].dtype == np.int32
        assert sample["position_ids"].tolist() == [i - max(b for b in begins if b <= i) for i in range(length)]
        assert sample["loss_mask"].tolist() == [float(labels[i] == tokens[i] + 1) for i in range(length)]


@property_test
@given(run=runs(), masking=st.booleans(), packing=st.sampled_from(["concatenate", "best_fit"]), data=st.data())
def test_no_token_is_masked_or_changed_for_what_it_is(telling_corpora, tmp_path_factory, run, masking, packing, data):
    """Text of three tokens only, those that others take for padding or the end of a document: what counts is where they are."""
    sources, curriculum = run
    folder, seed = tmp_path_factory.mktemp("plain"), data.draw(st.integers(0, 99))
    rng, texts, plain = np.random.default_rng(seed), [], []
    for source, lengths in enumerate(sources):
        plain.append(str(folder / f"source{source}"))
        with CorpusWriter(plain[-1], np.int32) as writer:
            for length in lengths:
                texts.append(rng.integers(0, 3, length))
                writer.add_document(texts[-1])
    kind = {"document_masking": masking, "packing": packing, "seed": seed}
    told = open_windows(telling_corpora(sources), curriculum, tmp_path_factory.mktemp("cache"), **kind)
    windows = open_windows(plain, curriculum, tmp_path_factory.mktemp("cache"), **kind)
    for number in range(len(windows)):
        sample, where = windows[number], told[number]
        for key in sample.keys() - {"tokens", "labels"}:
            assert sample[key].tolist() == where[key].tolist()
        for key in ("tokens", "labels"):
            read = np.array([texts[token // PER_DOCUMENT][token % PER_DOCUMENT] for token in where[key].tolist()])
            real = np.cumsum(where[key][::-1])[::-1] > 0  # all but zeros at the end, which may be padding
            assert (sample[key] == read)[real].all()


def test_seeds_and_configs_give_other_streams_and_the_same_gives_the_same(telling_corpora, tmp_path):
    prefixes = telling_corpora([[10] * 50, [20] * 30])
    curriculum = Curriculum.constant(seq_length=16, global_batch_size=4, total_steps=20)

    def digest(**changes):
        windows = open_windows(prefixes, changes.pop("curriculum", curriculum), tmp_path, **changes)
        return hashlib.sha256(b"".join(windows[n]["tokens"].tobytes() for n in range(len(windows)))).hexdigest()

    first = digest()
    for path in tmp_path.glob("*.order"):
        path.unlink()
    assert digest() == first
    other = Curriculum.constant(seq_length=32, global_batch_size=2, total_steps=20)
    assert len({first, digest(seed=2), digest(weights=[0.7, 0.3]), digest(curriculum=other)}) == 4


def test_a_source_keeps_its_share_in_each_stage(telling_corpora, tmp_path):
    rng = np.random.default_rng(0)
    sources = [rng.integers(1, 200, 300).tolist(), rng.integers(1, 50, 900).tolist()]
    stages = [StageConfig(until=0.3, seq_length=16), StageConfig(until=1.0, seq_length=64)]
    curriculum = Curriculum(stages=stages, tokens_per_step=256, total_tokens=256 * 400)
    windows = open_windows(telling_corpora(sources), curriculum, tmp_path, weights=[0.3, 0.7])
    stream, rows = stream_of(windows), windows.order.delivered(curriculum)
    for row, stage in zip(rows, curriculum.plan, strict=True):
        part = stream[stage.first_token : stage.end_token]
        counted = np.bincount(part // PER_DOCUMENT >= 300, minlength=2)
        assert counted.tolist() == row.tolist()
        np.testing.assert_allclose(counted / len(part), [0.3, 0.7], atol=0.001)


def test_samples_outside_the_run(telling_corpora, tmp_path):
    windows = open_windows(
        telling_corpora([[10] * 5]), Curriculum.constant(seq_length=8, global_batch_size=2, total_steps=2), tmp_path
    )
    for number in (-1, 4):
        with pytest.raises(IndexError):
            windows[number]
    with pytest.raises(ConfigError, match="no window begins here"):
        windows.at_token(4)
    assert windows.at_token(8)["tokens"].tolist() == windows[1]["tokens"].tolist()


def test_a_damaged_order_file_is_refused(telling_corpora, tmp_path):
    prefixes, curriculum = telling_corpora([[10] * 5]), Curriculum.constant(seq_length=8, global_batch_size=2, total_steps=2)
    open_windows(prefixes, curriculum, tmp_path)
    (path,) = Path(tmp_path).glob("*.order")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="damaged"):
        open_windows(prefixes, curriculum, tmp_path)


@pytest.mark.parametrize(("packing", "known"), [("concatenate", "cf2ce6eb2fbfe824"), ("best_fit", "24e7356c1d9c720d")])
def test_a_seed_reads_the_stream_that_it_always_read(telling_corpora, tmp_path, packing, known):
    """Another one would go on from a checkpoint of an earlier version with other documents."""
    prefixes = telling_corpora([[10 + 37 * n % 91 for n in range(60)], [3 + 53 * n % 200 for n in range(40)]])
    stages = [StageConfig(until=0.5, seq_length=16), StageConfig(until=1.0, seq_length=128)]
    curriculum = Curriculum(stages=stages, tokens_per_step=128, total_tokens=128 * 160)
    windows = open_windows(prefixes, curriculum, tmp_path, seed=3, packing=packing, weights=[0.7, 0.3])
    tokens = np.concatenate([windows[number]["tokens"] for number in range(len(windows))])
    assert hashlib.sha256(tokens.tobytes()).hexdigest()[:16] == known
