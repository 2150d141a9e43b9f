"""A study as one HTML page that needs no network: tables, figures, and where every run is."""

import html
from collections.abc import Sequence
from pathlib import Path

from vrpo.study.config import Cell
from vrpo.study.tables import Plain

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 14px } th, td { padding: .25rem .55rem; text-align: right; white-space: pre }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
thead th { border-bottom: 2px solid #999 } tbody tr { border-bottom: 1px solid #ddd }
.caption { color: #666; font-size: 13px; max-width: 60rem }
figure { margin: 1.5rem 0 } figure svg { max-width: 100%; height: auto } code { font-size: 13px }
"""


def write_page(
    path: Path, *, title: str, tables: Sequence[Plain], figures: Sequence[Path], cells: Sequence[Cell]
) -> None:
    """Write the page.

    Args:
        path: the HTML file; run folders are named relative to its folder.
        title: what the study is called.
        tables: in the order they are shown.
        figures: SVG files, whose content goes into the page.
        cells: the runs, listed at the end.
    """
    parts = [
        *map(table_html, tables),
        *(figure_html(figure.read_text(encoding="utf-8")) for figure in figures),
    ]
    runs = "".join(
        f'<li><a href="{cell.folder}/summary.json">{cell.folder}</a>: {html.escape(cell.method)}, '
        f"{html.escape(cell.noise)}, seed {cell.seed}</li>"
        for cell in cells
    )
    parts.append(f"<details><summary>{len(cells)} runs</summary><ul>{runs}</ul></details>")
    path.write_text(page_html(title, parts), encoding="utf-8")


def page_html(title: str, parts: Sequence[str], *, style: str = "") -> str:
    """A page that needs no network.

    Args:
        title: its heading.
        parts: HTML, in order.
        style: rules besides `STYLE`.
    """
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def table_html(table: Plain) -> str:
    head = "".join(f"<th>{html.escape(x)}</th>" for x in table.headings)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in row)}</tr>\n" for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
        f"<p class=caption>{html.escape(table.caption)}</p>"
    )


def figure_html(drawing: str) -> str:
    """An SVG file's content as part of a page."""
    return f"<figure>{drawing[drawing.index('<svg') :]}</figure>"
