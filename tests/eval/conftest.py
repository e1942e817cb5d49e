"""The small Hugging Face model that tests of scoring share."""

import pytest
from tiny_models import tiny_llama


@pytest.fixture(scope="session")
def llama():
    return tiny_llama()
