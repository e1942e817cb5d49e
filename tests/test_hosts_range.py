"""Outside the range of hosts: one sentence, before anything of the host is imported."""

import importlib
import subprocess
import sys
from importlib import metadata

import pytest

from nemo_longctx import capability
from nemo_longctx.adapters import megatron
from nemo_longctx.capability import HOST_RANGE, MEGATRON_RANGE, check_host
from nemo_longctx.config import ConfigError

INSIDE = {"nemo_toolkit": "2.7.3", "megatron-core": "0.15.3", "torch": "2.13.0", "transformers": "4.57.6", "numpy": "1.26.4"}


def installed(monkeypatch, **versions):
    there = INSIDE | {name.replace("_core", "-core"): version for name, version in versions.items()}

    def version(name):
        if there.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(capability.metadata, "version", version)


@pytest.mark.parametrize(
    "versions",
    [{}, {"nemo_toolkit": "2.4.0rc1", "megatron_core": "0.13.1"}, {"torch": "2.8.0a0+34c6371d24.nv25.8"},
     {"torch": "2.14.1+cu130"}, {"megatron_core": "0.16.0", "transformers": "5.12.0", "numpy": "2.3.5"},
     {"nemo_toolkit": None}],
)  # fmt: skip
def test_a_host_of_the_range_is_taken(monkeypatch, versions):
    installed(monkeypatch, **versions)
    check_host()


@pytest.mark.parametrize(
    ("package", "version"),
    [("nemo_toolkit", "3.0.0"), ("nemo_toolkit", "2.3.2"), ("megatron_core", "0.12.3"), ("megatron_core", "0.19.2"),
     ("torch", "2.5.1"), ("transformers", "4.48.0"), ("numpy", "1.24.4")],
)  # fmt: skip
def test_a_host_outside_is_named_with_what_would_do(monkeypatch, package, version):
    installed(monkeypatch, **{package: version})
    name = package.replace("_core", "-core")
    low, high = (".".join(map(str, each)) for each in HOST_RANGE[name])
    with pytest.raises(ConfigError, match=f"{name}>={low},<{high}") as error:
        check_host()
    assert (error.value.key, error.value.value) == (name, version)
    monkeypatch.setenv("NEMO_LONGCTX_ANY_HOST", "1")
    check_host()


def test_the_room_for_megatron_core_goes_further(monkeypatch):
    installed(monkeypatch, megatron_core="0.19.2", nemo_toolkit="3.0.0")
    check_host(MEGATRON_RANGE)
    importlib.reload(megatron)
    for package, version in (("megatron_core", "0.12.3"), ("megatron_core", "0.20.0"), ("torch", "2.5.1")):
        installed(monkeypatch, **{package: version})
        with pytest.raises(ConfigError, match=version):
            importlib.reload(megatron)


PROBE = """
import sys
from importlib import metadata
version = metadata.version
metadata.version = lambda name: "3.0.0" if name == "nemo_toolkit" else version(name)
from nemo_longctx.config import ConfigError
try:
    import nemo_longctx.adapters.nemo.recipes
except ConfigError as error:
    print(error)
print("imported:", sorted(name for name in sys.modules if name in ("nemo", "megatron", "torch", "lightning")))
"""


def test_nothing_of_a_host_outside_is_imported():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert "nemo_toolkit='3.0.0'" in done.stdout
    assert "imported: []" in done.stdout
