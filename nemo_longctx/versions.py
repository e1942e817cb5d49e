"""Versions of packages, for records of what a result was made with."""

from __future__ import annotations

from importlib import metadata


def versions_of(*names: str) -> dict[str, str]:
    """Package -> version; "not installed" for one without metadata: absent, or a checkout that PYTHONPATH alone finds."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
