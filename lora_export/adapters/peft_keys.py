"""What becomes of each tensor of an adapter's file when PEFT loads it: its key in PEFT's layers, or none.

1. PEFT converts keys where Transformers converts the base's (experts that are one tensor now, each with a pair of its
   own in the file).
2. PEFT's own `save_pretrained` writes a saved embedding or head of a tied base three times: `lm_head.weight`, which is
   what it loads, `lm_head.modules_to_save.weight`, the same again, and `lm_head.original_module.weight`, the base's.
3. Anything else that no layer takes is left over, in silence. We refuse it.
"""

from __future__ import annotations

from collections.abc import Iterable

import safetensors
import torch

from lora_export.adapters.folder import WEIGHTS, AdapterFolder
from lora_export.compat import borrow
from lora_export.errors import InputRefused, some_of

_AGAIN, _OF_THE_BASE = ".modules_to_save.", ".original_module."


def require_all_placed(folder: AdapterFolder, model: torch.nn.Module, known: Iterable[str], *, next_step: str) -> None:
    """Refuse an adapter of whose file PEFT has left a tensor unloaded that says something.

    Args:
        model: PEFT's model, loaded from `folder`.
        known: The keys that its layers have, as `get_peft_model_state_dict` spells them, and those of the base's own
            tensors in the file.

    Raises:
        InputRefused: A tensor has no place, or is another than what it should be a copy of.
    """
    known = set(known)
    missing = {key for key in folder.shapes if key not in known}
    if not missing:
        return
    copies = {key: key.replace(_AGAIN, ".") for key in missing if _AGAIN in key}
    copies = {key: of for key, of in copies.items() if of in folder.shapes and of in known}
    _require_equal(folder, copies)
    missing -= copies.keys()
    missing -= {key for key in missing if key.replace(_OF_THE_BASE, ".") in known and _OF_THE_BASE in key}
    left = sorted(missing & _converted(folder, model, known)) if missing else []
    if left:
        raise InputRefused(
            "The adapter's file holds tensors that have no place on this base",
            where=str(folder.path),
            expected=f"{len(folder.shapes) - len(left)} of its {len(folder.shapes)} tensors have one",
            found=some_of(left, 6),
            next_step=next_step,
        )


def _converted(folder: AdapterFolder, model: torch.nn.Module, known: set[str]) -> set[str]:
    """The file's keys that are still there after PEFT's conversion; all of them if it makes what no layer has."""
    convert = borrow("convert_peft_adapter_state_dict_for_transformers")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in folder.shapes.items()}
    made = convert(model, model.peft_config["default"], tensors, "default").keys()
    strange = {key for key in made if key not in known and key not in folder.shapes}
    return set(folder.shapes) if strange else set(made)


def _require_equal(folder: AdapterFolder, copies: dict[str, str]) -> None:
    with safetensors.safe_open(folder.path / WEIGHTS, framework="pt") as file:
        for copy, of in copies.items():
            if not torch.equal(file.get_tensor(copy), file.get_tensor(of)):
                raise InputRefused(
                    "The adapter's file holds a saved module twice, with different numbers",
                    where=f"{folder.path}: {of}, {copy}",
                    next_step="load the adapter in PEFT and save it again; PEFT loads the first",
                )
