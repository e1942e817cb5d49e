"""Numbers of tokens on an axis: binary thousands where they are exact, decimal ones otherwise."""

import pytest

from nemo_longctx.report.plots import tokens_label


@pytest.mark.parametrize(
    ("tokens", "label"),
    [
        (1, "1"), (999, "999"), (1000, "1k"), (1023, "1.02k"), (1024, "1k"), (1025, "1.02k"), (1536, "1.5k"), (1792, "1.79k"),
        (512, "512"), (4096, "4k"), (131_072, "128k"), (1_048_064, "1023.5k"), (1 << 20, "1.05M"), (1_500_000, "1.5M"),
        (999_999, "1e+03k"), (1e9, "1B"), (4e11, "400B"), (1e12, "1T"), (2.5e12, "2.5T"),
    ],
)  # fmt: skip
def test_labels(tokens, label):
    assert tokens_label(tokens) == label
