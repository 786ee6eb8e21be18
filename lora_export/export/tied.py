"""Parameters that are one tensor in several places, where adapters change them in some of these only."""

from __future__ import annotations

from lora_export.adapters.factors import Adapter
from lora_export.errors import InputRefused
from lora_export.export.resolve import Resolved


def refuse_changed_embedding(resolved: Resolved) -> None:
    """Several embeddings of an encoder-decoder are the one table, and PEFT changes it in one of them only.

    A head tied to a single embedding is no such case: Whisper's goes with its decoder, as in a decoder alone.
    """
    aliases, tables = resolved.parameters.aliases, resolved.parameters.embeddings
    for adapter in resolved.adapters:
        changed = [path for path in adapter.replaced if path.removesuffix(".weight") not in adapter.replaced_modules]
        changed += [*adapter.token_rows, *(f"{module}.weight" for module in adapter.embeddings)]
        shared = [path for path in changed if sum(alias in tables for alias in aliases.get(path, ())) > 1]
        if shared:
            raise InputRefused(
                f"Adapter {adapter.name!r} changes an embedding that others of an encoder-decoder share",
                where=", ".join(shared),
                next_step="merge it in PEFT, save the model untied, and export that as a base without adapters",
            )


def untied_modules(resolved: Resolved) -> dict[str, str]:
    """Modules to split off a tied weight, as merged adapters change its uses differently → the path under which the
    rest keeps the shared tensor.

    1. An embedding and the heads tied to it: the heads are split off.
    2. Linear modules tied to each other: those that change are.
    """
    found: dict[str, str] = {}
    for group in {id(paths): paths for paths in resolved.parameters.aliases.values() if len(paths) > 1}.values():
        changes = {path: [_signature(adapter, path) for adapter, _ in resolved.parameters.adapters] for path in group}
        tables = [path for path in group if path in resolved.parameters.embeddings]
        unchanged = [path for path in group if not any(map(any, changes[path]))]
        keeper = next(iter(tables or unchanged or group))
        if any(changes[path] != changes[keeper] for path in tables):
            raise InputRefused(
                "An adapter changes one of several embeddings that share a weight",
                where=", ".join(tables),
                next_step="merge it in PEFT, save the model untied, and export that as a base without adapters",
            )
        split = [path for path in group if path not in tables and changes[path] != changes[keeper]]
        found |= {path.removesuffix(".weight"): keeper for path in split}
    return found


def _signature(adapter: Adapter, path: str) -> tuple[int, ...]:
    """What an adapter does to a parameter, comparable between tied paths: identities of its values, () for nothing."""
    module = path.removesuffix(".weight")
    values = (adapter.replaced.get(path), adapter.pairs.get(module))
    values += (adapter.token_rows.get(path), adapter.layers.get(module))
    return tuple(id(value) for value in values) if any(value is not None for value in values) else ()
