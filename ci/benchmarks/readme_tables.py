"""Tables in the pages of docs/ that benchmarks write from their results."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def table_in_readme(name: str) -> str:
    """The table as its page has it, between its markers."""
    return _page_of(name).read_text(encoding="utf-8").split(_start_of(name))[1].split(_end_of(name))[0]


def write_into_readme(name: str, table: str) -> None:
    """Put `table` in its page's place for it."""
    page = _page_of(name)
    before, rest = page.read_text(encoding="utf-8").split(_start_of(name))
    after = rest.split(_end_of(name))[1]
    page.write_text(f"{before}{_start_of(name)}{table}{_end_of(name)}{after}", encoding="utf-8")


def _page_of(name: str) -> Path:
    """The one page that holds the markers."""
    (page,) = (page for page in sorted(DOCS.glob("*.md")) if _start_of(name) in page.read_text(encoding="utf-8"))
    return page


def _start_of(name: str) -> str:
    return f"<!-- {name} table: written by ci/benchmarks/{name}.py, held by a test -->\n"


def _end_of(name: str) -> str:
    return f"<!-- end of {name} table -->"
