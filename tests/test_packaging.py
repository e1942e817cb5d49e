"""What an installation brings along: beside an existing host nothing that is there may have to move."""

import re
import subprocess
import sys
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


CONTAINERS = sorted((Path(__file__).parent / "fixtures" / "containers").glob("*.txt"))


def pins_of(text):
    found = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))
    return {name.lower().replace("_", "-"): version for name, version in found.items()}


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda path: path.stem)
def test_what_a_container_has_is_within_all_bounds(container):
    pins = pins_of(container.read_text(encoding="utf-8"))
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["nemo"], *extras["eval"], *extras["instruct"]]
    for requirement in map(Requirement, asked):
        name = requirement.name.lower().replace("_", "-")
        assert name not in pins or requirement.specifier.contains(pins[name], prereleases=True), (name, pins[name])


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS, ids=lambda path: path.stem)
def test_an_installation_in_a_container_resolves_to_what_is_there(container):
    """By uv's own resolver, which asks a package index; without one there is nothing to see."""
    uv, project = Path(sys.executable).with_name("uv"), Path(__file__).parent.parent / "pyproject.toml"
    command = [
        uv,
        "pip",
        "compile",
        "-q",
        "--python-version",
        "3.12",
        "--no-annotate",
        "--no-header",
        "--extra",
        "eval",
        project,
    ]
    done = subprocess.run([*command, "-c", container], capture_output=True, text=True, timeout=300)
    if done.returncode and re.search(r"connect|dns|network|timed out|fetch", done.stderr, re.IGNORECASE):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    there, resolved = pins_of(container.read_text(encoding="utf-8")), pins_of(done.stdout)
    assert "torch" in resolved
    assert {name: version for name, version in resolved.items() if there.get(name, version) != version} == {}


def test_the_host_is_in_extras_alone():
    names = {Requirement(each).name.lower().replace("_", "-") for each in PROJECT["dependencies"]}
    assert not names & {"nemo-toolkit", "megatron-core", "lightning", "lm-eval", "flash-attn", "transformer-engine", "apex"}


def test_the_lock_holds_versions_within_the_bounds():
    pins = pins_of((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    for requirement in map(Requirement, PROJECT["dependencies"]):
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pins[name], prereleases=True), name
