"""The chunked loss against torch's cross entropy on full logits in float64: values, gradients, masks, scales, repeats."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_longctx.attention import loss as module
from nemo_longctx.attention.loss import chunked_cross_entropy
from nemo_longctx.config import ConfigError

N, C, V = 150, 24, 96


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setitem(module.CHUNK_LIMITS, "cpu", (64, 1))  # 64 tokens a chunk


def problem(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, labels, (torch.rand(N, generator=generator) < 0.6).double()


def full_losses(hidden, weight, labels):
    return torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none")


REDUCTIONS = {
    "masked mean": lambda losses, mask: (losses * mask).sum() / mask.sum(),
    "scaled sum": lambda losses, mask: -1024.0 * (losses * mask).sum(),
    "not proportional": lambda losses, mask: (losses * mask * torch.arange(N)).sum() + losses[:N].pow(2).mul(mask).sum(),
    "zero": lambda losses, mask: (losses * mask).sum() * 0.0,
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(reduction, masked, dtype, bound):
    hidden, weight, labels, mask = problem(dtype)
    mask = mask if masked else torch.ones(N)
    ours = chunked_cross_entropy(hidden, weight, labels, weights_N=mask if masked else None)
    theirs = full_losses(hidden, weight, labels)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    kept = mask != 0
    assert (ours[kept].double() - theirs[kept]).norm() / theirs[kept].norm() < bound
    assert not ours[~kept].any()
    mine = torch.autograd.grad(REDUCTIONS[reduction](ours, mask), (hidden, weight))
    other = torch.autograd.grad(REDUCTIONS[reduction](theirs, mask), (hidden, weight))
    for a, b in zip(mine, other, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_logits_are_computed_once_when_the_gradient_is_the_mask(monkeypatch):
    calls = 0
    original = module._Chunks.losses_and_softmax

    def counted(self, span):
        nonlocal calls
        calls += 1
        return original(self, span)

    monkeypatch.setattr(module._Chunks, "losses_and_softmax", counted)
    hidden, weight, labels, mask = problem()
    (chunked_cross_entropy(hidden, weight, labels, weights_N=mask) * mask).sum().div(mask.sum()).backward()
    assert calls == -(-int(mask.sum()) // 64)
    chunked_cross_entropy(hidden, weight, labels, weights_N=mask).pow(2).sum().backward()
    assert calls == 3 * -(-int(mask.sum()) // 64)


def test_a_second_backward_gives_the_same():
    hidden, weight, labels, _ = problem()
    loss = chunked_cross_entropy(hidden, weight, labels).mean()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for a, b in zip(kept, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_all_masked_gives_zero_and_no_nan():
    hidden, weight, labels, mask = problem()
    losses = chunked_cross_entropy(hidden, weight, labels, weights_N=torch.zeros_like(mask))
    losses.sum().backward()
    assert not losses.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_frozen_parts_get_no_gradient():
    hidden, weight, labels, _ = problem()
    chunked_cross_entropy(hidden, weight.detach(), labels).sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, labels).requires_grad


def test_labels_are_read_only_where_they_count():
    hidden, weight, labels, mask = problem()
    wild = labels.where(mask != 0, -100)
    ours = chunked_cross_entropy(hidden, weight, wild, weights_N=mask)
    torch.testing.assert_close(ours, full_losses(hidden, weight, labels) * mask)
    for outside in (wild, labels.where(mask != 0, len(weight))):
        with pytest.raises(ConfigError, match="weight 0"):
            chunked_cross_entropy(hidden, weight, outside)
    last = torch.full_like(labels, len(weight) - 1)
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, last), full_losses(hidden, weight, last))


def test_nothing_as_large_as_the_logits_is_made():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    hidden, weight = torch.randn(1024, 16, requires_grad=True), torch.randn(512, 16, requires_grad=True)
    with Watch():
        chunked_cross_entropy(hidden, weight, torch.randint(0, 512, (1024,))).mean().backward()
    assert largest <= 64 * 512 * 4 < 1024 * 512


def test_no_gradient_is_made_where_none_is_asked_for(monkeypatch):
    """A `Parameter` requires one whatever the grad mode."""
    monkeypatch.setattr(module._Chunks, "gradients", lambda *_: pytest.fail("a gradient was computed"))
    hidden, weight, labels, _ = problem()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses = chunked_cross_entropy(hidden, torch.nn.Parameter(weight), labels)
        torch.testing.assert_close(losses, full_losses(hidden.detach(), weight.detach(), labels))


def test_a_sum_beyond_float16_does_not_spoil_the_mean():
    hidden = torch.full((N, C), 600.0, dtype=torch.float16)
    weight = torch.zeros(V, C, dtype=torch.float16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.full((N,), 5)).mean().backward()
    expected = torch.full((V,), 600.0 / V)
    expected[5] -= 600.0
    torch.testing.assert_close(weight.grad[:, 0].float(), expected, rtol=1e-2, atol=0.0)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        mask_index = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for arg in args[1:]
            for x in (arg if isinstance(arg, (list, tuple)) else [arg])
        )
        if name in self.WAITS or (mask_index and name in ("index", "index_put", "index_put_")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [None, 60])
def test_the_host_waits_for_no_device(masked, count):
    """On the meta device a read has no answer: forward and backward pass without one."""
    hidden, weight = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((N, C), (V, C)))
    labels = torch.zeros(N, dtype=torch.int64, device="meta")
    mask = torch.ones(N, device="meta") if masked else None
    losses = chunked_cross_entropy(hidden, weight, labels, weights_N=mask, count=count if masked else None)
    losses.sum().backward()
    assert losses.shape == (N,)
    assert hidden.grad.shape == hidden.shape


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "may_read", lambda device: False)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("reduction", ["masked mean", "scaled sum", "zero"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_without_reading_the_values_are_the_same(as_on_a_gpu, reduction, known, dtype, bound):
    hidden, weight, labels, mask = problem(dtype)
    wild = labels.where(mask != 0, -100)
    with Reads() as reads:
        ours = chunked_cross_entropy(hidden, weight, wild, weights_N=mask, count=int((mask != 0).sum()) if known else None)
        mine = torch.autograd.grad(REDUCTIONS[reduction](ours, mask), (hidden, weight))
    assert [name for name in reads.found if name != "_local_scalar_dense"] == []
    assert len(reads.found) <= known  # the test's own count
    theirs = full_losses(hidden, weight, labels) * mask
    assert (ours.double() - theirs).norm() / theirs.norm() < bound
    for a, b in zip(mine, torch.autograd.grad(REDUCTIONS[reduction](theirs, mask), (hidden, weight)), strict=True):
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_what_is_not_read_shows_as_nan(as_on_a_gpu):
    hidden, weight, labels, mask = problem()
    labels[7], mask[7] = V, 1
    losses = chunked_cross_entropy(hidden, weight, labels, weights_N=mask)
    assert losses.isnan().nonzero().tolist() == [[7]]
    labels[7] = 0
    losses = chunked_cross_entropy(hidden, weight, labels, weights_N=mask)
    assert all(x.isnan().all() for x in torch.autograd.grad(losses.pow(2).sum(), (hidden, weight)))


def test_a_debug_switch_reads(monkeypatch):
    cuda = torch.device("cuda")
    assert not module.may_read(cuda)
    monkeypatch.setenv("NEMO_LONGCTX_DEBUG", "1")
    assert module.may_read(cuda)


@pytest.mark.parametrize(
    ("device", "tokens", "vocabulary", "length"),
    [
        ("cuda", 10**6, 100, 4096), ("cuda", 10**6, 131_072, 4096), ("cuda", 10**6, 131_073, 4032), ("cuda", 10**6, 2**26, 64),
        ("cpu", 10**6, 100, 512), ("cpu", 10**6, 32_768, 512), ("cpu", 10**6, 32_769, 448), ("cpu", 10**6, 128_256, 128),
        ("cpu", 130, 100, 130), ("cpu", 1, 100, 1), ("cpu", 0, 100, 1), ("meta", 10**6, 100, 4096),
    ],
)  # fmt: skip
def test_a_chunk_is_a_multiple_of_64_tokens_within_its_bytes(monkeypatch, device, tokens, vocabulary, length):
    monkeypatch.setitem(module.CHUNK_LIMITS, "cpu", (512, 64 * 2**20))
    assert module.chunk_length(tokens, vocabulary, device) == length


@pytest.mark.parametrize(
    ("grad", "weights", "factor"),
    [
        ([2.0, 4.0], [1.0, 2.0], 2.0),
        ([-2.0, -4.0], [1.0, 2.0], -2.0),
        ([2.0, 4.000003], [1.0, 2.0], 2.0000015),
        ([2.0, 4.00001], [1.0, 2.0], None),
        ([2.0, 5.0], [1.0, 2.0], None),
        ([9.0, 4.0], [0.0, 2.0], 2.0),  # where the weight is 0 nothing is asked
        ([0.0, 0.0], [1.0, 2.0], 0.0),
        ([3.0, 4.0], [0.0, 0.0], 0.0),
        ([1.0, -1.0], [1.0, -1.0], 1.0),
        ([], [], 1.0),
    ],
)
def test_a_gradient_that_is_the_weights_times_a_number_gives_it(grad, weights, factor):
    found = module._common_factor(torch.tensor(grad, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))
    assert found.shape == (1,)
    assert bool(found.isnan()) == (factor is None)
    assert factor is None or found.item() == pytest.approx(factor)


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, labels, mask = problem()
    for bad in (hidden[:, :-1], hidden[None], hidden[0]):
        with pytest.raises(ConfigError, match=rf"^hidden=.*must be \[N, C\] for a weight of \({V}, {C}\)"):
            chunked_cross_entropy(bad, weight, labels)
    with pytest.raises(ConfigError, match=r"^hidden="):
        chunked_cross_entropy(hidden, weight[0], labels)
    for other in ({"labels_N": labels[1:]}, {"weights_N": mask[1:]}, {"labels_N": labels[:, None]}):
        with pytest.raises(ConfigError, match=rf"^labels=.*labels and weights must be \[N\] = \[{N}\]"):
            chunked_cross_entropy(hidden, weight, **{"labels_N": labels, **other})
    with pytest.raises(ConfigError, match=rf"^labels=\(-1, .*must lie in \[0, {V}\)"):
        chunked_cross_entropy(hidden, weight, labels.index_fill(0, torch.tensor([3]), -1))


@pytest.mark.parametrize("value", ["", "0"])
def test_no_word_is_no_debug_switch(monkeypatch, value):
    monkeypatch.setenv("NEMO_LONGCTX_DEBUG", value)
    assert not module.may_read(torch.device("cuda"))
    assert module.may_read(torch.device("cpu"))
