"""Tables in README that benchmarks write from their results."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def table_in_readme(name: str) -> str:
    """The table as README has it, between its markers."""
    return README.read_text(encoding="utf-8").split(_start_of(name))[1].split(_end_of(name))[0]


def write_into_readme(name: str, table: str) -> None:
    """Put `table` in README's place for it."""
    before, rest = README.read_text(encoding="utf-8").split(_start_of(name))
    after = rest.split(_end_of(name))[1]
    README.write_text(f"{before}{_start_of(name)}{table}{_end_of(name)}{after}", encoding="utf-8")


def _start_of(name: str) -> str:
    return f"<!-- {name} table: written by ci/benchmarks/{name}.py, held by a test -->\n"


def _end_of(name: str) -> str:
    return f"<!-- end of {name} table -->"
