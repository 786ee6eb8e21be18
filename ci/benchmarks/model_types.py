"""The table of model types in docs/supported.md: what the matrix's record says of each, by task.

python ci/benchmarks/model_types.py       # writes it; matrix.py does so too, when it records
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import transformers
from adapter_options import REFUSED
from architectures import Architecture

from lora_export.base.tasks import Task, auto_class, is_multimodal, task_of_class


def model_types(architectures: Mapping[str, Architecture]) -> dict[str, str]:
    """The model type of each architecture."""
    return {name: getattr(transformers, each.config).model_type for name, each in architectures.items()}


def task_of(architecture: Architecture) -> Task:
    """The task that an architecture is exported for."""
    if architecture.auto == "AutoModelForImageTextToText" or is_multimodal(architecture.auto):
        return Task.TEXT_GENERATION  # its language model
    auto_classes = {auto_class(task).__name__: task for task in Task}
    return auto_classes.get(architecture.auto) or task_of_class(architecture.auto)


def model_type_table(cells: Sequence, architectures: Mapping[str, Architecture]) -> str:
    """A line for each model type and task, by name; `cells` are the matrix's."""
    types = model_types(architectures)
    groups: dict[tuple[str, str], list] = {}
    for cell in cells:
        groups.setdefault((types[cell.architecture], str(task_of(architectures[cell.architecture]))), []).append(cell)
    lines = ["| model type | task | `merge` | `dynamic` | refused |", "|---|---|---:|---:|---|"]
    for (model_type, task), group in sorted(groups.items()):
        counts = [_count([cell for cell in group if cell.mode == mode]) for mode in ("merge", "dynamic")]
        lines.append(f"| `{model_type}` | {task} | {counts[0]} | {counts[1]} | {_refused(group, architectures)} |")
    served = {types[cell.architecture] for cell in cells if cell.found != REFUSED}
    lines.append(f"\n{len(set(types.values()))} model types, {len(served)} of them exported.")
    return "\n".join(lines) + "\n"


def _count(cells: Sequence) -> str:
    """How many of the options that were tried were exported; "–" for a base that is refused."""
    done = {cell.option for cell in cells if cell.found != REFUSED}
    return f"{len(done)} of {len({cell.option for cell in cells})}" if done else "–"


def _refused(cells: Sequence, architectures: Mapping[str, Architecture]) -> str:
    refused = [cell for cell in cells if cell.found == REFUSED]
    why = next((cell.message for cell in refused if architectures[cell.architecture].refused), None)
    if why is not None:
        return why
    parts = []
    for mode in ("merge", "dynamic"):
        options = dict.fromkeys(cell.option for cell in refused if cell.mode == mode)
        parts += [f"`{mode}`: {', '.join(options)}"] if options else []
    return "; ".join(parts)


if __name__ == "__main__":
    import matrix
    from readme_tables import write_into_readme

    write_into_readme("model_types", model_type_table(matrix.read_result(), matrix.ALL))
