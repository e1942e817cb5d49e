"""Work shared among ranks, seen from one: who failed and why, results in their order, and what is told of the cost."""

import types

import pytest
import torch

from nemo_longctx.eval import sharing
from nemo_longctx.eval.requests import Continuation
from nemo_longctx.eval.scoring import Chunks, Scorer, Speed


class Model:
    """Reads anything; the log-probability of a token is minus its number."""

    vocab_size, max_length, reads_whole = 1000, 1000, False

    def __init__(self):
        self.cache, self.read = [], []

    def extend(self, tokens_S):
        self.cache += tokens_S.tolist()
        self.read.append(len(tokens_S))
        return tokens_S[:, None].float()

    def truncate(self, length):
        del self.cache[length:]

    def log_probs(self, states_KH, targets_K):
        return -targets_K.float(), targets_K > 0


def heard(monkeypatch, *said):
    """As if the ranks had said these: (error, value)."""
    monkeypatch.setattr(sharing, "everywhere", lambda value, group=None: list(said))


def test_an_error_is_named_with_its_ranks_unless_all_had_it(monkeypatch):
    assert sharing.check_in("", 5) == ([], [5])
    assert sharing.check_in("boom", 5) == (["boom"], [5])
    heard(monkeypatch, ("boom", 1), ("", 2), ("boom", 3), ("other", 4))
    assert sharing.check_in() == (["rank 0, 2: boom", "rank 3: other"], [1, 2, 3, 4])
    heard(monkeypatch, ("boom", 1), ("boom", 2))
    assert sharing.check_in() == (["boom"], [1, 2])


def test_what_the_first_rank_makes_is_everywhere_or_nowhere(monkeypatch):
    assert sharing.from_first(lambda: 7) == 7
    with pytest.raises(sharing.PeerError, match=r"^ZeroDivisionError: division by zero$") as error:
        sharing.from_first(lambda: 1 / 0)
    assert error.value.errors == ["ZeroDivisionError: division by zero"]
    monkeypatch.setattr(sharing.dist, "is_initialized", lambda: True)
    for rank, expected in ((0, "mine"), (1, None)):  # which the other ranks do not make
        made = []
        monkeypatch.setattr(sharing.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(sharing, "everywhere", lambda value, group=None: [value, ("", "of another rank")])
        assert sharing.from_first(lambda made=made: made.append(1) or "mine") == expected
        assert len(made) == (rank == 0)
    heard(monkeypatch, ("", 1), ("boom", None))
    with pytest.raises(sharing.PeerError, match="rank 1: boom"):
        sharing.from_first(lambda: 7)
    with pytest.raises(sharing.PeerError, match="rank 1: boom"):  # before any work
        sharing.run_shared(Scorer(Model()), [])


REQUESTS = [Continuation(context=[9, n, 9], continuation=[n, n]) for n in (5, 3, 8, 1)]


def test_results_come_in_the_order_of_the_requests_and_a_quiet_run_says_nothing(capsys):
    scorer = Scorer(Model())
    scores = sharing.run_shared(scorer, REQUESTS, quiet=True)
    assert [score.log_likelihood for score in scores] == [-10, -6, -16, -2]
    assert capsys.readouterr() == ("", "")
    assert sharing.run_shared(scorer, []) == []
    sharing.run_shared(scorer, REQUESTS)
    assert "evaluation: 13 tokens to read (16 without what prompts share), about 1 s" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_a_group_put_their_parts_together(rank, monkeypatch, capsys):
    group = types.SimpleNamespace(rank=lambda: rank, size=lambda: 2)
    mine = sharing.share_work(REQUESTS, 2)

    def together(value, of=None):
        if of is None:
            return [value]
        assert sorted(value[0]) == sorted(mine[rank])
        theirs = {index: f"theirs {index}" for index in mine[1 - rank]}
        return [value, (theirs, "")] if rank == 0 else [(theirs, ""), value]

    monkeypatch.setattr(sharing, "everywhere", together)
    monkeypatch.setattr(sharing.dist, "get_rank", lambda: 4 + rank)
    found = sharing.run_shared(Scorer(Model()), REQUESTS, group=group)
    for index, result in enumerate(found):
        assert (
            result == f"theirs {index}" if index in mine[1 - rank] else result.log_likelihood == -2 * REQUESTS[index].context[1]
        )
    assert ("to read" in capsys.readouterr().err) == (rank == 0)  # one rank tells
    far = [Continuation(context=[5000 + n] * 3, continuation=[1]) for n in range(2)]
    monkeypatch.setattr(sharing, "everywhere", lambda value, of=None: [value] if of is None else [value, ({}, "rank 9: boom")])
    with pytest.raises(RuntimeError, match=rf"^rank {4 + rank}: ValueError: request 0 has token ids .*; rank 9: boom$"):
        sharing.run_shared(Scorer(Model()), far, group=group)


def test_a_speed_is_guessed_from_a_second_reading_and_one_token(monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 20.5])  # the first time warms up
    monkeypatch.setattr(sharing, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    model = Model()
    speed = sharing.measured_speed(Scorer(model), Continuation(context=[1] * 400, continuation=[2]))
    assert speed == Speed(read=128.0, made=2.0)
    assert model.read == [256, 256, 1]
    assert model.cache == []


def test_a_speed_is_corrected_by_the_work_itself(monkeypatch):
    clock = iter([100.0, 126.0])
    monkeypatch.setattr(sharing, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    scorer = Scorer(Model(), chunks=Chunks(read=2))
    scorer.speed = Speed(read=1.0, made=4.0)
    sharing.run_shared(scorer, REQUESTS, quiet=True)  # 13 tokens, which took 26 seconds
    assert scorer.speed == Speed(read=0.5, made=2.0)
    assert max(scorer.model.read) == 2


def test_every_rank_s_value_is_gathered(monkeypatch):
    assert sharing.everywhere(3) == [3]
    monkeypatch.setattr(sharing.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sharing.dist, "get_world_size", lambda group: {"g": 2, None: 3}[group])

    def gather(parts, value, group=None):
        parts[:] = [(value, group)] * len(parts)

    monkeypatch.setattr(sharing.dist, "all_gather_object", gather)
    assert sharing.everywhere(3, "g") == [(3, "g")] * 2
    assert sharing.everywhere(torch.Size([1])) == [(torch.Size([1]), None)] * 3
