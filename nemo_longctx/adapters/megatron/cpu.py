"""Stock NeMo and Megatron-Core on a machine without CUDA.

Both call `torch.cuda` where they mean "the device that this rank computes on". On a machine that has no CUDA this module lets
those calls mean the CPU; on one that has, `install()` does nothing at all. The list below is what a training run, a
checkpoint, a resume and an export were seen to call (NeMo 2.7.3, Megatron-Core 0.15.3, torch 2.13).

No operator is intercepted: only factories, `Tensor.to/cuda/type` and the calls that already name CUDA are replaced, so a
training step costs what it costs (`benchmarks/cpu_shim.py` measures it).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import torch
from torch.utils._device import _device_constructors

from nemo_longctx.capability import has_module

# Fields of a Megatron-Core config that need CUDA kernels or Transformer Engine, and what they must be without.
CPU_MODEL_FIELDS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "cross_entropy_loss_fusion": False,
    "tp_comm_overlap": False,
}

_originals: list[tuple[Any, str, Any]] = []


def is_installed() -> bool:
    """Whether this process has been set up to run the host without CUDA."""
    return bool(_originals)


def install() -> bool:
    """Let the host's CUDA calls mean the CPU, for this process; inert where CUDA is available.

    Returns:
        True when the process now runs on the CPU, False when CUDA is there and nothing was changed.
    """
    if torch.cuda.is_available():
        return False
    if not _originals:
        # First the host's own import of torch's compiler, which indexes torch's functions by identity.
        from megatron.core.tensor_parallel import random

        _replace_factories()
        _replace_tensor_methods()
        _replace_cuda_namespace()
        _replace_host_rng(random)
        _replace_norm()
    return True


def uninstall() -> None:
    """Put back everything that `install` replaced (for tests)."""
    while _originals:
        owner, name, value = _originals.pop()
        setattr(owner, name, value)


def machine_fields(config: Any) -> dict[str, Any]:
    """Fields of a `GPTConfig` whose values this machine decides, with those values.

    Without CUDA: what `CPU_MODEL_FIELDS` says. With CUDA: the class's own defaults for a config that was written without
    (it says `use_cpu_initialization`), and no fusion of a package that is missing.
    """
    wanted: dict[str, Any] = {}
    if not torch.cuda.is_available():
        wanted = dict(CPU_MODEL_FIELDS)
    else:
        if getattr(config, "use_cpu_initialization", False):
            defaults = {field.name: field.default for field in dataclasses.fields(config)}
            wanted = {name: defaults[name] for name in CPU_MODEL_FIELDS if name in defaults}
        if not has_module("transformer_engine"):
            wanted["apply_rope_fusion"] = False
        if getattr(config, "rotary_interleaved", False):
            from nemo_longctx.adapters.megatron.host import rotates_documents_interleaved

            if not rotates_documents_interleaved():
                wanted["apply_rope_fusion"] = False
        if not has_module("amp_C"):
            wanted["persist_layer_norm"] = False
        if not has_module("fused_weight_gradient_mlp_cuda"):  # apex's, which the host's head asks for
            wanted["gradient_accumulation_fusion"] = False
    return {name: value for name, value in wanted.items() if hasattr(config, name)}


def adapt_model_config(config: Any) -> None:
    """Set `machine_fields` on `config`."""
    for name, value in machine_fields(config).items():
        setattr(config, name, value)


@contextlib.contextmanager
def stock_configs():
    """Build the host's own configs on any machine: their `__post_init__` refuses RoPE fusion without Transformer Engine.

    Inside, what this machine cannot have is off before any `TransformerConfig` checks itself, so that stock configs,
    checkpoints' contexts and the stock Hugging Face importers can be built. Inert with CUDA and Transformer Engine.
    """
    if torch.cuda.is_available() and has_module("transformer_engine"):
        yield
        return
    from megatron.core.transformer.transformer_config import TransformerConfig

    post_init = TransformerConfig.__post_init__

    def checked(self):
        adapt_model_config(self)
        post_init(self)

    TransformerConfig.__post_init__ = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        TransformerConfig.__post_init__ = post_init  # type: ignore[method-assign]


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _means_cuda(device: Any) -> bool:
    """True for `"cuda"`, `"cuda:0"`, `torch.device("cuda")` and a bare index, which torch reads as an accelerator's."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args, **kwargs):
        if kwargs:
            if _means_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _replace_factories() -> None:
    # torch's own list of what takes a device; asked for before anything is replaced, since torch caches the answer.
    for factory in _device_constructors():
        name = getattr(factory, "__name__", "")
        if factory is not None and getattr(torch, name, None) is factory:
            _replace(torch, name, _on_cpu(factory))


def _replace_tensor_methods() -> None:
    to, type_ = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self, *args, **kwargs):
        if args and _means_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    def type_as_on_cuda(self, dtype=None, *args, **kwargs):
        # Gradient clipping and the mixed-precision optimizers compare this name with 'torch.cuda.FloatTensor'.
        if dtype is None:
            return type_(self).replace("torch.", "torch.cuda.", 1)
        return type_(self, dtype, *args, **kwargs)

    _replace(torch.Tensor, "to", to_cpu)
    _replace(torch.Tensor, "type", type_as_on_cuda)
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)


class _Stream:
    """One queue: the CPU runs everything in the order it was asked for, so waiting is done before it begins."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        pass

    wait_event = record_event = synchronize = wait_stream


def _replace_cuda_namespace() -> None:
    cuda = torch.cuda
    stream = _Stream()

    def new_nothing():  # one function a name: torch's compiler, imported later, tells functions apart by identity
        return lambda *args, **kwargs: None

    # isinstance(x, torch.cuda.FloatTensor) must hold for what would be one on a GPU.
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor", "ByteTensor", "DoubleTensor"):
        _replace(cuda, name, getattr(torch, name))
    _replace(cuda, "Stream", _Stream)
    _replace(cuda, "stream", lambda s: contextlib.nullcontext())
    _replace(cuda, "current_stream", lambda *args: stream)
    _replace(cuda, "default_stream", lambda *args: stream)
    _replace(cuda, "current_device", lambda: 0)
    _replace(cuda, "is_initialized", lambda: True)  # the checkpoint reader asserts it
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "_lazy_call", "_lazy_init"):
        _replace(cuda, name, new_nothing())
    _replace(cuda.nvtx, "range_push", new_nothing())
    _replace(cuda.nvtx, "range_pop", new_nothing())
    _replace(cuda, "manual_seed", torch.default_generator.manual_seed)
    for owner in (cuda, cuda.random):
        _replace(owner, "get_rng_state", lambda device="cuda": torch.get_rng_state())
        _replace(owner, "set_rng_state", lambda state, device="cuda": torch.set_rng_state(state))


def _replace_norm() -> None:
    """Megatron-Core's norms by torch refuse sequence parallelism and zero-centred weights, which Transformer Engine's know.

    All that the first asks of a norm is the mark by which the host adds up its weights' gradients over the ranks of a sequence.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    made = WrappedTorchNorm.__new__

    def marked(cls, config, *args, **settings):
        plain = copy.copy(config)
        plain.sequence_parallel = plain.layernorm_zero_centered_gamma = False
        norm = made(cls, plain, *args, **settings)
        if config.layernorm_zero_centered_gamma:  # Nemotron's and Gemma's
            norm.__class__ = _ZeroCentredLayerNorm if isinstance(norm, torch.nn.LayerNorm) else _ZeroCentredRMSNorm
            torch.nn.init.zeros_(norm.weight)
        elif type(norm) is torch.nn.RMSNorm:
            norm.__class__ = _RMSNorm
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel
        return norm

    _replace(WrappedTorchNorm, "__new__", marked)


def _replace_host_rng(random: Any) -> None:
    """Megatron-Core's tracker of "CUDA" generator states keeps the CPU's, which is the one that dropout then draws from."""
    fork = random.CudaRNGStatesTracker.fork

    @contextlib.contextmanager
    def fork_seeded(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
        if not self.states_:  # NeMo seeds the tracker only where it counts a CUDA device
            state = torch.get_rng_state()
            random.model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)
            torch.set_rng_state(state)
        with fork(self, name):
            yield

    _replace(random, "_get_cuda_rng_state", lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state))
    _replace(random.CudaRNGStatesTracker, "fork", fork_seeded)


class _RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that gives the type that it got, which torch 2.6 does not where the weight is of a wider one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


class _ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose weight is kept less one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class _ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is kept less one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)
