"""The user's labelled texts: what is taken, and each mistake by its row."""

import json

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.question_data import read_labelled

GOOD = [{"text": f"text {n}", "label": n % 2} for n in range(4)]


def folder_of(path, rows):
    (path / "icl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_are_kept_by_label_each_once(tmp_path):
    assert read_labelled(tmp_path) == {}
    found = read_labelled(folder_of(tmp_path, [*GOOD, GOOD[1], {"text": "alone", "label": "x"}]))
    assert found == {"0": ["text 0", "text 2"], "1": ["text 1", "text 3"], "x": ["alone"]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}], "row 1 is no"),
        ([*GOOD, {"label": "a"}], "row 5 is no"),
        ([GOOD[0], {"text": 3, "label": "a"}], "row 2 is no"),
        ([GOOD[0], ["text", "label"]], "row 2 is no"),
        (GOOD[:3], "needs two labels with two texts each"),
        ([*GOOD[:3], GOOD[1]], "needs two labels with two texts each"),
    ],
)
def test_a_row_that_is_none_is_named_by_its_number(rows, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        read_labelled(folder_of(tmp_path, rows))
