"""The picture of a corpus' document lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_longctx.report.plots import COLOURS, new_figure, save, tokens_label


def plot_lengths(rows_by_source: Mapping[str, Sequence[Mapping[str, int]]], path: str | Path) -> Path:
    """Share of tokens (lines) and of documents (dotted) by document length, one colour a source: of many the largest, as many
    as there are colours.

    Args:
        rows_by_source: name -> rows of `LengthCounts.histogram`.
        path: PNG to write.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    figure, axes = new_figure()
    sizes = {name: sum(row["tokens"] for row in rows) for name, rows in rows_by_source.items()}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[: len(COLOURS)]
    n_sources, rows_by_source = len(sizes), {name: rows for name, rows in rows_by_source.items() if name in largest}
    low = min(rows[0]["at_least"] for rows in rows_by_source.values())
    high = max(rows[-1]["below"] for rows in rows_by_source.values())
    for number, rows in enumerate(rows_by_source.values()):
        edges = [rows[0]["at_least"], *(row["below"] for row in rows)]
        for what, style, width in (("tokens", "-", 2.0), ("documents", ":", 1.4)):
            total = sum(row[what] for row in rows)
            shares = [row[what] / total for row in rows]
            axes.stairs(shares, edges, color=COLOURS[number], linestyle=style, linewidth=width)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    ticks = [low << i for i in range((high // low).bit_length())]
    ticks = ticks[:: max(1, -(-len(ticks) // 12))]
    axes.set_xticks(ticks, [tokens_label(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    title = "Document lengths" if n_sources == len(largest) else f"Document lengths, the {len(largest)} largest of {n_sources}"
    axes.set_title(title, fontsize=11, loc="left", pad=10)
    axes.set_xlabel("tokens in a document", fontsize=9.5)
    axes.set_ylabel("share per doubling of the length", fontsize=9.5)
    keys = [
        Line2D([], [], color="#222222", linestyle="-", label="tokens"),
        Line2D([], [], color="#222222", linestyle=":", label="documents"),
    ]
    names = [Line2D([], [], color=COLOURS[i], linewidth=4, label=name) for i, name in enumerate(rows_by_source)]
    if len(names) <= 3:
        axes.legend(handles=[*keys, *names] if len(names) > 1 else keys, fontsize=8.5, frameon=False)
    else:  # so many names would lie on the lines
        figure.legend(handles=[*keys, *names], loc="outside lower left", ncols=2, fontsize=8.5, frameon=False)
        figure.set_figheight(figure.get_figheight() + 0.12 * (len(names) + 2))
    return save(figure, path)
