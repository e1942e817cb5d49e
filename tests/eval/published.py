"""Rows in the layout that each source's authors publish, one a source, and a folder of files made of them."""

import json
from pathlib import Path

import pytest

QMSUM = Path(__file__).parents[3] / "shared" / "eval" / "qmsum_val.jsonl"
needs_qmsum = pytest.mark.skipif(not QMSUM.exists(), reason="the published QMSum rows are not beside this checkout")
STORY = "Anna found the key under the mat. She opened the door and went in. It was dark, and nobody was there. "
# One row in the published layout of each source: {field: value} as their authors write them.
SCROLLS = {"id": "s1", "pid": "s1_0", "input": f"Where was the key?\n\n{STORY}", "output": "under the mat"}
QUALITY = {
    "id": "q1", "pid": "q1_0", "output": "Under the mat",
    "input": "Where was the key?\n\n (A) In a box\n (B) Under the mat\n (C) In the dark\n (D) Nowhere\n\n\n" + STORY,
}  # fmt: skip
ZERO = {
    "id": "z1",
    "pid": "z1_0",
    "input": f"Answer the question.\n\n{STORY}\n\nQuestion: Where was the key?\n\nAnswer:",
    "output": "mat",
}
ZERO |= {"document_start_index": 22, "document_end_index": 22 + len(STORY), "truncation_seperator": "..."}
ZERO |= {"query_start_index": ZERO["input"].index("Question"), "query_end_index": ZERO["input"].index("\n\nAnswer")}
BOLD = {
    "domain": "gender",
    "name": "Jacob_Zachar",
    "category": "American_actors",
    "prompts": ["Jacob Zachar is an American actor whose "],
    "wikipedia": ["Jacob Zachar is an American actor whose roles include two films."],
}
LEVAL = {
    "instructions": ["Where was the key?", "Was it dark?"],
    "outputs": ["under the mat", "Yes"],
    "input": STORY,
    "source": "x",
}


def published(source):
    if source.startswith("zero_"):
        return ZERO | ({"output": "(B)"} if source.endswith("quality") else {})
    if source.startswith("leval_"):
        return LEVAL | ({"outputs": ["A", "BC"]} if source in ("leval_coursera", "leval_tpo") else {})
    if source.startswith("bold_"):
        return BOLD
    return QUALITY if source == "quality" else SCROLLS


def write_files(root):
    """Each source's file in the layout of its own archive."""
    from nemo_longctx.eval.tasks import loaders

    for source in loaders.SOURCES:
        kind, _, name = source.partition("_") if source.startswith(("zero_", "leval_", "bold_")) else ("", "", source)
        folder = root / (kind or "scrolls") / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = [published(source) | {"id": f"{source}{n}"} for n in range(4)]
        if source == "zero_space_digest":
            rows = [row | {"output": "60%"} for row in rows]
        if source == "zero_book_sum_sort":
            rows = [row | {"output": "2, 1, 3"} for row in rows]
        if kind == "bold":
            rows = [
                row | {"category": group}
                for row, group in zip(rows, ("American_actors", "American_actresses") * 2, strict=True)
            ]
        for split in ("train", "validation"):
            if not kind:  # shots come from other documents than the sample's
                rows = [
                    row | {"id": f"{split}{n}", "input": f"{published(source)['input']} {split} {n}."}
                    for n, row in enumerate(rows)
                ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root
