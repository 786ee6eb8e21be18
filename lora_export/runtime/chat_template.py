"""A tokenizer's chat template: messages as the text of a prompt. Needs jinja2.

The template comes from a checkpoint, so it runs in Jinja's sandbox. What it finds there is what Transformers'
`apply_chat_template` gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError, UsageProblem, told
from lora_export.runtime.template_limits import (
    TooMuch,
    bounded,
    few_lines,
    require_product,
    require_short,
    require_small,
)

Messages = Sequence[Mapping[str, object]]
_TEMPLATE_FILE = "chat_template.jinja"
# Before it, the sandbox has known ways out.
_FIRST_SAFE_JINJA = (3, 1, 6)


def read_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The chat template of the tokenizer in `folder`, if it has one; `config` is its `tokenizer_config.json`."""
    path = folder / _TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputRefused("The chat template is not UTF-8 text", where=str(path), found=str(error)) from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = {str(entry.get("name")): entry.get("template") for entry in named}
    found = found.get("default") if isinstance(found, dict) else found
    if not isinstance(found, str | None):
        raise InputRefused(
            "The chat template is no text", where=f"{folder}: tokenizer_config.json", found=repr(found)[:80]
        )
    return found


def render(
    template: str, messages: Messages, special_tokens: Mapping[str, str], *, where: str, options: Mapping[str, object]
) -> str:
    """`messages` as a prompt that the assistant answers.

    Args:
        special_tokens: By their names, such as `bos_token`.
        where: The template's place, for a message.
        options: Further variables of the template, such as `tools`.

    Raises:
        UsageProblem: The template refuses these messages.
        InputRefused: The template is no Jinja template, does what the sandbox forbids, or more than it may.
        EnvironmentUnusable: jinja2 is not installed, or is too old.
    """
    jinja2 = _jinja()
    try:
        # A template from elsewhere sees plain values only.
        plain = json.loads(json.dumps([_without_nothing(message) for message in messages]))
        given = {"messages": plain, "tools": None, "documents": None, "add_generation_prompt": True}
        compiled = _environment(jinja2).from_string(template)
        with few_lines():
            return compiled.render(**special_tokens, **given | dict(options))
    except (jinja2.exceptions.SecurityError, jinja2.exceptions.TemplateSyntaxError, TooMuch, RecursionError) as error:
        raise InputRefused("The chat template cannot be used", where=where, found=str(error)[:400]) from error
    except (LoraExportError, MemoryError):
        raise
    except Exception as error:  # a template is a program: it can raise whatever Python does
        found = str(error) if isinstance(error, jinja2.exceptions.TemplateError) else told(error)
        raise UsageProblem("The chat template refuses these messages", where=where, found=found[:400]) from error


def _without_nothing(message: Mapping[str, object]) -> dict[str, object]:
    """Without keys that are None, which templates would print."""
    return {key: value for key, value in message.items() if value is not None}


def _jinja():
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise EnvironmentUnusable(
            "A chat template needs jinja2", next_step="pip install 'jinja2>=3.1.6', or give token ids"
        ) from error
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < _FIRST_SAFE_JINJA:
        raise EnvironmentUnusable(
            "This jinja2's sandbox has known ways out",
            expected="3.1.6 or newer",
            found=jinja2.__version__,
            next_step="pip install 'jinja2>=3.1.6'",
        )
    return jinja2


def _environment(jinja2):
    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here they are words."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context, operator, *sides):
            require_product(operator, *sides)
            return super().call_binop(context, operator, *sides)

        def call(self, context, function, *args, **kwargs):
            if isinstance(getattr(function, "__self__", None), str):
                require_small(*args, *kwargs.values())
            return super().call(context, function, *args, **kwargs)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.filters = {name: bounded(function) for name, function in environment.filters.items()}
    del environment.globals["lipsum"]  # texts as long as it is asked for
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= {"dict": lambda *args, **kwargs: dict(*args, **kwargs), "namespace": _namespace(jinja2)}
    return environment


def _namespace(jinja2):
    """Jinja's namespace, without names that lead to Python's own."""

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs) -> None:
            self, given = args[0], dict(*args[1:], **kwargs)
            for name in given:
                refuse_private(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: object) -> None:
            refuse_private(name)
            require_short(value)
            super().__setitem__(name, value)

    def refuse_private(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")

    return Namespace
