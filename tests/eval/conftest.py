"""The small Hugging Face model and the published rows that tests of scoring and tasks share."""

import published
import pytest
from tiny_models import tiny_llama


@pytest.fixture(scope="session")
def llama():
    return tiny_llama()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Each source's file in the layout of its own archive."""
    return published.write_files(tmp_path_factory.mktemp("published"))
