"""CUDA devices as the driver tells them, without torch."""

import ctypes
import types

import pytest

from nemo_longctx import capability
from nemo_longctx.config import ConfigError


def driver(refuses=""):
    """A driver of two devices; `refuses` names a call that fails, as where a kernel module is missing."""

    def count_of(count):
        count._obj.value = 2
        return 100 * (refuses == "cuDeviceGetCount")

    def device_of(device, index):
        device._obj.value = 10 + index

    def name_of(name, size, device):
        name.value = f"GPU {device.value}".encode()[: size - 1]

    def attribute_of(value, attribute, device):
        value._obj.value = {75: device.value - 1, 76: 0}[attribute]  # the compute capability's major and minor number

    return types.SimpleNamespace(
        cuInit=lambda flags: 100 * (refuses == "cuInit" or flags != 0), cuDeviceGetCount=count_of, cuDeviceGet=device_of,
        cuDeviceGetName=name_of, cuDeviceGetAttribute=attribute_of,
    )  # fmt: skip


def test_devices_have_a_name_and_a_compute_capability(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver()}[name])
    assert capability.cuda_devices() == [("GPU 10", (9, 0)), ("GPU 11", (10, 0))]


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount"])
def test_a_driver_that_fails_shows_no_device(monkeypatch, call):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver(refuses=call))
    assert capability.cuda_devices() == []


def test_a_machine_without_a_driver_has_no_device(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert capability.cuda_devices() == []


def versions(monkeypatch, **found):
    """Installed packages, by their names with _ for -."""

    def version(name):
        try:
            return found[name.replace("-", "_")]
        except KeyError:
            raise capability.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(capability.metadata, "version", version)


@pytest.mark.parametrize(
    ("name", "first", "last", "before", "beyond", "words"),
    [
        ("nemo_toolkit", "2.4.0", "2.7.9", "2.3.2", "2.8.0rc1", ">=2.4,<2.8"),
        ("megatron_core", "0.13.0", "0.16.1", "0.12.9", "0.17.0", ">=0.13,<0.17"),
        ("torch", "2.6.0+cu124", "2.14.1", "2.5.1", "2.15.0", ">=2.6,<2.15"),
        ("transformers", "4.51.0", "5.9", "4.50.3", "6.0.0", ">=4.51,<6.0"),
        ("numpy", "1.26.4", "2.9.0", "1.25.2", "3.0.0", ">=1.26,<3.0"),
    ],
)
def test_a_host_is_taken_within_its_range(monkeypatch, name, first, last, before, beyond, words):
    monkeypatch.delenv("NEMO_LONGCTX_ANY_HOST", raising=False)
    for version in (first, last, "main"):
        versions(monkeypatch, **{name: version})
        capability.check_host()
        assert capability.host_fault() is None
    for version in (before, beyond):
        versions(monkeypatch, **{name: version})
        with pytest.raises(ConfigError) as error:
            capability.check_host()
        known = name.replace("_core", "-core")
        assert str(error.value) == (
            f"{known}={version!r}: is outside what this version of nemo-longctx runs on ({known}{words}); install one of "
            "those, or set NEMO_LONGCTX_ANY_HOST=1 to try it all the same"
        )
        assert capability.host_fault() == str(error.value)
        monkeypatch.setenv("NEMO_LONGCTX_ANY_HOST", "1")
        capability.check_host()
        monkeypatch.delenv("NEMO_LONGCTX_ANY_HOST")


def test_megatron_alone_may_be_newer():
    assert capability.MEGATRON_RANGE == {"megatron-core": ((0, 13), (0, 20)), "torch": ((2, 6), (2, 15))}


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("nemo.collections", "nemo"), ("megatron", "nemo"), ("lightning.pytorch", "nemo"), ("ray", "nemo"), ("lm_eval", "eval"),
        ("datasets", "eval"), ("openai", "instruct"), ("vaderSentiment", "safety"), ("torch", None), ("yaml", None),
        (None, None),
    ],
)  # fmt: skip
def test_what_an_extra_brings_is_told_with_the_extra(module, extra):
    said = capability.missing_extra(ModuleNotFoundError("x", name=module))
    top = (module or "").partition(".")[0]
    wanted = f"this needs {top}, which is not installed: pip install 'nemo-longctx[{extra}]'"
    assert said == (wanted if extra else None)


def test_versions_of_what_is_not_installed_are_none(monkeypatch):
    versions(monkeypatch, torch="2.7.1", nemo_longctx="1.0")
    found = capability.package_versions()
    assert {key: value for key, value in found.items() if value is not None and key != "python"} == {
        "torch": "2.7.1", "nemo-longctx": "1.0"
    }  # fmt: skip
    assert set(found) == {"python", *capability.PACKAGES}


@pytest.mark.parametrize(
    ("modules", "version", "wanted"),
    [
        ((), None, None),
        (("flash_attn_interface", "flash_attn"), "2.0.9", "flash_attn_interface"),
        (("flash_attn",), "2.1", "flash_attn"),
        (("flash_attn",), "2.0.9", None),
        (("flash_attn",), "3.0b1", "flash_attn"),
        (("flash_attn",), "2.x", None),
        (("flash_attn",), None, None),
        ((), "2.8", None),
    ],
)
def test_a_flash_attn_is_taken_from_the_version_that_aligns_the_last_keys(monkeypatch, modules, version, wanted):
    monkeypatch.setattr(capability, "_is_module", modules.__contains__)
    versions(monkeypatch, **({} if version is None else {"flash_attn": version}))
    capability.flash_attention.cache_clear()
    try:
        assert capability.flash_attention() == wanted
        found = capability._flash_attn()
        assert found.available == bool(wanted)
        if wanted:
            assert found.detail == ("FlashAttention 3" if wanted == "flash_attn_interface" else version)
    finally:
        capability.flash_attention.cache_clear()


@pytest.mark.parametrize(
    ("gpus", "build", "cuda", "bf16", "nccl"),
    [
        ([], None, "no NVIDIA driver, or it shows no device", "no CUDA", "torch is a CPU build"),
        ([], "12.6", "no NVIDIA driver, or it shows no device", "no CUDA", True),
        ([("A", (9, 0))], None, "A is there, but torch is a CPU build", "no CUDA", "torch is a CPU build"),
        ([("A", (8, 0)), ("B", (7, 5))], "12.6", True, "no GPU of compute capability 8.0 or more", True),
        ([("A", (8, 0))], "12.6", True, True, True),
        ([("A", (7, 5))], "12.6", True, "no GPU of compute capability 8.0 or more", True),
    ],
)
def test_what_a_machine_can_is_told_with_what_it_costs(monkeypatch, gpus, build, cuda, bf16, nccl):
    monkeypatch.setattr(capability, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(capability, "_torch_cuda_build", lambda: build)
    monkeypatch.setattr(capability.sys, "platform", "linux")
    found = {each.name: each for each in capability.capabilities()}
    assert list(found) == ["CUDA", "bf16", "Transformer Engine", "flash-attn", "NVIDIA's apex", "gloo", "nccl"]
    details = {"CUDA": f"{len(gpus)} x A, torch built for CUDA 12.6", "bf16": "compute capability 8.0"}
    details |= {"nccl": "in torch's build for CUDA 12.6"}
    for name, wanted in (("CUDA", cuda), ("bf16", bf16), ("nccl", nccl)):
        each = found[name]
        assert each.available == (wanted is True)
        assert each.detail == (details[name] if wanted is True else wanted)
        assert bool(each.cost) == bool(each.remedy) == (wanted is not True)


def test_a_build_of_torch_is_read_from_its_version_file(monkeypatch, tmp_path):
    def installed(text):
        (tmp_path / "version.py").write_text(text)
        spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: spec if name == "torch" else None)
        return capability._torch_cuda_build()

    assert installed("__version__ = '2.7.1+cu126'\ncuda: Optional[str] = '12.6'\n") == "12.6"
    assert installed("cuda = '12.4'\nhip = None\n") == "12.4"
    assert installed("cuda: Optional[str] = None\n") is None
    assert not capability.has_module("nothing")
    assert capability.has_module("torch")
    for spec in (None, types.SimpleNamespace(origin=None)):
        monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert capability._torch_cuda_build() is None
        assert not capability._is_module("torch")


@pytest.mark.parametrize(
    ("there", "amp", "normalization", "detail"),
    [
        (False, False, False, "not installed"),
        (True, True, False, "the installed apex is another package: it has no apex.normalization and amp_C"),
        (True, False, True, "the installed apex is another package: it has no apex.normalization and amp_C"),
        (True, True, True, None),
    ],
)
def test_another_package_called_apex_is_not_nvidia_s(monkeypatch, tmp_path, there, amp, normalization, detail):
    if normalization:
        (tmp_path / "normalization").mkdir()
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    known = {"apex": spec if there else None, "amp_C": spec if amp else None}
    monkeypatch.setattr(capability.importlib.util, "find_spec", known.get)
    versions(monkeypatch)
    found = capability._apex()
    assert (found.available, found.detail) == (detail is None, detail or "unknown version")
    assert bool(found.cost) == (detail is not None)
