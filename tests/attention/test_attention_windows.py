"""Sliding windows: against a dense mask, over documents, with a cache, by context-parallel shares; work of the band."""

import time

import pytest
import torch

from nemo_longctx.attention.core import causal_attention, sdpa_windows
from nemo_longctx.attention.documents import Segment, context_parallel_segments, document_segments, zigzag_positions
from nemo_longctx.attention.windows import blocks_of
from nemo_longctx.config import ConfigError

torch.set_num_threads(1)


def inputs(queries, keys, *, batch=2, heads=4, groups=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)

    def made(rows, n):
        return torch.randn(batch, rows, n, size, generator=generator, dtype=dtype).requires_grad_()

    return made(queries, heads), made(keys, groups), made(keys, groups)


def dense(q, k, v, segments, window):
    """Softmax over a whole mask, as slow as it is plain."""
    seen = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    for s in segments:
        for row in range(s.q_start, s.q_end):
            own = s.k_start + s.prefix + row - s.q_start
            seen[row, max(s.k_start, own - (window or own + 1) + 1) : own + 1] = True
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


CASES = {
    "whole": (Segment(0, 37, 0, 37),),
    "documents": document_segments((0, 1, 6, 6, 23, 37)),
    "a cache": (Segment(0, 9, 0, 37),),
    "one query": (Segment(0, 1, 0, 37),),
    "a rank's share": context_parallel_segments((0, 7, 40), 40, 1, 2),
}


@pytest.mark.parametrize("window", [1, 2, 5, 8, 16, 36, 37, 100])
@pytest.mark.parametrize("name", CASES)
def test_a_window_is_what_a_dense_mask_makes_of_it(name, window):
    segments = CASES[name]
    q, k, v = inputs(segments[-1].q_end, max(s.k_end for s in segments))
    out = causal_attention(q, k, v, segments=segments, window=window)
    wanted = dense(q, k, v, segments, window)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(sdpa_windows(q, k, v, segments, 8**-0.5, window=window), wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    got, expected = (torch.autograd.grad((x * upstream).sum(), (q, k, v)) for x in (out, wanted))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 7, 16, 64])
def test_a_token_at_a_time_with_a_cache_gives_the_whole(window):
    q, k, v = (x.detach() for x in inputs(24, 24))
    whole = causal_attention(q, k, v, window=window)
    steps = [causal_attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], window=window) for t in range(24)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [3, 8, 30])
def test_context_parallel_shares_make_the_whole(window):
    q, k, v = (x.detach() for x in inputs(32, 32))
    documents = (0, 5, 21, 32)
    whole = causal_attention(q, k, v, segments=document_segments(documents), window=window)
    for rank in range(2):
        rows = torch.from_numpy(zigzag_positions(32, rank, 2))
        share = causal_attention(q[:, rows], k, v, segments=context_parallel_segments(documents, 32, rank, 2), window=window)
        torch.testing.assert_close(share, whole[:, rows], rtol=0, atol=1e-12)


def test_every_query_row_is_covered_once_and_the_work_is_the_bands():
    for window in (1, 7, 64, 1000):
        blocks = blocks_of((Segment(0, 1000, 0, 1300),), window)
        ends = [0, *(block.q_end for block in blocks)]
        assert [block.q_start for block in blocks] == ends[:-1]
        assert ends[-1] == 1000
        work = sum(
            block.repeats * part.used * (part.queries or block.rows) * (0.5 if part.causal else 1.0)
            for block in blocks
            for part in block.parts
        )
        assert work <= 1000 * window + 1000


def test_a_window_of_a_32nd_costs_an_eighth_at_most():
    """Time at 8k with a window of 256 against all of it; work is 1/16. Processor time, best of three."""
    q, k, v = (x.detach() for x in inputs(8192, 8192, batch=1, heads=2, groups=2, size=32, dtype=torch.float32))

    def best(window):
        seconds = []
        for _ in range(3):
            begin = time.process_time()
            causal_attention(q, k, v, window=window)
            seconds.append(time.process_time() - begin)
        return min(seconds)

    best(256)
    assert best(256) < best(None) / 4


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_a_window_of_no_tokens_is_refused(window):
    with pytest.raises(ConfigError, match="window="):
        causal_attention(*inputs(4, 4), window=window)
