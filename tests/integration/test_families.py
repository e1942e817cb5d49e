"""`docs/families.md` is made again: each family and option from import over three steps to evaluation and export."""

from pathlib import Path

import host_server
import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


def answers(text):
    """family -> the words of its cells, without the figures."""
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 8]
    return {line.split("`")[1]: [cell.split(",")[0].strip() for cell in line.split("|")[2:7]] for line in rows}


@pytest.mark.slow
def test_the_families_table_is_made_again():
    """Logits of each export at positions up to 6,000 are within 1e-4 of transformers', or the script says FAILED."""
    page = answers((DOCS / "families.md").read_text(encoding="utf-8"))
    status, said = host_server.start(DOCS / "make_families.py", *page).finish()
    assert status == 0, said[-3000:]
    assert answers(said) == page
    stays = "llama, rope.layers=full_attention"  # two RoPEs, which no Llama of transformers has
    assert page.pop(stays) == [*["yes"] * 4, "no"]
    assert set(map(tuple, page.values())) == {("yes",) * 5}
