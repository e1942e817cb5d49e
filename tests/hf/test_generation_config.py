"""Each field of a `generation_config.json`: its kind, its bounds, and what is said of those that are not carried."""

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.generation import SAMPLING, read_generation_config, with_length

COUNTS = ("max_length", "max_new_tokens", "num_beams", "num_return_sequences")
LEAST_NONE = ("min_length", "min_new_tokens", "top_k")
SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def read(**raw):
    return read_generation_config({"do_sample": True, "num_beams": 9, **raw}, 100)


def refusal(**raw):
    with pytest.raises(ConfigError) as error:
        read(**raw)
    return str(error.value)


@pytest.mark.parametrize("key", [*COUNTS, *LEAST_NONE])
def test_counts_are_whole_numbers(key):
    least = 1 if key in COUNTS else 0
    for value in (least, 9, 9.0):
        kept, notes = read(**{key: value})
        assert (kept[key], type(kept[key]), notes) == (int(value), int, [])
    assert refusal(**{key: least - 1}) == f"{key}={least - 1}: must be {least} or more, in generation_config.json"
    for value in (1.5, "1", True, [1], float("inf"), float("nan")):
        assert refusal(**{key: value}) == f"{key}={value!r}: must be a whole number, in generation_config.json"
    assert key not in read(**{key: None})[0] or key == "num_beams"


@pytest.mark.parametrize("key", [*SHARES, "temperature", "repetition_penalty", "length_penalty"])
def test_numbers_have_their_bounds(key):
    for value in (0.25, 1, 1.0):
        assert read(**{key: value})[0][key] == value
    for value in ("1", True, [1], float("inf"), float("nan")):
        assert refusal(**{key: value}) == f"{key}={value!r}: must be a number, in generation_config.json"
    if key == "length_penalty":
        assert read(length_penalty=-2.0)[0]["length_penalty"] == -2.0
    else:
        assert refusal(**{key: -0.25}) == f"{key}=-0.25: must be 0 or more, in generation_config.json"
    if key in SHARES:
        assert refusal(**{key: 1.01}) == f"{key}=1.01: must be a share of 0 to 1, in generation_config.json"
    else:
        assert read(**{key: 1.5})[0][key] == 1.5
    if key == "repetition_penalty":
        assert refusal(repetition_penalty=0.0) == (
            "repetition_penalty=0.0: must be above 0, in generation_config.json; 1.0 is none"
        )


@pytest.mark.parametrize("key", ["do_sample", "use_cache", "renormalize_logits"])
def test_flags_are_true_or_false(key):
    for value in (True, False):
        assert read_generation_config({key: value}, 100) == ({key: value}, [])
    assert refusal(**{key: 1}) == f"{key}=1: must be true or false, in generation_config.json"


@pytest.mark.parametrize("key", SAMPLING)
def test_a_sampling_field_says_sampling_unless_the_file_says_none(key):
    value = 0.5 if key != "top_k" else 7
    kept, notes = read_generation_config({key: value}, 100)
    assert kept == {key: value, "do_sample": True}
    said = f"generation_config.json sets {key} without do_sample; do_sample=True is written, since they say sampling"
    assert notes == [said]
    assert read_generation_config({key: value, "do_sample": True}, 100) == (kept, [])
    kept, notes = read_generation_config({key: value, "do_sample": False}, 100)
    assert kept == {"do_sample": False}
    assert notes == [
        f"generation_config.json says do_sample=false, by which {key} have no effect: left out, since it would not be saved"
    ]
    unset = SAMPLING[key]
    assert read_generation_config({key: unset}, 100) == ({} if unset is None else {key: unset}, [])


def test_unset_is_what_transformers_holds_unset():
    numbers = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    assert numbers | {"min_p": None} == SAMPLING


def test_a_temperature_of_nothing_is_greedy():
    kept, notes = read_generation_config({"temperature": 0, "top_p": 0.5, "do_sample": True, "max_new_tokens": 3}, 100)
    assert kept == {"do_sample": False, "max_new_tokens": 3}
    assert notes == [
        "generation_config.json says temperature=0, by which temperature, top_p have no effect: left out, since it would not "
        "be saved"
    ]


@pytest.mark.parametrize(
    ("raw", "kept", "said"),
    [
        ({"num_return_sequences": 2}, {}, "num_return_sequences=2 needs sampling or beams; dropped"),
        ({"num_return_sequences": 1}, {"num_return_sequences": 1}, None),
        ({"num_return_sequences": 2, "do_sample": True}, {"num_return_sequences": 2, "do_sample": True}, None),
        ({"num_return_sequences": 2, "num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}, None),
        (
            {"num_return_sequences": 3, "num_beams": 2},
            {"num_beams": 2},
            "num_return_sequences=3 is more than num_beams; dropped",
        ),
        ({"length_penalty": 0.5}, {}, None),
        ({"length_penalty": 0.5, "num_beams": 1}, {"num_beams": 1}, None),
        ({"length_penalty": 0.5, "num_beams": 2}, {"length_penalty": 0.5, "num_beams": 2}, None),
        ({"b": 1, "a": [1]}, {}, "a, b not carried; set them again after the export"),
        (
            {"_a": 1, "transformers_version": "5", "cache_implementation": "x", "b": None, "c": False, "d": [], "e": {}},
            {},
            None,
        ),
        (
            {"bos_token_id": 0, "eos_token_id": [1, 99], "pad_token_id": None},
            {"bos_token_id": 0, "eos_token_id": [1, 99]},
            None,
        ),
    ],
)
def test_what_is_kept_and_what_is_said(raw, kept, said):
    found, notes = read_generation_config(raw, 100)
    assert found == kept
    assert [note.removeprefix("generation_config.json: ") for note in notes] == ([said] if said else [])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("eos_token_id", 100, "outside the 100 rows of the embedding, in generation_config.json"),
        ("eos_token_id", "2", "must be a token's number, in generation_config.json"),
        ("eos_token_id", [True], "must be a token's number, in generation_config.json"),
        ("eos_token_id", [], "must be one token's number, in generation_config.json"),
        ("bos_token_id", [1], "must be one token's number, in generation_config.json"),
        ("eos_token_id", [1, -1], "must be numbers of 0 or more, in generation_config.json"),
    ],
)
def test_tokens_are_rows_of_the_embedding(key, value, said):
    assert refusal(**{key: value}).startswith(f"{key}={value!r}: {said}")
    kept, notes = read(pad_token_id=-1)
    assert ("pad_token_id" in kept, notes) == (False, ["pad_token_id=-1 in generation_config.json means none"])


def test_a_limit_of_the_old_length_goes_with_it():
    assert with_length({"max_length": 4096, "top_k": 3}, 8192) == {"max_length": 8192, "top_k": 3}
    assert with_length({"top_k": 3}, 8192) == {"top_k": 3}
