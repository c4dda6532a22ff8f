"""The parts of a report page (tables, panels, sections) and their HTML: no script, nothing from outside.

All text is escaped here and nowhere else; a Panel's `svg` is the only markup that a caller hands in.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from k2jax.report.style import CSS


@dataclass(frozen=True)
class Table:
    """Plain-text cells; the first of a row names it. `prose`: the last column is text, aligned as text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


@dataclass(frozen=True)
class Panel:
    """One figure: what to look for (title), the picture, how to read it (caption), and its numbers."""

    title: str
    caption: str
    svg: str | None = None  # None: the runs logged nothing for it, and the caption says so
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A heading with text, tables and panels; `preformatted` is untrusted text shown as it is."""

    key: str
    title: str
    text: str = ""
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    panels: Sequence[Panel] = ()
    preformatted: Sequence[tuple[str, str]] = ()


def render(title: str, legend: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page. `legend` holds (letter, label) of every run, in the order of their colours."""
    links = "".join(f'<a href="#{escape(s.key)}">{escape(s.title)}</a>' for s in sections)
    keys = "".join(
        f'<li><span class="chip" style="--run:var(--run-{i})">{escape(letter)}</span> {escape(label)}</li>'
        for i, (letter, label) in enumerate(legend)
    )
    body = "".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>"
        f'<header><h1>{escape(title)}</h1><nav aria-label="Sections">{links}</nav></header>'
        f'<ul class="legend" aria-label="Runs">{keys}</ul>'
        f"<main>{body}</main></body></html>\n"
    )


def write_page(text: str, output: Path) -> Path:
    """Write the page so that a reader sees the old file or the new one, never half of it."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        # a folder name that is not UTF-8 holds surrogates, which no encoding takes: shown as question marks
        partial.write_bytes(text.encode("utf-8", errors="replace"))
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def printable(text: str) -> str:
    """Text with control characters made visible, so that a terminal escape or a NUL cannot hide anything."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text.replace("\r\n", "\n"))


def _section(section: Section) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
    parts = [
        f'<section id="{escape(section.key)}"><h2>{escape(section.title)}</h2>',
        f"<p>{escape(section.text)}</p>" if section.text else "",
        f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else "",
        *(_table(table) for table in section.tables),
    ]
    if section.panels:
        parts += ['<div class="panels">', *(_panel(panel) for panel in section.panels), "</div>"]
    parts += [_folded(table, table.caption) for table in section.folded]
    for name, text in section.preformatted:
        parts.append(f'<h3>{escape(name)}</h3><pre tabindex="0">{escape(printable(text))}</pre>')
    return "".join(parts) + "</section>\n"


def _panel(panel: Panel) -> str:
    picture = panel.svg or '<p class="none">Nothing to draw.</p>'
    numbers = _folded(panel.table, "Numbers") if panel.table and panel.table.rows else ""
    return (
        f"<figure><h3>{escape(panel.title)}</h3>{picture}"
        f"<figcaption>{escape(panel.caption)}</figcaption>{numbers}</figure>"
    )


def _folded(table: Table, summary: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{_table(table)}</details>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f"<table{' class=prose' if table.prose else ''}>"
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
