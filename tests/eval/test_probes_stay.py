"""What a seed makes stays what it is: scores of two releases are of the same probes, and those kept in a cache are made alike.

A change of these digests is a change of the probes: raise `code` in the key of their cache (`make_probes`), tell it in the
change log, and write the new digests here.
"""

import hashlib
import json

import pytest
from published import STORY
from test_ruler import HOTPOT, SQUAD
from tiny_models import byte_tokenizer

from nemo_longctx.eval.probes import KINDS, SUITES, ProbeConfig, make_probes

TEXTS = [
    "Mr. Hay came home at six o'clock, as on every other day! Nobody knew why. The dog, however, had been waiting for him "
    "since noon; it slept now. Would it wake? " + "The harbour lay still and the boats were late in coming back. " * 3,
    "Two\nThe river had risen during the night and taken the bridge. They waited for the ferry until noon. " + STORY * 4,
]
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
STAY = {
    "first_sentence": "8a2f8163e86b3ad5", "passkey": "52d59f47d922be56", "record": "ddad566ac2af4a30",
    "code": "4920c9cb761072e0", "needle": "29d21e3929964ee9", "needle_multi_key": "324e0bbd7799f11c",
    "needle_multi_value": "c3cdb95b085c94f1", "variable_tracking": "5b37ffae5c0b9b24", "nolima": "f46579af426c7623",
    "ruler_niah_single_1": "1bf1ecbf39946f72", "ruler_niah_single_2": "374a051e31e27e77",
    "ruler_niah_single_3": "89dde6a4aa6178d0", "ruler_niah_multikey_1": "364b4a4d35bc0e13",
    "ruler_niah_multikey_2": "109d23fee771039d", "ruler_niah_multikey_3": "0b25ef87968afa91",
    "ruler_niah_multivalue": "a746af1f0e1aadea", "ruler_niah_multiquery": "2c52ad011253700b",
    "ruler_vt": "7d136f72036f0bfa", "ruler_cwe": "4e39b462b13366d7", "ruler_fwe": "5d8cb6d970024e83",
    "ruler_qa_1": "0c5635b435c70b6c", "ruler_qa_2": "ecf95332aa89bf51", "helmet_icl": "bf41fafac3b3bf3d",
    "helmet_json_kv": "563fc094f62b7c09", "helmet_rag": "d87f836dca8d1010", "helmet_rerank": "a91e14dbd5331fa4",
    "mrcr_2": "4136bf0949db478f", "mrcr_4": "dc937bd65faaf2cc", "mrcr_8": "ffb7d7823630357a",
}  # fmt: skip
FILE = "probes-102d9a7bf23e1b2a0a5bd76f.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions")
    (root / "squad.json").write_text(json.dumps(SQUAD))
    (root / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    return root


def digest(kind, folder):
    """Of the probes of one kind: two lengths and depths, several samples, two seeds, the second with a chat template."""
    tokenizer = byte_tokenizer(["x"], vocab=258)  # a token a byte: nothing depends on how merges are learned
    lengths = {"ruler_cwe": (2500, 9000), "ruler_fwe": (1200, 3000)}.get(kind, (1300, 2600))
    seeds, samples = ((3,), 5) if kind.startswith("ruler_niah_multikey") else ((3, 4), 2)
    if kind in ("ruler_cwe", "helmet_rerank"):
        seeds, samples = (3,), 1
    made = []
    for seed in seeds:
        tokenizer.chat_template = CHAT if seed == 4 and kind in SUITES["mrcr"] else None
        config = ProbeConfig(kinds=(kind,), lengths=lengths, depths=(0.1, 0.75), samples=samples, seed=seed, data=str(folder))
        unmade = {}
        made += [probe.content_hash for probe in make_probes(config, TEXTS, tokenizer, prefix=[5, 9], unmade=unmade)]
        made += [f"{length}: {why}" for (_, length), why in unmade.items()]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", KINDS)
def test_the_probes_of_a_seed_stay_what_they_are(kind, folder):
    assert digest(kind, folder) == STAY[kind]


def test_a_kept_file_is_found_again_and_each_thing_that_made_it_is_in_its_name(tmp_path, folder):
    def name(kinds=("record",), texts=TEXTS, template=None, prefix=(5,), extra="x", **more):
        tokenizer = byte_tokenizer([extra], vocab=258 + 8 * (extra != "x"))
        tokenizer.chat_template = template
        before = set(tmp_path.iterdir())
        config = ProbeConfig(kinds=kinds, lengths=(400,), depths=(0.5,), samples=1, **more)
        make_probes(config, texts, tokenizer, prefix=prefix, cache=tmp_path)
        return [path.name for path in set(tmp_path.iterdir()) - before]

    assert name() == [FILE]
    assert name() == []
    other = tuple(text + "." for text in TEXTS)
    changes = [
        {"kinds": ("code",)}, {"texts": other}, {"template": CHAT}, {"prefix": (6,)}, {"seed": 1}, {"max_new_tokens": 33},
        {"extra": "The harbour. The harbour."}, {"data": str(folder)},
    ]  # fmt: skip
    assert [len(name(**change)) for change in changes] == [1] * len(changes)
    (folder / "icl.jsonl").write_text("x")  # no key is read of it by this kind, but it is of the data
    assert len(name(data=str(folder))) == 1
