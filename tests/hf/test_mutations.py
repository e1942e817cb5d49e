"""A hundred mutated directories of the ten thousand that `mutations.py` tries by itself: no traceback, no other frequencies."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mutations import try_mutation


@pytest.mark.parametrize("number", [1322, 1419, 1890, 9592, 9997])
def test_directories_that_once_ended_in_a_traceback(number, tmp_path):
    """Trained lengths beyond 64 bits and beyond floats, and Llama-3 scaling whose trained length is null."""
    assert try_mutation(tmp_path, number).startswith("refused")


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_a_mutated_directory_loads_as_transformers_reads_it_or_is_refused(first, tmp_path_factory):
    for number in range(first, first + 20):
        assert try_mutation(tmp_path_factory.mktemp(str(number)), number).split()[0] in ("taken", "refused")
