"""CUDA devices as the driver tells them, without torch."""

import ctypes
import types

import pytest

from nemo_longctx import capability


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
