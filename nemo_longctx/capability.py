"""What this machine and environment can use, found without importing torch: file system, package metadata and the CUDA driver.

The one place that asks whether an optional part is there; commands and tests share its answers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from nemo_longctx.config import ConfigError

PACKAGES = ("nemo-longctx", "nemo_toolkit", "megatron-core", "lightning", "torch", "transformers", "lm-eval", "numpy")
CUDA_MAJOR_OF_BF16 = 8  # Ampere
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76  # CUdevice_attribute: compute capability


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capability:
    """One part that a run can use.

    Attributes:
        name: what it is.
        available: whether it can be used here.
        detail: version or device, or why not.
        cost: what its absence costs; empty where it is there.
        remedy: how to get it; empty where it is there.
    """

    name: str
    available: bool
    detail: str
    cost: str = ""
    remedy: str = ""


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that results depend on; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


# What this version runs on: package -> the first version that it takes, and the first that it does not.
HOST_RANGE = {
    "nemo_toolkit": ((2, 4), (2, 8)),
    "megatron-core": ((0, 13), (0, 17)),
    "torch": ((2, 6), (2, 15)),
    "transformers": ((4, 51), (6, 0)),
    "numpy": ((1, 26), (3, 0)),
}
# The room for Megatron-Core alone goes further.
MEGATRON_RANGE = {"megatron-core": ((0, 13), (0, 20)), "torch": HOST_RANGE["torch"]}


def check_host(bounds: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = HOST_RANGE) -> None:
    """Refuse a host outside the range, from the metadata of what is installed: before anything of it is imported.

    Raises:
        ConfigError: a package outside its range. One that is missing is the import's own to tell.
    """
    if os.environ.get("NEMO_LONGCTX_ANY_HOST"):
        return
    for name, (first, beyond) in bounds.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if len(found) == 2 and not first <= found < beyond:
            low, high = (".".join(map(str, each)) for each in (first, beyond))
            mend = f"is outside what this version of nemo-longctx runs on ({name}>={low},<{high}); install one of those"
            raise ConfigError(name, version, f"{mend}, or set NEMO_LONGCTX_ANY_HOST=1 to try it all the same")


def host_fault() -> str | None:
    """What `check_host` would say, or None."""
    try:
        check_host()
    except ConfigError as error:
        return str(error)
    return None


# Top-level modules that an extra of this package brings -> the extra. What the core dependencies bring is not here.
EXTRAS = {
    **dict.fromkeys(("nemo", "megatron", "lightning", "nemo_run", "fiddle", "sentencepiece", "tiktoken", "ray"), "nemo"),
    **dict.fromkeys(("lm_eval", "rouge_score", "datasets"), "eval"),
    **dict.fromkeys(("openai",), "instruct"),
    **dict.fromkeys(("vaderSentiment",), "safety"),
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install, in a sentence, where `error` is about a module that an extra of this package brings; else None."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f"this needs {module}, which is not installed: pip install 'nemo-longctx[{EXTRAS[module]}]'"


def capabilities() -> list[Capability]:
    """Everything that `doctor` reports, in its order."""
    gpus, cuda_build = cuda_devices(), _torch_cuda_build()
    usable = bool(gpus) and cuda_build is not None
    return [
        _cuda(gpus, cuda_build),
        _bf16(gpus, usable),
        _transformer_engine(),
        _flash_attn(),
        _apex(),
        _gloo(),
        _nccl(cuda_build),
    ]


def has_module(name: str) -> bool:
    """Whether top-level module `name` can be found; it is not imported."""
    return importlib.util.find_spec(name) is not None


def module_folder(name: str) -> Path | None:
    """Where top-level package `name` lies; None where it is not installed. It is not imported."""
    found = importlib.util.find_spec(name)
    return None if found is None or not found.origin else Path(found.origin).parent


def cuda_devices() -> list[tuple[str, tuple[int, int]]]:
    """(name, compute capability) of each CUDA device that the driver shows; [] without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    devices = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(100)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        numbers = []
        for attribute in (_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        devices.append((name.value.decode(), (numbers[0], numbers[1])))
    return devices


def _torch_cuda_build() -> str | None:
    """The CUDA version that the installed torch was built for, read from its version file; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda[^=\n]*= *'([^']+)'", text, re.MULTILINE)
    return found.group(1) if found else None


def _cuda(gpus: list[tuple[str, tuple[int, int]]], cuda_build: str | None) -> Capability:
    cost = "training runs on the CPU: enough for tiny models, far too slow for a 7B"
    if gpus and cuda_build:
        return Capability(name="CUDA", available=True, detail=f"{len(gpus)} x {gpus[0][0]}, torch built for CUDA {cuda_build}")
    if gpus:
        remedy = "install torch's CUDA build: pip install --force-reinstall torch from its default index"
        return Capability(
            name="CUDA", available=False, detail=f"{gpus[0][0]} is there, but torch is a CPU build", cost=cost, remedy=remedy
        )
    detail = "no NVIDIA driver, or it shows no device"
    return Capability(
        name="CUDA", available=False, detail=detail, cost=cost, remedy="run on a machine with an NVIDIA GPU and driver"
    )


def _bf16(gpus: list[tuple[str, tuple[int, int]]], usable: bool) -> Capability:
    if usable and all(capability[0] >= CUDA_MAJOR_OF_BF16 for _, capability in gpus):
        return Capability(name="bf16", available=True, detail="compute capability " + ".".join(map(str, gpus[0][1])))
    detail = "no GPU of compute capability 8.0 or more" if usable else "no CUDA"
    cost = "set trainer.precision=32: twice the memory of bf16, and slower"
    return Capability(name="bf16", available=False, detail=detail, cost=cost, remedy="an Ampere GPU (A100) or newer")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _transformer_engine() -> Capability:
    name = "Transformer Engine"
    if has_module("transformer_engine"):
        return Capability(name=name, available=True, detail=_version("transformer_engine"))
    cost = "no FP8 and no fused layers; attention runs on SDPA or flash-attn, also under context parallelism"
    remedy = "on a CUDA machine: pip install --no-build-isolation 'transformer_engine[pytorch]'"
    return Capability(name=name, available=False, detail="not installed", cost=cost, remedy=remedy)


# Before its version 2.1 flash-attn aligned the first query with the first key.
FLASH_ATTN_ALIGNED = (2, 1)
FLASH_ATTN_3_GPU = (9, 0)  # for no other does Transformer Engine take it either


@functools.cache
def flash_attention() -> str | None:
    """The module with FlashAttention's varlen kernel: `flash_attn_interface` (3, on Hopper), else `flash_attn` (from 2.1 on).

    flash-attn 4 puts its own kernels into the same name without a package around them (`flash_attn/cute`): a `flash_attn` that
    is only such a folder has no varlen kernel of this signature, and neither has one without a release of its own.
    """
    if _is_module("flash_attn_interface") and all(capability == FLASH_ATTN_3_GPU for _, capability in cuda_devices()):
        return "flash_attn_interface"
    if not _is_module("flash_attn"):
        return None
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return None
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:2])
    return "flash_attn" if numbers >= FLASH_ATTN_ALIGNED else None


def _is_module(name: str) -> bool:
    """Whether `name` is a module or package with code of its own, not a folder that only others put theirs in."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _flash_attn() -> Capability:
    if flash_attention():
        detail = "FlashAttention 3" if flash_attention() == "flash_attn_interface" else _version("flash-attn")
        return Capability(name="flash-attn", available=True, detail=detail)
    cost = "packed documents run on torch's varlen kernel instead of flash-attn's; whole windows lose nothing"
    remedy = "on a CUDA machine: pip install --no-build-isolation 'nemo-longctx[flash]'"
    return Capability(name="flash-attn", available=False, detail="not installed", cost=cost, remedy=remedy)


def _apex() -> Capability:
    name, spec = "NVIDIA's apex", importlib.util.find_spec("apex")
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if origin is not None and (origin.parent / "normalization").is_dir() and has_module("amp_C"):
        return Capability(name=name, available=True, detail=_version("apex"))
    detail = (
        "not installed" if origin is None else "the installed apex is another package: it has no apex.normalization and amp_C"
    )
    cost = "no fused Adam, fused norms and gradient accumulation fusion; torch's own, slower ones run instead"
    remedy = (
        "build it from NVIDIA's repository (github.com/NVIDIA/apex) on a CUDA machine: pip install --no-build-isolation "
        "--config-settings '--build-option=--cpp_ext --cuda_ext' . (the package of that name on PyPI is not NVIDIA's)"
    )
    return Capability(name=name, available=False, detail=detail, cost=cost, remedy=remedy)


def _gloo() -> Capability:
    if has_module("torch") and sys.platform in ("linux", "darwin"):
        return Capability(name="gloo", available=True, detail="in torch's build")
    cost = "no run of several processes without CUDA"
    return Capability(name="gloo", available=False, detail="no torch with gloo", cost=cost, remedy="install torch on Linux")


def _nccl(cuda_build: str | None) -> Capability:
    if cuda_build and sys.platform == "linux":
        return Capability(name="nccl", available=True, detail=f"in torch's build for CUDA {cuda_build}")
    detail = "torch is a CPU build" if has_module("torch") else "torch is not installed"
    cost = "processes on GPUs cannot talk to each other; on CPUs gloo serves"
    return Capability(name="nccl", available=False, detail=detail, cost=cost, remedy="install torch's CUDA build")
