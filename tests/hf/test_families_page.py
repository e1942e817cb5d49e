"""`docs/families.md` says what the code does: its refusals word by word, and a row for each family that converts."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"
spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
make_families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_families)


def test_the_page_is_that_of_the_script():
    text = make_families.PAGE.read_text(encoding="utf-8")
    for family, why in make_families.refused().items():
        assert f"| `{family}` | {why} |" in text
    lines = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == len(make_families.COLUMNS) + 3]
    rows = {line.split("`")[1]: line for line in lines}
    assert set(make_families.DEFAULTS) | set(make_families.OPTIONS) == set(rows)
    for name, line in rows.items():
        assert line.count("| yes") == len(make_families.COLUMNS) - (name in make_families.KEPT)
