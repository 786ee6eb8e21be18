"""README and the pages of docs/ fit together: links lead somewhere, README names every page, messages are the code's."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from lora_export.bench.plan import BenchOptions
from lora_export.check.context import CheckOptions
from lora_export.contract import ADAPTER_INPUT_KINDS, AdapterInputKind
from lora_export.export.plan import Request
from lora_export.extract.run import ExtractRequest
from lora_export.fleet.options import FleetOptions
from lora_export.pipeline import AddOptions, ExportOptions

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
# What a reader takes in before he tries the tool.
MOST_LINES_OF_README = 150
MOST_BYTES_OF_AN_IMAGE = 200_000

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?:\]\(|(?:href|src|srcset)=\")([^)\"\s]+)")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub and GitLab make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> list[tuple[Path, str]]:
    return [(page, link) for page in PAGES for link in _LINK.findall(_FENCED.sub("", read(page)))]


@pytest.mark.parametrize(
    ("page", "link"),
    [pytest.param(page, link, id=f"{page.name}-{link}") for page, link in links() if "://" not in link],
)
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    assert target.is_relative_to(ROOT)
    assert not anchor or anchor in anchors_of(target)


def test_readme_is_short():
    assert len(read(README).splitlines()) <= MOST_LINES_OF_README


def test_readme_names_every_page():
    named = {(ROOT / link.partition("#")[0]).resolve() for page, link in links() if page == README}
    assert set(PAGES) - {README} <= named


def test_every_image_is_shown_and_small():
    shown = {(page.parent / link).resolve() for page, link in links() if link.endswith(".png")}
    images = set((ROOT / "docs/images").iterdir())
    assert shown == images
    assert all(image.stat().st_size < MOST_BYTES_OF_AN_IMAGE for image in images)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit_an_editor(page):
    """But for tables, links and output, which have lines of their own."""
    prose = [
        line for line in _FENCED.sub("", read(page)).splitlines() if not line.lstrip().startswith(("|", "    ", "<"))
    ]
    assert [line for line in prose if len(line) > 130 and "](" not in line] == []


@cache
def texts_of_the_package() -> str:
    """Every text in the package's code, one a line."""
    found = []
    for path in sorted((ROOT / "lora_export").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


def messages() -> list[str]:
    return re.findall(r"^\| \*\*(.+?)\*\* \|", read(ROOT / "docs/errors.md"), re.MULTILINE)


def test_there_are_messages():
    assert len(messages()) > 20


@pytest.mark.parametrize("message", messages())
def test_a_message_is_the_code_s_own(message):
    """Where the code puts a name in, the page has three dots, or says "base"."""
    parts = (
        message.replace("The base is", "The …is").replace("export's base", "export's …").replace("This base", "This …")
    )
    for part in filter(None, map(str.strip, parts.split("…"))):
        assert part in texts_of_the_package()


@pytest.mark.parametrize("spec", ADAPTER_INPUT_KINDS, ids=lambda spec: spec.kind)
def test_the_contract_s_page_has_every_kind_of_adapter_input(spec):
    name = spec.name("" if spec.kind is AdapterInputKind.GATE else "<module>")
    dims = ", ".join(map(str, spec.dims))
    assert f"| `{name}` | `[{dims}]` |" in read(ROOT / "docs/contract.md")


def test_the_contract_s_page_has_every_field_of_the_manifest():
    schema = json.loads((ROOT / "lora_export/schema/manifest-1.schema.json").read_text(encoding="utf-8"))
    parts = [schema, *schema["$defs"].values()]
    named = {name for part in parts for name in part.get("properties", {})}
    assert {name for name in named if f"`{name}`" not in read(ROOT / "docs/contract.md")} == set()


@pytest.mark.parametrize("options", [Request, ExportOptions, AddOptions, CheckOptions, BenchOptions, FleetOptions])
def test_the_api_s_page_has_every_option(options):
    assert {each.name for each in fields(options) if f"`{each.name}`" not in read(ROOT / "docs/python-api.md")} == set()


def test_the_api_s_page_has_every_option_of_extract():
    """In its example or beside it."""
    own = {each.name for each in fields(ExtractRequest)} - {"base", "tuned", "choice"}
    assert {name for name in own if not re.search(rf"\b{name}\b", read(ROOT / "docs/python-api.md"))} == set()
