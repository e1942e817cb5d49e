"""One self-contained HTML page: headings, notes, tables and figures, with no file beside it and no script in it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
figure{margin:1rem 0;overflow-x:auto}img{max-width:100%;height:auto;display:block}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.25rem .8rem;border-bottom:1px solid #eee;text-align:right;white-space:nowrap}
th{font-weight:600;white-space:normal;vertical-align:bottom;background:#f6f6f4}
tr:hover td{background:#fafaf7}
th:first-child,td:first-child{text-align:left}
table.said td,table.said th{white-space:normal;vertical-align:top;text-align:left}
table.said td:first-child{min-width:11rem}
table.said td:nth-child(2){font-weight:600;min-width:4rem}table.said td:nth-child(4){min-width:13rem}
p.note{color:#555;max-width:46rem}
nav{columns:2;margin:1rem 0 0;padding:0}nav a{display:block;color:#0072B2;text-decoration:none}
nav a:hover{text-decoration:underline}
@media(max-width:40rem){body{padding:0 .75rem}img{max-width:none;width:46rem}nav{columns:1}nav a{padding:.3rem 0}}
pre{background:#f6f6f4;padding:.8rem 1rem;overflow-x:auto;font-size:12px}summary{cursor:pointer;color:#0072B2}
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page.

    Args:
        heading: its title. note: a paragraph under it.
        figures: PNG files to embed. table: rows, the first of them the header.
        said: the table's cells are sentences, which wrap, and the second column says what came out.
        code: text in a fixed pitch, folded until it is asked for.
    """

    heading: str
    note: str = ""
    figures: Sequence[str | Path] = ()
    table: Sequence[Sequence[object]] = field(default_factory=tuple)
    said: bool = False
    code: str = ""


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page, making its folder; every text is escaped. Returns the path."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if len(sections) > 2:
        links = [f'<a href="#s{number}">{html.escape(section.heading)}</a>' for number, section in enumerate(sections)]
        parts.append(f"<nav>{''.join(links)}</nav>")
    for number, section in enumerate(sections):
        parts.append(f'<h2 id="s{number}">{html.escape(section.heading)}</h2>')
        if section.note:
            parts.append(f'<p class="note">{html.escape(section.note)}</p>')
        for figure in section.figures:
            data = base64.b64encode(Path(figure).read_bytes()).decode("ascii")
            name = html.escape(Path(figure).stem)
            parts.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>')
        if section.table:
            parts.append(_table(section.table, said=section.said))
        if section.code:
            parts.append(f"<details><summary>show</summary><pre>{html.escape(section.code)}</pre></details>")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = '<!doctype html><html lang="en"><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    path.write_text(head + "\n".join(parts) + "</html>\n", encoding="utf-8")
    return path


def _table(rows: Sequence[Sequence[object]], *, said: bool) -> str:
    head, *body = ([_cell(value) for value in row] for row in rows)
    lines = ["<tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in body]
    kind = ' class="said"' if said else ""
    return f"<table{kind}>{''.join(lines)}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))
