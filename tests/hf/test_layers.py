"""Which layers have a window, and which no RoPE, is what transformers' own config class makes of the same keys."""

import pytest
from hf_files import config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import read_config
from nemo_longctx.hf.layers import FULL, SLIDING, attention_values

LAYERS, LONGEST = 4, 512
BY_TYPE = ("qwen2", "qwen3", "smollm3")
WINDOWS = st.sampled_from([None, 64, LONGEST - 1, LONGEST, LONGEST + 1])


def read(family, keys):
    return read_config(config_of(family, pad_token_id=None, max_position_embeddings=LONGEST, **keys))


def theirs(family, keys):
    """Each layer's window as transformers has it, None where it covers every input."""
    config = AutoConfig.for_model(**config_of(family, pad_token_id=None, max_position_embeddings=LONGEST, **keys))
    window = config.sliding_window
    kinds = [SLIDING if window else FULL] * LAYERS if family == "mistral" else config.layer_types
    return [window if kind == SLIDING and window is not None and window < LONGEST else None for kind in kinds]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(("mistral", "qwen2", "qwen3")),
    keys=st.fixed_dictionaries({"sliding_window": WINDOWS, "use_sliding_window": st.booleans(),
                                "max_window_layers": st.integers(0, LAYERS + 1)}),
)  # fmt: skip
def test_windows_are_read_as_transformers_reads_them(family, keys):
    if family == "mistral":
        keys = {"sliding_window": keys["sliding_window"]}
    found = read(family, keys)
    assert list(found.windows) == theirs(family, keys)
    assert found.no_rope == (False,) * LAYERS
    again = read(family, attention_values(family, found.windows, found.no_rope))
    assert (again.windows, again.no_rope) == (found.windows, found.no_rope)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rope=st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=LAYERS, max_size=LAYERS)),
    interval=st.integers(1, LAYERS + 1),
    window=WINDOWS,
    slides=st.booleans(),
)
def test_smollm3s_layers_are_read_as_transformers_reads_them(rope, interval, window, slides):
    """Those without RoPE have the window, where nothing says each layer's type."""
    keys = {"no_rope_layer_interval": interval, "sliding_window": window, "use_sliding_window": slides}
    keys |= {} if rope is None else {"no_rope_layers": rope}
    found = read("smollm3", keys)
    config = AutoConfig.for_model(**config_of("smollm3", pad_token_id=None, **keys))
    assert [int(not each) for each in found.no_rope] == list(config.no_rope_layers)
    assert list(found.windows) == theirs("smollm3", keys)
    again = read("smollm3", attention_values("smollm3", found.windows, found.no_rope))
    assert (again.windows, again.no_rope) == (found.windows, found.no_rope)


@pytest.mark.parametrize("family", BY_TYPE)
@pytest.mark.parametrize("kinds", [[FULL, SLIDING] * 2, [SLIDING] * 4, [FULL] * 4])
def test_layer_types_go_before_the_counts(family, kinds):
    keys = {"layer_types": kinds, "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}
    assert list(read(family, keys).windows) == [64 if kind == SLIDING else None for kind in kinds] == theirs(family, keys)


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("qwen2", {"layer_types": [FULL] * 3}, f"layer_types=.*must be 4 of '{FULL}' and '{SLIDING}', one a layer"),
        ("qwen2", {"layer_types": [FULL] * 3 + ["chunked"]}, "must be 4 of"),
        ("qwen2", {"layer_types": FULL}, "must be 4 of"),
        ("qwen3", {"layer_types": [SLIDING] * 4}, "sliding_window=.*set it and use_sliding_window=true"),
        ("mistral", {"layer_types": [FULL] * 4, "sliding_window": 64}, "mistral's layers all have the window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": -1}, "max_window_layers=-1: must be"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": True}, "max_window_layers=True"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0: must be a whole number of layers, 1 or more"),
        ("smollm3", {"no_rope_layer_interval": True}, "no_rope_layer_interval=True: must be a whole number"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers=.*must be 4 numbers"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}, "must be 4 numbers, 1 for a layer with RoPE and 0 for one without"),
    ],
)  # fmt: skip
def test_what_says_no_layers_is_refused(family, keys, said):
    with pytest.raises(ConfigError, match=said):
        read(family, keys)


def test_a_window_over_all_is_told():
    assert read("mistral", {"sliding_window": LONGEST - 1}).notes == ()
    (note,) = read("mistral", {"sliding_window": LONGEST}).notes
    assert note == "sliding_window=512 covers all of max_position_embeddings=512: taken as full attention"
