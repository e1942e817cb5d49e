"""What an installation brings along: beside an existing host nothing that is there may have to move."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# The range of hosts: oldest and newest of each, and a container's pre-release of torch.
THERE = {
    "torch": ("2.6.0a0+ecf3bae40a.nv25.1", "2.8.0a0+34c6371d24.nv25.8", "2.10.0a0+b4e4ee81d3.nv25.12", "2.13.0", "2.14.1"),
    "numpy": ("1.26.4", "2.3.5"),
    "transformers": ("4.51.3", "4.53.3", "4.57.6", "5.12.0"),
}


@pytest.mark.parametrize(("package", "version"), [(name, each) for name, versions in THERE.items() for each in versions])
def test_the_core_dependencies_leave_a_host_s_packages_as_they_are(package, version):
    bounds = next(r.specifier for r in map(Requirement, PROJECT["dependencies"]) if r.name == package)
    assert bounds.contains(version, prereleases=True)


def test_the_host_is_in_extras_alone():
    names = {Requirement(each).name.lower().replace("_", "-") for each in PROJECT["dependencies"]}
    assert not names & {"nemo-toolkit", "megatron-core", "lightning", "lm-eval", "flash-attn", "transformer-engine", "apex"}


def test_the_lock_holds_versions_within_the_bounds():
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pins[name], prereleases=True), name
