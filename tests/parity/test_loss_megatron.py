"""The chunked loss inside Megatron-Core's GPTModel, against the model's own loss on logits."""

import pytest
import small_gpt
import torch

from nemo_longctx.adapters.megatron.attention import packed_documents
from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss, use_chunked_loss
from nemo_longctx.attention import loss as core
from nemo_longctx.config import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with small_gpt.parallel():
        yield


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setitem(core.CHUNK_LIMITS, "cpu", (64, 1))


def pair(**kwargs):
    stock, ours = (small_gpt.build(small_gpt.config(), **kwargs) for _ in range(2))
    assert use_chunked_loss(ours) == 1
    assert use_chunked_loss(ours) == 1
    return stock, ours


def step(model, call, mask):
    model.zero_grad()
    losses = call(model)
    ((losses * mask).sum() / mask.sum()).backward()
    return losses.detach(), small_gpt.gradients(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients_equal_those_of_the_logits(tied, masked):
    stock, ours = pair(share_embeddings_and_output_weights=tied)
    assert {*stock.state_dict()} == {*ours.state_dict()}
    ids, positions, labels = small_gpt.tokens(2, 90)
    mask = (torch.rand(2, 90) < 0.5).float() if masked else torch.ones(2, 90)
    batch = {"tokens": ids, "position_ids": positions, "labels": labels, "loss_mask": mask if masked else None}
    mine, my_grads = step(ours, lambda m: forward_with_chunked_loss(m, batch), mask)
    other, other_grads = step(stock, lambda m: m(ids, positions, None, labels=labels), mask)
    torch.testing.assert_close(mine, other * mask, rtol=1e-5, atol=1e-6)
    assert my_grads.keys() == other_grads.keys()
    for name in my_grads:
        torch.testing.assert_close(my_grads[name], other_grads[name], rtol=1e-5, atol=1e-6)


def test_a_batch_of_packed_windows_equals_its_rows():
    _, ours = pair()
    ids, positions, labels = small_gpt.tokens(2, 20)
    mask = torch.ones(2, 20)
    rows = [
        forward_with_chunked_loss(
            ours,
            {"tokens": ids[i : i + 1], "position_ids": positions[i : i + 1], "labels": labels[i : i + 1],
             "loss_mask": mask[i : i + 1], "packed_seq_params": packed_documents(cu)},
        )
        for i, cu in enumerate(((0, 5, 20), (0, 20)))
    ]  # fmt: skip
    batch = {"tokens": ids, "position_ids": positions, "labels": labels, "loss_mask": mask}
    both = forward_with_chunked_loss(ours, {**batch, "packed_seq_params": packed_documents((0, 5, 20, 40), seq_length=20)})
    torch.testing.assert_close(both, torch.cat(rows))


def test_without_labels_it_gives_logits_and_leaves_no_trace():
    stock, ours = pair()
    ids, positions, labels = small_gpt.tokens(1, 10)
    ours(ids, positions, None, labels=labels)
    torch.testing.assert_close(ours(ids, positions, None), stock(ids, positions, None))
    with pytest.raises(ConfigError, match="labels"):
        ours(ids, positions, None, labels=labels + 1000)
    torch.testing.assert_close(ours(ids, positions, None), stock(ids, positions, None))


def test_a_stage_without_a_head_is_left_alone():
    stage = small_gpt.build(small_gpt.config(), post_process=False)
    assert use_chunked_loss(stage) == 0
    ids, positions, _ = small_gpt.tokens(1, 10)
    assert forward_with_chunked_loss(stage, {"tokens": ids, "position_ids": positions}).shape == (10, 1, 32)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("add_bias_output=True", lambda model: setattr(model.output_layer, "bias", torch.nn.Parameter(torch.zeros(4)))),
        ("mtp_num_layers=", lambda model: setattr(model, "mtp_process", True)),
        ("defer_embedding_wgrad_compute=True", lambda model: setattr(model.config, "defer_embedding_wgrad_compute", True)),
        ("use_mup=True", lambda model: setattr(model.config, "use_mup", True)),
    ],
)
def test_what_the_chunked_loss_cannot_do_is_refused(said, change):
    model = small_gpt.build(small_gpt.config())
    change(model)
    with pytest.raises(ConfigError, match=said):
        use_chunked_loss(model)
