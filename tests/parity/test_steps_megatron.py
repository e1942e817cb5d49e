"""A micro batch as its stage and its context-parallel rank see it, with Megatron-Core's own groups."""

import pytest
import small_gpt
import torch

from nemo_longctx.adapters.megatron import steps

MASK = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 1]])


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with small_gpt.parallel():
        yield


def batch(**more):
    tokens = torch.arange(10, 18)[None]
    return {"tokens": tokens, "labels": tokens + 1, "position_ids": tokens - 10, "loss_mask": MASK, **more}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_micro_batch_goes_to_the_device_with_its_boundaries(wrapped):
    given = batch(cu_seqlens=torch.tensor([[0, 3, 8]], dtype=torch.int32))
    found = steps.longctx_data_step(iter([(given, 0, 0) if wrapped else given]))
    for key in ("tokens", "labels", "position_ids", "loss_mask"):
        assert torch.equal(found[key].cpu(), given[key])
    assert found["loss_tokens"] == 3
    assert found["packed_seq_params"].cu_seqlens_q.tolist() == [0, 3, 8]
    assert found["packed_seq_params"].cu_seqlens_q.device == found["tokens"].device
    assert steps.longctx_data_step(iter([batch()]))["packed_seq_params"] is None


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True), (False, False)])
def test_a_stage_gets_what_it_reads(monkeypatch, first, last):
    monkeypatch.setattr(steps.parallel_state, "is_pipeline_first_stage", lambda: first)
    monkeypatch.setattr(steps.parallel_state, "is_pipeline_last_stage", lambda: last)
    found = steps.longctx_data_step(iter([batch()]))
    assert [found[key] is not None for key in ("tokens", "position_ids")] == [first] * 2
    assert [found[key] is not None for key in ("labels", "loss_mask", "loss_tokens")] == [last] * 3


@pytest.mark.parametrize(("rank", "counted"), [(0, 3), (1, 0)])
def test_tokens_that_count_are_those_of_the_rank_s_two_chunks(monkeypatch, rank, counted):
    monkeypatch.setattr(steps.parallel_state, "get_context_parallel_world_size", lambda: 2)
    monkeypatch.setattr(steps.parallel_state, "get_context_parallel_rank", lambda: rank)
    assert steps._counted(MASK) == counted
    assert steps._counted(MASK.to("meta")) is None  # what has left the host is not waited for


def test_boundaries_lie_where_the_machine_computes(monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "packed_documents", lambda boundaries, **more: asked.append(more))
    given = batch(cu_seqlens=torch.tensor([[0, 3, 8]], dtype=torch.int32))
    steps.longctx_data_step(iter([given]))
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    assert asked == [{"seq_length": 8, "device": here}]
