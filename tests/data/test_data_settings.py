"""What the data's settings refuse, at their bounds."""

import pytest

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.config import MOST_WORKERS, DataConfig


def data(**more):
    return build(DataConfig, {"mix": {"sources": [{"path": "a"}]}, **more}, where="data")


def sets(*names):
    return [{"name": name, "path": "b", "seq_length": 64} for name in names]


@pytest.mark.parametrize("mode", ["validation", "test"])
def test_each_set_has_a_name_of_its_own(mode):
    assert [each.name for each in getattr(data(**{mode: sets("a", "b", "c")}), mode)] == ["a", "b", "c"]
    data(validation=sets("a"), test=sets("a"))
    for names in (("a", "a"), ("a", "b", "a")):
        with pytest.raises(ConfigError, match=rf"data\.{mode}\.name='a': two sets have this name; give each its own"):
            data(**{mode: sets(*names)})


@pytest.mark.parametrize("key", ["cache_dir", "tokenizer", "after"])
def test_a_name_of_spaces_names_nothing(key):
    assert getattr(data(**{key: "x"}), key) == "x"
    assert getattr(data(), key) is None
    for value in ("", "  "):
        with pytest.raises(ConfigError, match=rf"data\.{key}='{value}': names nothing; leave it out, or name one"):
            data(**{key: value})


def test_workers_are_none_to_as_many_as_serve():
    assert [data(num_workers=number).num_workers for number in (0, 1, MOST_WORKERS)] == [0, 1, MOST_WORKERS]
    for number in (-1, MOST_WORKERS + 1):
        with pytest.raises(ConfigError, match=rf"data\.num_workers={number}: 0 \(read in the training process\) to"):
            data(num_workers=number)
