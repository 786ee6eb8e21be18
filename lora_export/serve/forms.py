"""A form with files, as browsers and OpenAI's client send it: `multipart/form-data`, read by Starlette's own parser."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lora_export.serve.problems import Problem

_MOST_FIELDS, _MOST_FILES = 32, 8


@dataclass(frozen=True)
class Form:
    """The fields of a form by name, and its files by the names of their fields; a name is there once."""

    fields: dict[str, str]
    files: dict[str, bytes]


async def read_form(request: Request) -> Form:
    """The form in the body of `request`, which the server has bounded: its files stay in memory.

    Raises:
        Problem: 415 where it is no form with files, 400 where it is damaged, or names a field twice.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Problem(415, "The request is no multipart/form-data", code="no_form")
    parser = MultiPartParser(request.headers, request.stream(), max_fields=_MOST_FIELDS, max_files=_MOST_FILES)
    parser.spool_max_size = sys.maxsize
    try:
        found = await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:  # those of Python's codecs, by the form's charset
        raise Problem(400, f"The form cannot be read: {getattr(error, 'message', error)}", code="bad_form") from None
    form = Form({}, {})
    for name, value in found.multi_items():
        if name in form.fields or name in form.files:
            raise Problem(400, f"The form has the field {name[:80]!r} twice", param=name[:80], code="bad_form")
        if isinstance(value, UploadFile):
            form.files[name] = await value.read()
        else:
            form.fields[name] = value
    return form
