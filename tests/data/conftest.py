"""Corpora whose tokens say where they come from: token = 1,000 * document + position; documents count on over sources."""

import numpy as np
import pytest

from nemo_longctx.data.corpus import IndexedCorpus
from nemo_longctx.data.writer import CorpusWriter

PER_DOCUMENT = 1000


@pytest.fixture
def telling_corpora(tmp_path_factory):
    """A function (lengths of each source) -> prefixes."""

    def make(sources):
        directory, number, prefixes = tmp_path_factory.mktemp("corpora"), 0, []
        for source, lengths in enumerate(sources):
            prefixes.append(str(directory / f"source{source}"))
            with CorpusWriter(prefixes[-1], np.int32) as writer:
                for length in lengths:
                    writer.add_document(number * PER_DOCUMENT + np.arange(length))
                    number += 1
        assert all(IndexedCorpus(prefix).n_tokens == sum(lengths) for prefix, lengths in zip(prefixes, sources, strict=True))
        return prefixes

    return make
