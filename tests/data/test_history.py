"""A stream that is extended: what was read stays read, and comes again only when all of its source has come."""

import dataclasses
import json
import re
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.base_run import data_state
from nemo_longctx.data.best_fit import pack_windows
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.documents import Documents, Pieces
from nemo_longctx.data.history import History, Segment
from nemo_longctx.data.mixture import MixConfig
from nemo_longctx.data.order import open_order
from nemo_longctx.data.seen import Ranges, Remaining, Seen, _read_on
from nemo_longctx.data.stream import Stream, report
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.files import can_be_written

STEP = 256
property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Run:
    """A run as the data module has it, without a trainer."""

    def __init__(self, cache_dir):
        self.cache_dir, self.left, self.now, self.windows, self.token = str(cache_dir), [], None, None, 0
        self.read = []  # token ids in the order of training

    def under(self, sources, stages, steps, *, packing="concatenate", seed=1, **rules):
        """Begin, or go on, under these settings."""
        mix = build(MixConfig, {"sources": sources, "share_tolerance": 0.999, **rules})
        values = {"stages": stages, "tokens_per_step": STEP, "total_tokens": STEP * steps}
        curriculum, documents = build(Curriculum, values), Documents.open(mix)
        if self.now is not None:
            self.left.append(dataclasses.replace(self.now, until=self.token))
        past = History(self.left, origin=self.token, cache_dir=self.cache_dir) if self.left else None
        order = open_order(mix, documents, curriculum, seed=seed, cache_dir=self.cache_dir, past=past)
        self.windows = pack_windows(order, curriculum, packing=packing, seed=seed, document_masking=False)
        now = Segment.of(mix, documents, curriculum, packing=packing, seed=seed)
        self.now = dataclasses.replace(now, first_token=self.token, order=order.digest)
        return self

    def train(self, until):
        """Read up to optimizer step `until`."""
        curriculum = self.windows.curriculum
        for number in range(*map(curriculum.samples_at_token, (self.token, until * STEP))):
            self.read.append(self.windows[number]["tokens"])
        self.token = until * STEP
        return self

    def behind(self, base):
        """Begin as `data.after` does."""
        self.left = [*base.left, dataclasses.replace(base.now, until=base.token)]
        return self


def times_of(runs, n_tokens):
    """How often each token came, by when: the padding's 0 is no document's first token here."""
    counts = Counter()
    for window in (window for run in runs for window in run.read):
        for token in window.tolist():
            counts[token] += token > 0
    return counts


def again_while_unseen(runs, sources):
    """Tokens that came again while others of their source had not come as often, over all runs, in order."""
    source_of = np.repeat(np.arange(len(sources)), [len(lengths) for lengths in sources])
    size, wrong = [sum(lengths) for lengths in sources], 0
    times = Counter()
    at_least = [Counter() for _ in sources]  # how many tokens came so often
    for window in (window for run in runs for window in run.read):
        for token in window.tolist():
            if token == 0:
                continue  # padding, or one token of document 0
            source = int(source_of[token // 1000])
            times[token] += 1
            at_least[source][times[token]] += 1
            before = times[token] - 1
            ready = size[source] - (1 if source == 0 else 0)
            wrong += before > 0 and at_least[source][before] < ready
    return wrong


TEXT = np.random.default_rng(0).integers(5, 150, 160).tolist()
MORE = np.random.default_rng(1).integers(5, 150, 80).tolist()
ONE = [{"until": 1.0, "seq_length": 32}]
CASES = {
    "total_up_by_a_fifth": ({}, ONE, 24),
    "a_stage_added": ({}, [{"until": 0.5, "seq_length": 32}, {"until": 1.0, "seq_length": 128}], 20),
    "a_stage_split": ({}, [{"until": 0.5, "seq_length": 32}, {"until": 1.0, "seq_length": 32}], 20),
    "other_lengths": ({}, [{"until": 1.0, "seq_length": 64}], 20),
    "weights_changed": ({"weights": [0.3, 0.7]}, ONE, 20),
    "a_source_added": ({"more": True}, ONE, 24),
    "another_seed": ({"seed": 9}, ONE, 20),
}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [7, 10, 20])
def test_no_token_is_read_again_while_unseen_ones_are_left(telling_corpora, tmp_path, packing, case, at):
    prefixes = telling_corpora([TEXT, MORE])
    changed, stages, steps = CASES[case]
    weighed = "weights" in changed
    first = [{"path": path, **({"weight": 0.5} if weighed else {})} for path in prefixes[: 2 if weighed else 1]]
    run = Run(tmp_path).under(first, ONE, 20, packing=packing).train(at)
    then = prefixes if weighed or "more" in changed else prefixes[:1]
    weights = changed.get("weights", [None, None])
    sources = [{"path": path, **({"weight": weight} if weight else {})} for path, weight in zip(then, weights, strict=False)]
    if at == 20 and steps == 20:
        steps = 26
    run.under(sources, stages, steps, packing=packing, seed=changed.get("seed", 1)).train(steps)
    times = times_of([run], None)
    unseen = sum(TEXT) + (sum(MORE) if len(then) > 1 else 0) - len(times)
    assert unseen > 100
    if weighed:
        assert again_while_unseen([run], [TEXT, MORE]) == 0
    else:
        assert max(times.values()) == 1
        assert sum(run.windows.order.facts["read_again"]) == 0
        assert run.windows.order.facts["most_repeats"] == [1] * len(then)


@st.composite
def lives(draw):
    """Sources, and settings that a run goes through one after the other, with the step at which each is left."""
    sources = draw(st.lists(st.lists(st.integers(1, 150), min_size=3, max_size=40), min_size=1, max_size=3))
    parts, step = [], 0
    for _ in range(draw(st.integers(2, 4))):
        until = step + draw(st.integers(1, 6))
        total = until + draw(st.integers(0, 6))
        cut = draw(st.integers(1, total))
        lengths = draw(st.lists(st.sampled_from([16, 32, 64, 128]), min_size=2, max_size=2))
        stages = [{"until": 1.0, "seq_length": lengths[0]}]
        if cut < total:
            stages = [{"until": cut / total, "seq_length": lengths[0]}, {"until": 1.0, "seq_length": lengths[1]}]
        shown = draw(st.integers(1, len(sources)))
        weights = [draw(st.integers(1, 4)) for _ in range(shown)]
        parts.append(
            {
                "until": until,
                "steps": total,
                "stages": stages,
                "weights": weights,
                "packing": draw(st.sampled_from(["concatenate", "best_fit"])),
            }
        )
        step = until
    return sources, parts


@settings(property_test, max_examples=10)
@given(life=lives(), fork=st.booleans())
def test_whatever_changes_a_source_is_read_through_before_it_comes_again(telling_corpora, tmp_path_factory, life, fork):
    sources, parts = life
    prefixes, cache = telling_corpora(sources), tmp_path_factory.mktemp("cache")
    run = Run(cache)
    runs = [run]
    for number, part in enumerate(parts):
        total = sum(part["weights"])
        mix = [{"path": p, "weight": w / total} for p, w in zip(prefixes, part["weights"], strict=False)]
        if fork and number == 1:  # another run goes on behind this one
            runs.append(Run(cache).behind(run))
            run = runs[-1]
        run.under(mix, part["stages"], part["steps"], packing=part["packing"]).train(part["until"])
    assert again_while_unseen(runs, sources) == 0


def test_a_history_is_read_again_from_what_a_checkpoint_holds_of_it(telling_corpora, tmp_path):
    (prefix,) = telling_corpora([TEXT])
    one = Run(tmp_path / "a").under([{"path": prefix}], ONE, 20).train(7).under([{"path": prefix}], ONE, 40)
    for path in (tmp_path / "a").glob("*.order"):
        path.unlink()  # a new machine: nothing is kept
    other = Run(tmp_path / "b")
    other.left, other.token = one.left, one.token
    other.under([{"path": prefix}], ONE, 40)
    assert other.windows.order.digest == one.windows.order.digest
    assert one.train(30).read[-1].tolist() == other.train(30).read[-1].tolist()


@property_test
@given(data=st.data())
def test_what_was_read_is_counted_token_by_token(telling_corpora, data):
    """Against counting one token at a time."""
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    (prefix,) = telling_corpora([lengths])
    documents = Documents.open(build(MixConfig, {"sources": [{"path": prefix}]}))
    times = np.array(data.draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths))), np.int32)
    counts = [np.full(length, n) for length, n in zip(lengths, times.tolist(), strict=True)]
    parts = []
    for document, length in enumerate(lengths):
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, length - 1))
            stop = data.draw(st.integers(start + 1, length))
            if stop - start < length:
                parts.append((document, start, stop))
                counts[document][start:stop] -= 1
    pieces = Pieces(*np.array(parts, np.int64).reshape(-1, 3).T)
    ranges = []
    for document, length in enumerate(lengths):  # read on from the least read
        for start, stop in data.draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, length)), max_size=3)):
            inside = np.arange(min(start, stop), max(start, stop))
            least = counts[document].min()
            fits = [i for i in inside.tolist() if counts[document][i] == least]
            for i in fits:
                ranges.append((document, i, i + 1))
                counts[document][i] += 1
    now = _read_on(documents, Remaining(times, pieces), Ranges(*np.array(ranges, np.int64).reshape(-1, 3).T))
    for document, length in enumerate(lengths):
        told = np.full(length, now.times[document])
        for which, start, stop in zip(now.pieces.documents, now.pieces.starts, now.pieces.stops, strict=True):
            if which == document:
                told[start:stop] -= 1
        assert told.tolist() == counts[document].tolist()


def test_a_source_that_was_left_out_for_a_while_is_remembered(telling_corpora, tmp_path):
    prefixes = telling_corpora([TEXT, MORE])
    both, one = [{"path": path} for path in prefixes], [{"path": prefixes[1]}]
    run = Run(tmp_path).under(both, ONE, 40).train(10).under(one, ONE, 40).train(14).under(both, ONE, 40).train(40)
    assert again_while_unseen([run], [TEXT, MORE]) == 0
    assert Seen().of(run.windows.order.documents).times.sum() == 0


def stream(prefixes, steps, cache_dir, **changes):
    weights = changes.pop("weights", [None] * len(prefixes))
    sources = [{"path": p, **({"weight": w} if w else {})} for p, w in zip(prefixes, weights, strict=True)]
    mix = build(MixConfig, {"sources": sources, "share_tolerance": 0.9, **changes.pop("mix", {})})
    values = {"stages": changes.pop("stages", ONE), "tokens_per_step": STEP, "total_tokens": STEP * steps}
    return Stream(mix, build(Curriculum, values), cache_dir=str(cache_dir), **changes)


def test_what_a_stream_goes_on_under_unasked_and_what_not(telling_corpora, tmp_path):
    prefixes, other = telling_corpora([TEXT, MORE]), telling_corpora([TEXT, MORE[1:]])
    first = stream(prefixes, 20, tmp_path, weights=[0.5, 0.5])
    first.begin()
    state, token = json.loads(json.dumps(first.state())), 7 * STEP
    assert stream(prefixes, 20, tmp_path, weights=[0.5, 0.5]).go_on(state, token) == ([], [])
    two = [{"until": 0.5, "seq_length": 32}, {"until": 1.0, "seq_length": 64}]
    for prefix, steps, changes, told, refused in [
        (prefixes, 24, {}, ["curriculum", "order"], []),
        (prefixes, 20, {"stages": two}, ["curriculum", "order"], []),
        (prefixes, 20, {"weights": [0.2, 0.8]}, ["data.mix", "order"], []),
        (prefixes[1:], 20, {"weights": [1.0]}, ["data", "data.mix", "order"], []),
        (other, 20, {}, ["data"], ["data"]),
        (prefixes, 20, {"seed": 2}, ["data.seed", "order"], ["data.seed"]),
        (prefixes, 20, {"packing": "best_fit"}, ["data.packing"], ["data.packing"]),
        (prefixes, 20, {"document_masking": True}, ["data.document_masking"], ["data.document_masking"]),
        (prefixes, 20, {"mix": {"drop_shorter": 9}}, ["data.mix", "order"], ["data.mix"]),
    ]:
        now = stream(prefix, steps, tmp_path, **({"weights": [0.5, 0.5]} | changes))
        assert now.go_on(state, token) == (told, refused)
        assert (now.windows is None) == bool(refused)
        assert now.go_on(state, token, allow_change=True)[0] == told
        assert now.windows.order.origin == (0 if told == ["data.document_masking"] else token)
        assert [segment.until for segment in now.segments] == ([None] if now.windows.order.origin == 0 else [token, None])
    again = stream(prefixes, 20, tmp_path, weights=[0.5, 0.5])
    assert again.go_on(state, token, after="runs/base") == (["data.after"], ["data.after"])
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    base = str(tmp_path / "base")
    for was, after, same in (
        (base, base + "/", True), (base, f"{tmp_path}/other/../base", True), (base, str(tmp_path / "other"), False),
        (base, None, False), (str(tmp_path / "moved"), base, True), ("moved", "moved", True),
    ):  # fmt: skip
        told = ([], []) if same else (["data.after"], ["data.after"])
        assert stream(prefixes, 20, tmp_path, weights=[0.5, 0.5]).go_on(state | {"after": was}, token, after=after) == told
    done = stream(prefixes, 7, tmp_path, weights=[0.5, 0.5])
    done.go_on(state, token)
    assert done.state()["segments"] == state["segments"]  # it stands at its end: nothing of it is forgotten


def test_a_run_begins_behind_what_another_one_read(telling_corpora, tmp_path):
    """As the demo: the extension goes on where its base stopped, whatever its lengths."""
    torch = pytest.importorskip("torch")
    prefixes = telling_corpora([TEXT, MORE])
    base = stream(prefixes[:1], 20, tmp_path / "a")
    base.begin()
    module = {"token_address": 20 * STEP, "consumed_samples": 0, "made_of": {}, "history": [], **base.state()}
    weights = tmp_path / "checkpoint" / "weights"
    weights.mkdir(parents=True)
    state = {"state_dict": OrderedDict(w=torch.ones(2)), "rng": np.float64(1), "path": weights, "LongContextDataModule": module}
    torch.save(state, weights / "common.pt")
    behind = stream(prefixes, 10, tmp_path / "b", stages=[{"until": 1.0, "seq_length": 128}])
    behind.begin("runs/base", weights.parent)
    read = [base.windows[n]["tokens"] for n in range(len(base.windows))]
    read += [behind.windows[n]["tokens"] for n in range(len(behind.windows))]
    assert np.unique(np.concatenate(read), return_counts=True)[1].max() == 1
    resumed = stream(prefixes, 10, tmp_path / "c", stages=[{"until": 1.0, "seq_length": 128}])
    assert resumed.go_on(json.loads(json.dumps(behind.state())), 4 * STEP, after="runs/base") == ([], [])
    assert resumed.windows.order.digest == behind.windows.order.digest
    with pytest.raises(ConfigError, match=r"data\.after='runs/base': it read none of this run's corpora"):
        stream(telling_corpora([MORE]), 4, tmp_path / "d").begin("runs/base", weights.parent)
    del module["segments"]
    torch.save(state, weights / "common.pt")
    with pytest.raises(ConfigError, match=r"data\.after='runs/base': .* does not say which documents it read"):
        stream(prefixes, 10, tmp_path / "d").begin("runs/base", weights.parent)


def test_a_checkpoint_of_any_content_runs_nothing_when_its_state_is_read(tmp_path):
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "weights").mkdir()
    torch.save({"LongContextDataModule": {"token_address": 3}, "trap": Trap()}, tmp_path / "weights" / "common.pt")
    assert data_state(tmp_path) == {"token_address": 3}
    assert not (tmp_path / "ran").exists()


def test_changed_data_of_the_past_are_told(telling_corpora, tmp_path):
    prefixes = telling_corpora([TEXT, MORE])
    first = stream(prefixes, 20, tmp_path / "a", weights=[0.5, 0.5])
    first.begin()
    state = json.loads(json.dumps(first.state()))
    moved = tmp_path / "moved"
    moved.mkdir()
    for prefix in prefixes:
        for suffix in ("bin", "idx"):
            Path(f"{prefix}.{suffix}").rename(moved / f"{Path(prefix).name}.{suffix}")
    here = [str(moved / Path(prefix).name) for prefix in prefixes]
    now = stream(here, 24, tmp_path / "b", weights=[0.5, 0.5])
    assert now.go_on(state, 7 * STEP) == (["curriculum", "order"], [])  # found where its source lies now
    with pytest.raises(ConfigError, match=r"data\.mix\.sources='source0': up to token 1792 .* where it is no more"):
        stream(here[1:], 24, tmp_path / "c").go_on(state, 7 * STEP)


def test_a_corpus_of_another_file_name_is_the_source_it_was(telling_corpora, tmp_path):
    """Moved to another file name, a corpus was taken for another source: the rest of the run read other documents."""
    prefixes = telling_corpora([TEXT, MORE])
    first = stream(prefixes, 20, tmp_path / "a", weights=[0.5, 0.5])
    first.begin()
    state, moved = json.loads(json.dumps(first.state())), [str(tmp_path / name) for name in ("text", "more")]
    for prefix, now in zip(prefixes, moved, strict=True):
        for suffix in ("bin", "idx"):
            Path(f"{prefix}.{suffix}").rename(f"{now}.{suffix}")
    again = stream(moved, 20, tmp_path / "b", weights=[0.5, 0.5])
    assert again.go_on(state, 7 * STEP) == ([], [])
    assert again.kept_names == {"text": "source0", "more": "source1"}
    assert again.windows.order.digest == first.windows.order.digest
    assert [segment["shards"] for segment in again.state()["segments"]] == [state["segments"][0]["shards"]]
    longer = stream(moved, 24, tmp_path / "c", weights=[0.5, 0.5])
    assert longer.go_on(state, 7 * STEP) == (["curriculum", "order"], [])
    named = stream(moved, 20, tmp_path / "d", weights=[0.5, 0.5])
    sources = [dataclasses.replace(each, name=name) for each, name in zip(named.mix.sources, "xy", strict=True)]
    named.mix, named.documents = dataclasses.replace(named.mix, sources=tuple(sources)), named.documents.renamed("xy")
    named._keep_names(Segment(**state["segments"][0]))
    assert named.kept_names == {}  # what the user calls it, it is


def test_the_report_tells_what_comes_again(telling_corpora, tmp_path):
    (prefix,) = telling_corpora([[40] * 130])
    first = stream([prefix], 20, tmp_path)
    first.begin()
    state = first.state()
    now = stream([prefix], 24, tmp_path)
    now.go_on(state, 20 * STEP)
    told = report(now.windows)
    assert f"the stream goes on at token {20 * STEP} with what was read least before it" in told
    again = 24 * STEP - 40 * 130
    assert (
        f"source0: 130 documents come 0.20 times on average from token {20 * STEP} on, 2 at most in all; {again} tokens"
        in (told[-1])
    )


def test_rules_that_leave_less_than_a_window_are_refused(telling_corpora, tmp_path):
    """It would come again and again in every window."""
    prefixes = telling_corpora([[50, *[90] * 100]])
    long = [{"until": 1.0, "seq_length": 64}]
    with pytest.raises(ConfigError, match=r"seq_length=64: the length rules .* leave only 50 of 9,050 tokens"):
        stream(prefixes, 20, tmp_path, stages=long, mix={"drop_longer": 60}).begin()
    with pytest.raises(ConfigError, match=r"seq_length=128: the corpus has only 50 tokens; take a shorter window"):
        stream(telling_corpora([[50]]), 20, tmp_path, stages=[{"until": 1.0, "seq_length": 128}]).begin()


def test_an_order_that_cannot_be_written_names_the_setting(telling_corpora, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir='.*taken': it cannot be written"):
        stream(telling_corpora([TEXT]), 20, tmp_path / "taken").begin()
    assert not can_be_written(tmp_path / "taken")
    assert can_be_written(tmp_path / "new" / "folder")


@pytest.mark.parametrize("case", ["edited", "gone"])
def test_with_leave_a_run_goes_on_behind_what_cannot_be_told_any_more(telling_corpora, tmp_path, case):
    """`data.allow_change=true` is for that, and was refused like a start without it: a run with a corpus that was edited, or
    with one that it had left out and that is gone, could not be changed any more."""
    prefixes = telling_corpora([TEXT, MORE])
    first = stream(prefixes, 20, tmp_path / "a", weights=[0.5, 0.5])
    first.begin()
    state, now_read, weights = json.loads(json.dumps(first.state())), prefixes[1:], [1.0]
    if case == "edited":
        with CorpusWriter(prefixes[0], np.int32) as writer:
            for number, length in enumerate(TEXT[:-1]):
                writer.add_document(number * 1000 + np.arange(length))
        now_read, weights = prefixes, [0.5, 0.5]
        assert stream(prefixes, 20, tmp_path / "b", weights=weights).go_on(state, 7 * STEP) == (["data"], ["data"])
    else:
        move(prefixes[0], tmp_path / "away")
        with pytest.raises(ConfigError, match=r"no more; put it back, or set data\.allow_change=true, and its documents"):
            stream(now_read, 20, tmp_path / "b", weights=weights).go_on(state, 7 * STEP)
    now = stream(now_read, 20, tmp_path / "b", weights=weights)
    now.go_on(state, 7 * STEP, allow_change=True)
    (said,) = now.lost
    assert re.search(r"up to token 1792 cannot be told any more, as its data changed|up to token 1792 the run read it", said)
    later, state = stream(now_read, 24, tmp_path / "c", weights=weights), json.loads(json.dumps(now.state()))
    assert [segment["lost"] for segment in state["segments"]] == [True, False]
    assert later.go_on(state, 12 * STEP) == (["curriculum", "order"], [])  # a new machine, and no leave
    assert (later.lost, no_token_twice((now.windows, 7 * STEP, 12 * STEP), (later.windows, 12 * STEP, 20 * STEP))) == ([], True)
    known = [History([Segment(**values)], origin=STEP, cache_dir="").key for values in state["segments"]]
    assert known[0] != History([Segment(**state["segments"][0] | {"lost": False})], origin=STEP, cache_dir="").key


def no_token_twice(*parts):
    """Whether some parts of streams, (windows, first token, last token), have no token in common."""
    read = []
    for windows, first, last in parts:
        numbers = range(*(windows.curriculum.samples_at_token(token) for token in (first, last)))
        read += [windows[number]["tokens"] for number in numbers]
    tokens = np.concatenate(read)
    return np.unique(tokens[tokens > 0], return_counts=True)[1].max() == 1


def move(prefix, to):
    for suffix in ("bin", "idx"):
        Path(f"{prefix}.{suffix}").rename(f"{to}.{suffix}")


@pytest.mark.parametrize("case", ["a_shard_more_in_its_folder", "another_corpus_in_its_place", "moved_and_named", "swapped"])
def test_what_was_read_is_found_by_what_it_holds(telling_corpora, tmp_path, case):
    """A folder that got a shard more, or a corpus that was prepared anew where the old one had lain, could not be gone on with:
    the past was looked for at its old path alone."""
    text, more, third = telling_corpora([TEXT, MORE, MORE])
    (tmp_path / "corpus").mkdir()
    move(text, tmp_path / "corpus" / "b")
    here = [str(tmp_path / "corpus"), more] if "shard" in case else [str(tmp_path / "corpus" / "b"), more]
    first = stream(here, 20, tmp_path / "a", weights=[0.5, 0.5])
    first.begin()
    state, names, weights = json.loads(json.dumps(first.state())), [None] * 3, [0.4, 0.3, 0.3]
    told = ["data", "data.mix", "order"]
    if case == "a_shard_more_in_its_folder":
        move(third, tmp_path / "corpus" / "a")
        weights, told = [0.5, 0.5], ["data", "order"]
    elif case == "another_corpus_in_its_place":
        move(here[0], tmp_path / "old")
        move(third, here[0])
        here.append(str(tmp_path / "old"))
    elif case == "moved_and_named":
        move(here[0], tmp_path / "old")
        here, names, weights = [str(tmp_path / "old"), more], ["mine", None], [0.5, 0.5]
    else:
        move(here[0], tmp_path / "old")
        move(more, here[0])
        move(tmp_path / "old", more)
        weights, told = [0.5, 0.5], ["data"]
    sources = [{"path": p, "weight": w, "name": n} for p, w, n in zip(here, weights, names, strict=False)]
    values = {"stages": ONE, "tokens_per_step": STEP, "total_tokens": STEP * 20}
    mix = build(MixConfig, {"sources": sources, "share_tolerance": 0.9})
    for cache in ("a", "b"):  # where the old order is kept, and on a new machine
        now = Stream(mix, build(Curriculum, values), cache_dir=str(tmp_path / cache))
        changed, refused = now.go_on(state, 7 * STEP)
        assert (sorted({*changed, "order"}), refused) == (sorted({*told, "order"}), [])
        assert no_token_twice((first.windows, 0, 7 * STEP), (now.windows, 7 * STEP, 20 * STEP))
        assert not any(now.windows.order.facts["read_again"])


def test_a_folder_with_a_name_is_that_wherever_a_run_starts(telling_corpora, tmp_path, monkeypatch):
    """`path: .` was a source named `.` to the run and named by its folder to what it had read: another one."""
    (prefix,) = telling_corpora([TEXT])
    monkeypatch.chdir(Path(prefix).parent)
    first = stream(["."], 20, tmp_path)
    first.begin()
    longer = stream(["."], 24, tmp_path)
    assert longer.documents.names == (Path(prefix).parent.name,)
    assert longer.go_on(json.loads(json.dumps(first.state())), 7 * STEP) == (["curriculum", "order"], [])


@pytest.mark.parametrize("steps", [90, 100])
def test_a_run_at_its_end_is_held_up_by_nothing_that_it_reads_no_more(telling_corpora, tmp_path, steps):
    """Killed between its last checkpoint and its end, a run whose mix had changed asked once more for all of it from token 0:
    at a cap of repeats it could not end."""
    prefixes = telling_corpora([[90] * 150, [80] * 160])
    first = stream(prefixes[:1], 50, tmp_path, mix={"max_repeats": 1})
    first.begin()
    then = stream(prefixes[1:], 90, tmp_path, mix={"max_repeats": 1})
    then.go_on(first.state(), 50 * STEP)
    state = json.loads(json.dumps(then.state()))
    ended = stream(prefixes[1:], 90 if steps == 90 else 80, tmp_path, mix={"max_repeats": 1}, packing="concatenate")
    changed = [] if steps == 90 else ["curriculum", "order"]
    assert ended.go_on(state, ended.curriculum.total_tokens) == (changed, [])
    assert ended.state()["segments"] == state["segments"]
    assert len(ended.windows) == ended.curriculum.total_samples


def test_most_of_what_came_counts_what_came_before(telling_corpora, tmp_path):
    """A new shard comes alone until it has caught up; the report said that nothing comes more than once in all."""
    old, new = telling_corpora([[40] * 20, [40] * 50])
    first = stream([old], 8, tmp_path)
    first.begin()  # 2,048 tokens: 800 come 2.56 times
    now = Stream(
        build(MixConfig, {"sources": [{"path": [old, new], "name": "source0"}], "share_tolerance": 0.9}),
        build(Curriculum, {"stages": ONE, "tokens_per_step": STEP, "total_tokens": STEP * 12}),
        cache_dir=str(tmp_path),
    )
    now.go_on(first.state(), 8 * STEP)
    assert now.windows.order.facts["most_repeats"] == [3]
    assert "3 at most in all; none comes again" in report(now.windows)[-1]


def test_what_a_power_failure_cut_short_in_the_cache_is_told_or_made_again(telling_corpora, tmp_path):
    (prefix,) = telling_corpora([TEXT])
    first = stream([prefix], 20, tmp_path, packing="best_fit").begin()
    (known,) = tmp_path.glob("*.fingerprints")
    told = known.read_text()
    for torn in (b"", told[:30].encode(), b"[]"):
        known.write_bytes(torn)
        assert stream([prefix], 20, tmp_path, packing="best_fit").begin().order.digest == first.order.digest
        assert known.read_text() == told
    (windows,) = tmp_path.glob("*.bins")
    for name in ("facts.json", "pieces.npy", "long_ends.npy"):
        whole = (windows / name).read_bytes()
        (windows / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=r"data\.cache_dir='.*\.stage0\.bins': these windows are damaged; delete them"):
            stream([prefix], 20, tmp_path, packing="best_fit").begin()
        (windows / name).write_bytes(whole)


@pytest.mark.parametrize("then", ["places_changed", "the_first_left_out", "renamed", "both_rules_lifted"])
def test_a_corpus_that_two_sources_read_is_read_once(telling_corpora, tmp_path, then):
    """Which of two sources had read what was told by their places: in another order each was taken for the other."""
    (prefix,) = telling_corpora([TEXT])
    rules = {"short": {"drop_longer": 75}, "long": {"drop_shorter": 76}}

    def of(names, steps, cache, told=lambda name: name):
        sources = [{"path": prefix, "name": told(name), "weight": 0.5, **rules.get(name, {})} for name in names]
        values = {"stages": ONE, "tokens_per_step": STEP, "total_tokens": STEP * steps}
        mix = build(MixConfig, {"sources": sources, "share_tolerance": 0.9})
        return Stream(mix, build(Curriculum, values), cache_dir=str(cache))

    first = of(["short", "long"], 20, tmp_path / "a")
    first.begin()
    now = {
        "places_changed": of(["long", "short"], 20, tmp_path / "b"),
        "the_first_left_out": of(["long"], 14, tmp_path / "b"),
        "renamed": of(["long", "short"], 20, tmp_path / "b", told=str.upper),
        "both_rules_lifted": of(["all"], 20, tmp_path / "b"),
    }[then]
    assert now.go_on(json.loads(json.dumps(first.state())), 7 * STEP)[1] == []
    assert no_token_twice((first.windows, 0, 7 * STEP), (now.windows, 7 * STEP, now.curriculum.total_tokens))
    last = of(["short", "long"], 26, tmp_path / "c")
    if then == "places_changed":  # and once more, from what it says of itself
        last.go_on(json.loads(json.dumps(now.state())), 12 * STEP)
        parts = (first.windows, 0, 7 * STEP), (now.windows, 7 * STEP, 12 * STEP), (last.windows, 12 * STEP, 20 * STEP)
        assert no_token_twice(*parts)
