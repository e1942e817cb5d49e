"""Loss weights in float64: gradients of packed, padded and blended windows equal a reference worked out by hand.

The reference takes each instance alone, without window, padding or packing: dense softmax attention written out, the loss of
each label times its weight, over the sum of the weights. Windows go through micro batches, data-parallel and context-parallel
ranks as a host with token-normalised loss does it: sums of losses and of weights, each added up over all, divided once.
"""

import gloo
import numpy as np
import pytest

from nemo_longctx.data.sft import InstructionConfig, InstructionWindows
from nemo_longctx.data.sft_instances import ANSWER, PROMPT

VOCABULARY, WIDTH, HEADS, SEQ = 50, 8, 2, 32
# (tokens, answer tokens) of each instance. The second long one's answer fits in the first and last quarter of its window, which
# one of two context-parallel ranks holds: with no prompt loss the other has nothing to learn from.
SHORT = ((9, 3), (14, 5), (20, 2), (6, 1))
LONG = ((33, 6), (31, 2), (18, 4))


def instance(number, length, answers):
    roles = np.where(np.arange(length) >= length - answers, ANSWER, PROMPT).astype(np.uint8)
    return np.random.default_rng(number).integers(1, VOCABULARY, length), roles


class Drawn:
    def __init__(self, first, sizes):
        self.members = [instance(first + number, *size) for number, size in enumerate(sizes)]
        self.lengths = np.array([size[0] for size in sizes])

    def __getitem__(self, number):
        return self.members[number]


def pretraining_text(wanted):
    """Windows of one document, which counts whole."""
    made = []
    for number in range(wanted):
        ids = np.random.default_rng(900 + number).integers(1, VOCABULARY, SEQ + 1)
        sample = {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": np.ones(SEQ, np.float32)}
        made.append(sample | {"position_ids": np.arange(SEQ), "cu_seqlens": np.array([0, SEQ], np.int32)})
    return made


def windows_of(case):
    sources = {"short": [Drawn(100, SHORT)], "long": [Drawn(200, LONG)]}
    config = InstructionConfig(seq_length=SEQ, blend=case["blend"], prompt_loss_weight=case["weight"])
    given = {name: files for name, files in sources.items() if name in case["blend"]}
    return InstructionWindows(config, n_samples=case["samples"], pad_id=0, pretraining=pretraining_text, **given)


def parameters():
    import torch

    made = torch.Generator().manual_seed(0)
    shapes = {"words": (VOCABULARY, WIDTH), "places": (SEQ + 1, WIDTH), "qkv": (WIDTH, 3 * WIDTH), "mix": (WIDTH, WIDTH)}
    return {name: torch.randn(shape, generator=made, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def losses_of(weights, ids, positions, labels, attend):
    """Loss of each label [n], by one attention layer with `attend(q, k, v)` over [1, n, heads, size]."""
    import torch

    hidden = weights["words"][ids] + weights["places"][positions]
    q, k, v = (hidden @ weights["qkv"]).view(1, len(ids), 3, HEADS, WIDTH // HEADS).unbind(2)
    hidden = hidden + torch.tanh(attend(q, k, v).reshape(len(ids), WIDTH) @ weights["mix"])
    return torch.nn.functional.cross_entropy(hidden @ weights["words"].T, labels, reduction="none")


def dense(q, k, v):
    import torch

    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def instances_of(case):
    """[(tokens [n], weights of their labels [n - 1])]: every instance that the windows hold, by itself."""
    windows, listed = windows_of(case), []
    for number in range(case["samples"]):
        name, which = windows._plan[number]
        if name == "pretraining":
            sample = pretraining_text(which + 1)[which]
            members = [(np.append(sample["tokens"], sample["labels"][-1]), np.full(SEQ + 1, ANSWER))]
        else:
            members = [files[i] for files, i in windows._bins[name][which]]
        prompt = case["weight"] if name == "long" else 0.0
        listed += [(np.asarray(ids), np.where(roles[1:] == ANSWER, 1.0, prompt)) for ids, roles in members]
    return listed


def by_hand(case):
    """(loss, gradients): every instance alone."""
    import torch

    weights = parameters()
    total, counted = 0.0, 0.0
    for ids, counts in instances_of(case):
        ids, counts = torch.from_numpy(ids), torch.from_numpy(counts)
        losses = losses_of(weights, ids[:-1], torch.arange(len(ids) - 1), ids[1:], dense)
        total, counted = total + (losses * counts).sum(), counted + counts.sum()
    loss = total / counted
    loss.backward()
    return loss.item(), {name: weight.grad.numpy() for name, weight in weights.items()}


def through_windows(rank, size, cases, splits):
    """{split: [(loss, gradients, smallest weight of any rank) of each case]} on `size` ranks, split as `dp` and as `cp`."""
    return {split: [one_step(rank, size, case, split) for case in cases] for split in splits}


def one_step(rank, size, case, split):
    import torch
    import torch.distributed as dist

    from nemo_longctx.attention.context_parallel import context_parallel_attention, slice_zigzag
    from nemo_longctx.attention.core import causal_attention
    from nemo_longctx.attention.documents import context_parallel_segments, document_segments

    weights = parameters()
    windows = windows_of(case)
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(case["samples"]):  # each window is a micro batch
        if split == "dp" and number % size != rank:
            continue
        sample = windows[number]
        boundaries = tuple(sample["cu_seqlens"].tolist())
        fields = [torch.from_numpy(np.asarray(sample[key])) for key in ("tokens", "position_ids", "labels", "loss_mask")]
        if split == "cp":
            fields = [slice_zigzag(field, rank, size, dim=0) for field in fields]
            segments = context_parallel_segments(boundaries, SEQ, rank, size)

            def attend(q, k, v, segments=segments):
                return context_parallel_attention(q, k, v, segments=segments, group=dist.group.WORLD)
        else:
            segments = document_segments(boundaries)

            def attend(q, k, v, segments=segments):
                return causal_attention(q, k, v, segments=segments)

        ids, positions, labels, mask = fields
        summed = (losses_of(weights, ids, positions, labels, attend) * mask).sum()
        summed.backward()
        sums += torch.stack((summed.detach(), mask.sum().double()))
    own = sums[1].clone()
    dist.all_reduce(own, op=dist.ReduceOp.MIN)
    dist.all_reduce(sums)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        dist.all_reduce(weight.grad)
    gradients = {name: (weight.grad / sums[1]).numpy() for name, weight in weights.items()}
    return (sums[0] / sums[1]).item(), gradients, own.item()


CASES = {
    "packed": {"blend": {"short": 1.0}, "weight": 1.0, "samples": 2},
    "padded, prompt loss": {"blend": {"long": 1.0}, "weight": 1.0, "samples": 3},
    "padded, a tenth of prompt loss": {"blend": {"long": 1.0}, "weight": 0.1, "samples": 3},
    "padded, no prompt loss": {"blend": {"long": 1.0}, "weight": 0.0, "samples": 3},
    "all": {"blend": {"short": 0.4, "long": 0.3, "pretraining": 0.3}, "weight": 0.35, "samples": 8},
    "one window": {"blend": {"long": 1.0}, "weight": 0.0, "samples": 1},  # leaves one rank of two without a weight
}


@pytest.fixture(scope="module")
def references():
    return {name: by_hand(case) for name, case in CASES.items()}


def check(references, results):
    """Returns in how many cases some rank had no weight at all."""
    for (name, (loss, gradients)), (got_loss, got, _) in zip(references.items(), results, strict=True):
        assert got_loss == pytest.approx(loss, rel=1e-12), name
        for key, gradient in gradients.items():
            np.testing.assert_allclose(got[key], gradient, rtol=1e-9, atol=1e-12, err_msg=f"{name}: {key}")
    return sum(smallest == 0 for _, _, smallest in results)


def test_micro_batches_equal_the_reference_by_hand(references):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check(references, through_windows(0, 1, list(CASES.values()), ["dp"])["dp"])
    finally:
        dist.destroy_process_group()


def test_data_and_context_parallel_ranks_equal_the_reference_by_hand(references):
    for results in gloo.run_on(2, through_windows, list(CASES.values()), ["dp", "cp"]):
        assert check(references, results["dp"]) == 1
        assert check(references, results["cp"]) == 1
