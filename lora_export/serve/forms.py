"""A form with files, as browsers and OpenAI's client send it: `multipart/form-data` (RFC 7578, RFC 2046 section 5.1).

The body is in memory, and bounded, before it comes here. It is taken apart by its boundary alone, so that no bytes of
a file mean anything, and nothing is nested.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message

from lora_export.serve.problems import Problem

_MOST_PARTS = 32
_END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True)
class Form:
    """The fields of a form by name, and its files by the names of their fields; a name is there once."""

    fields: dict[str, str]
    files: dict[str, bytes]


def read_form(body: bytes, content_type: str) -> Form:
    """The form in `body`.

    Args:
        content_type: The header of that name.

    Raises:
        Problem: 415 where it is no form with files, 400 where it is damaged, or names a field twice.
    """
    kind, boundary = _parameter(content_type, "content-type", "boundary")
    if kind.lower() != "multipart/form-data" or not boundary:
        raise Problem(415, "The request is no multipart/form-data with a boundary", code="no_form")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise Problem(400, "The form is cut off", code="bad_form")
    if len(parts) - 2 > _MOST_PARTS:
        raise Problem(400, f"The form has over {_MOST_PARTS} parts", code="bad_form")
    form = Form({}, {})
    for part in parts[1:-1]:
        _add(form, part)
    return form


def _add(form: Form, part: bytes) -> None:
    _, line, rest = part.partition(b"\r\n")  # what follows a boundary in its line is padding
    head, end, content = (line + rest).partition(_END_OF_HEAD)
    header = next((h for h in head.decode("utf-8", "replace").split("\r\n") if _is_disposition(h)), "")
    value = header.partition(":")[2].strip()
    kind, name = _parameter(value, "content-disposition", "name")
    if not end or kind.lower() != "form-data" or not name:
        raise Problem(400, "A part of the form does not say what it is", code="bad_form")
    if name in form.fields or name in form.files:
        raise Problem(400, f"The form has the field {name[:80]!r} twice", param=name[:80], code="bad_form")
    if _parameter(value, "content-disposition", "filename")[1] is not None:
        form.files[name] = content
        return
    try:
        form.fields[name] = content.decode("utf-8")
    except UnicodeDecodeError:
        raise Problem(400, f"The field {name[:80]!r} is no UTF-8 text", param=name[:80], code="bad_value") from None


def _is_disposition(header: str) -> bool:
    return header.lower().startswith("content-disposition:")


def _parameter(value: str, header: str, name: str) -> tuple[str, str | None]:
    """What a header's value begins with, and its parameter `name`; None without it."""
    message = Message()
    message[header] = value.replace("\r", " ").replace("\n", " ")
    try:
        found = message.get_params(failobj=[("", "")], header=header)
    except (TypeError, ValueError, LookupError):  # of parameters in parts, some of which have no number
        return "", None
    by_name = {key.lower(): text if isinstance(text, str) else text[-1] for key, text in found[1:]}
    return found[0][0], by_name.get(name)
