"""What PEFT says of tensors that do not fit the base, told plainly: whether the base or the rank is another."""

from __future__ import annotations

import re

from lora_export.adapters.folder import AdapterFolder
from lora_export.errors import InputRefused, some_of

_FACTOR = re.compile(r"lora_(?:embedding_)?([AB])\b")
_OF_ALL_EXPERTS = re.compile(r"\.experts\.(?:base_layer\.)*lora_")
# torch's words, one line a tensor.
_MISMATCH = re.compile(
    r"size mismatch for (?:base_model\.model\.)?(?P<name>\S+): copying a param with shape "
    r"torch\.Size\((?P<file>\[.*?\])\) from checkpoint, the shape in current model is torch\.Size\((?P<base>\[.*?\])\)"
)


def refuse_other_sizes(said: str, folder: AdapterFolder, next_step: str) -> None:
    """Refuse an adapter whose tensors have other sizes than PEFT made of its config and the base.

    Args:
        said: What PEFT raised; nothing is refused if it is about something else.

    Raises:
        InputRefused: The adapter was trained on a base of other sizes, or its ranks are not those of its config.
    """
    found = [(entry["name"], _sizes(entry["file"]), _sizes(entry["base"])) for entry in _MISMATCH.finditer(said)]
    # The pairs of a mixture's experts are one tensor, so their number counts too: neither a rank nor the base's size.
    found = [entry for entry in found if not _OF_ALL_EXPERTS.search(entry[0])]
    if not found:
        return
    first = next((entry for entry in found if _is_of_the_base(*entry)), found[0])
    name, in_file, in_base = first
    of_the_base = _is_of_the_base(*first)
    if name.endswith(".base_layer.weight") and in_file[1:] == in_base[1:]:
        raise InputRefused(
            "The adapter has a pair on a head that was resized with the vocabulary, which is not exported",
            where=f"{folder.path}: {name.replace('.default', '')}",
            expected=f"{in_base[0]} rows, as the base has",
            found=f"{in_file[0]} rows in the adapter's file",
            next_step="load the base and the adapter in PEFT, merge_and_unload, save, and export that as a base",
        )
    names = [entry[0].replace(".default", "") for entry in (first, *(entry for entry in found if entry is not first))]
    raise InputRefused(
        "The adapter was trained on a base of other sizes"
        if of_the_base
        else "The adapter's tensors do not have the ranks that its config says",
        where=f"{folder.path}: {some_of(names, 1)}",
        expected=f"{in_base}, as the {'base' if of_the_base else 'config'} says",
        found=f"{in_file} in the adapter's file",
        next_step=next_step if of_the_base else "fetch or save the adapter again: its two files are of two trainings",
    )


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.strip("[]").split(",") if size.strip()]


def _is_of_the_base(name: str, in_file: list[int], in_base: list[int]) -> bool:
    """Whether a size differs that the base decides: any but the rank, which is the first of A and the second of B."""
    factor = _FACTOR.search(name)
    rank_axis = {"A": 0, "B": 1}[factor[1]] if factor else None
    axes = [axis for axis, (a, b) in enumerate(zip(in_file, in_base, strict=False)) if a != b]
    return len(in_file) != len(in_base) or any(axis != rank_axis for axis in axes)
