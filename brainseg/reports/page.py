"""Write reports as single-file HTML pages, and the tables in them."""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..io.files import MARK, atomic_write

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass
class Table:
    """A table to print or to show, with `note` below; columns in `left` are aligned left."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    left: tuple[int, ...] = (0,)

    def as_text(self) -> str:
        lines = [self.header] + self.rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [self.title]
        for line in lines:
            cells = []
            for k, (cell, width) in enumerate(zip(line, widths, strict=True)):
                cells.append(cell.ljust(width) if k in self.left else cell.rjust(width))
            text.append("  ".join(cells).rstrip())
        if self.note:
            text.append(self.note)
        return "\n".join(text)


def write_page(path: Path, template: str, title: str, details: dict, **content: object) -> None:
    """Fill a template and write the page, which needs no network; all text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import

    loader = FileSystemLoader(TEMPLATES)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.filters["base64"] = lambda content: base64.b64encode(content).decode()
    text = json.dumps(details, indent=2)
    page = pages.get_template(template).render(content, title=title, details=text, mark=MARK)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
