"""Whether a JSON value follows a schema: of JSON Schema, the words that this package's published schemas use.

`$ref` within the schema, `const`, `enum`, `type`, `minimum`, `pattern`, `required`, `properties`, `propertyNames`,
`additionalProperties`, `items`, `minItems`, `oneOf`. A test compares it with a full implementation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool,
    "null": type(None),
}  # fmt: skip


def violations(value: object, schema: Mapping, root: Mapping, *, path: str = "") -> Iterator[str]:
    """A sentence for each place where `value` does not follow `schema`.

    Args:
        root: The whole schema, for `$ref`.
        path: Where `value` stands, for the sentences.
    """
    if "$ref" in schema:
        yield from violations(value, _referred(schema["$ref"], root), root, path=path)
    here, shown = path or "the whole", repr(value)[:80]
    if "const" in schema and value != schema["const"]:
        yield f"{here} is {shown}, not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{here} is {shown}, not one of {', '.join(map(repr, schema['enum']))}"
    if "type" in schema and not _is_of(value, schema["type"]):
        yield f"{here} is {shown}, not of type {schema['type']}"
        return
    if isinstance(value, str) and "pattern" in schema and re.search(schema["pattern"], value) is None:
        yield f"{here} is {shown}, which does not match {schema['pattern']}"
    if isinstance(value, int | float) and "minimum" in schema and value < schema["minimum"]:
        yield f"{here} is {shown}, less than {schema['minimum']}"
    if isinstance(value, dict):
        yield from _of_object(value, schema, root, path=path)
    if isinstance(value, list) and len(value) < schema.get("minItems", 0):
        yield f"{here} is {shown}, of fewer than {schema['minItems']} items"
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from violations(item, schema["items"], root, path=f"{path}[{index}]")
    if "oneOf" in schema and sum(not any(violations(value, each, root)) for each in schema["oneOf"]) != 1:
        yield f"{here} is {shown}, not exactly one of what it may be"


def _of_object(value: dict, schema: Mapping, root: Mapping, *, path: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path or 'the whole'} has no {name!r}"
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name, entry in value.items():
        place = f"{path}.{name}" if path else name
        yield from violations(name, schema.get("propertyNames", {}), root, path=f"the name {place}")
        if name in known:
            yield from violations(entry, known[name], root, path=place)
        elif rest is False:
            yield f"{place} is not known"
        else:
            yield from violations(entry, rest, root, path=place)


def _referred(reference: str, root: Mapping) -> Mapping:
    found = root
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return found


def _is_of(value: object, kinds: str | list[str]) -> bool:
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return True
    return any(isinstance(value, _TYPES[kind]) for kind in kinds)
