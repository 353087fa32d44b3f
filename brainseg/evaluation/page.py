"""HTML reports: tables, one style, one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..io.files import atomic_write, check_writable


@dataclass
class Table:
    """A table to print or to show; `note` stands below it, a line a paragraph.

    Columns of numbers are set to the right, those that `left` names to the left.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    left: tuple[int, ...] = (0,)

    def as_text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.header))]
        text = [
            "  ".join(
                cell.ljust(w) if k in self.left else cell.rjust(w)
                for k, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *text] + [self.note] * bool(self.note))

    def as_html(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(line(cells, "td") for cells in self.rows)
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in self.note.splitlines())
        return (
            f"<h2>{html.escape(self.title)}</h2><div class=wide><table><thead>"
            f"{line(self.header, 'th')}</thead><tbody>{body}</tbody></table></div>{notes}"
        )


STYLE = """
:root { color-scheme: light dark; --text: #1d2733; --soft: #52606d; --page: #fff; --box: #f4f6f8;
        --line: #e3e8ee; --blue: #4c78a8; --red: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e9ef; --soft: #9fadbc; --page: #12171d; --box: #1b222a; --line: #2b3540;
          --blue: #7aa7d8; --red: #fb923c } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem;
       color: var(--text); background: var(--page) }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
.wide { overflow-x: auto } img { max-width: 100%; max-height: 90vh }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
thead th { border-bottom: 2px solid var(--blue); font-weight: 600 }
tbody tr + tr td { border-top: 1px solid var(--line) } p { color: var(--soft); max-width: 75ch }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box);
      padding: .8rem; border-radius: 4px }
"""


def write_page(path: Path, title: str, body: str, details: str, style: str = "") -> None:
    """Write one HTML page that needs no network; `body` is HTML, all else text.

    Raises OSError, naming `path`, if it cannot be written; what was there before stays.
    """
    title = html.escape(title)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}{style}</style>"
        f"<h1>{title}</h1><p>Research only: not a medical device.</p>{body}"
        f"<h2>How it was made</h2><pre>{html.escape(details)}</pre></html>\n"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def check_page(path: Path) -> None:
    """Raise OSError or ValueError, naming it, unless a page can be written at `path`."""
    check_writable(path.parent)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the page itself")


def data_url(content: bytes, kind: str) -> str:
    """Encode a picture as an address that the page can hold; `kind` is image/png, say."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
