"""The package's long description: README.md without what means nothing outside the checkout. The rest is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def long_description(text: str) -> str:
    """Pictures of the checkout are left out with the line below them, links into it are their words."""
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n(?:\*[^*]+\*\n)?", "", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


if __name__ == "__main__":
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=long_description(readme), long_description_content_type="text/markdown")
