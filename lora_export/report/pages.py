"""Pages from templates. A page asks for no other file, and runs no script but the one that its policy names."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined
from markupsafe import Markup

from lora_export.report import format as fmt
from lora_export.report import summary


def page(template: str, **values: object) -> str:
    """The page that a file of `templates/` makes of `values`, each of which it must be given."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Templates:
    templates = Templates(
        loader=PackageLoader("lora_export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {"marks": summary.MARKS, "missing": fmt.MISSING}
    return templates


def _printable(value: object) -> object:
    return fmt.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
