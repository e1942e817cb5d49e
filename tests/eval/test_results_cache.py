"""Results on disk: what is put is found again, of however many keys; any part of a request makes another key."""

import pytest
import torch

from nemo_longctx.eval.results_cache import ResultsCache, request_key, weights_digest


def test_what_is_put_is_found_of_however_many_keys(tmp_path):
    cache = ResultsCache(tmp_path / "new" / "cache.sqlite")
    values = {f"key {number}": {"loss": number / 3, "texts": ["é", None]} for number in range(1203)}
    cache.put(values)
    assert cache.get([*values, "unknown"]) == values
    assert cache.get([]) == {}
    for some in (1, 499, 500, 501, 1000, 1001):
        keys = list(values)[:some]
        assert ResultsCache(tmp_path / "new" / "cache.sqlite").get(keys) == {key: values[key] for key in keys}
    cache.put({"key 0": 5})
    assert cache.get(["key 0"]) == {"key 0": 5}


def test_every_part_of_a_request_is_in_its_key():
    given = {
        "identity": {"weights": "a", "tokenizer": "t"},
        "kind": "score",
        "tokens": [1, 2, 3],
        "split": 1,
        "options": {"k": 1},
    }
    others = [
        {"identity": {"weights": "b", "tokenizer": "t"}}, {"identity": {"weights": "a", "tokenizer": "u"}},
        {"kind": "generate"},
        {"tokens": [1, 2, 4]}, {"tokens": [1, 2]}, {"split": 2}, {"options": {"k": 2}}, {"options": {}},
    ]  # fmt: skip
    keys = [request_key(**given), *(request_key(**{**given, **other}) for other in others)]
    assert len(set(keys)) == len(keys)
    assert request_key(**given) == request_key(**{**given, "identity": {"tokenizer": "t", "weights": "a"}})


def test_every_part_of_the_weights_is_in_their_digest():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(4)
    digest = weights_digest([("a", a), ("b", b)])
    assert digest == weights_digest([("b", b), ("a", a)])
    others = [
        [("a", a.reshape(3, 2)), ("b", b)], [("a", a.flip(0)), ("b", b)], [("c", a), ("b", b)], [("a", a)],
        [("a", a.double()), ("b", b)], [("a", a), ("b", b * (1 + 2e-7))],
    ]  # fmt: skip
    digests = [digest, weights_digest([("a", a), ("b", b)], "base=5e5"), *map(weights_digest, others)]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("tensors", "settings", "digest"),
    [
        (
            [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(4, dtype=torch.float64))],
            "",
            "9e156969b5399fe7ec231abf188d4c82",
        ),
        ([("a", torch.arange(6.0).reshape(2, 3))], "base=5e5", "e2e09ebfde567b32337cd365415f080d"),
        (
            [("c", torch.arange(5, dtype=torch.uint8)), ("d", torch.tensor([True, False]))],
            "",
            "b41c159e20de4e10fb8ced4985b4b7ed",
        ),
        (
            [("e", torch.arange((1 << 22) + 3, dtype=torch.int16))],
            "",
            "45457031e18d53c865fd3ebaed3a2eb3",
        ),  # more than is summed at once
    ],
    ids=["floats", "settings", "bytes", "large"],
)
def test_a_cache_of_an_earlier_release_is_found_again(tensors, settings, digest):
    """Else all that was paid for is measured once more: a change of these needs a line in the change log."""
    assert weights_digest(tensors, settings) == digest


def test_a_key_of_an_earlier_release_is_found_again():
    key = request_key({"weights": "a", "step": 3}, "generate", [5, 6, 7], 2, {"until": ["x"], "max": 3})
    assert key == "43d17478ec5f6cca5d788f251e21091583225958"
