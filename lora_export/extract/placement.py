"""How each difference is carried by a PEFT adapter, decided before any decomposition.

1. The weight of a Linear or Conv1D: a LoRA pair.
2. Its bias: `lora_bias`, a bias of B that is added to the base's.
3. An embedding: an embedding's LoRA pair, and a pair of its own for each module tied to it; whole where case 2 occurs,
   since PEFT has no `lora_bias` beside embedding pairs.
4. A classification head, and any module that the base lacks: whole (`modules_to_save`).
5. Anything else, such as a norm: the module that owns it, whole.

The user may leave the kinds of cases 2, 3 and 5 out; that is reported. What belongs to no module is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from lora_export.base.tasks import Task
from lora_export.errors import InputRefused, some_of
from lora_export.extract.differences import Checkpoints, Difference, DifferenceKind

LEAVABLE = (DifferenceKind.BIAS, DifferenceKind.EMBEDDING, DifferenceKind.OTHER)
_HEAD, _LACKED = "classification head", "the base lacks it"
# PEFT saves modules of these names whole with every adapter of these tasks, whether they differ or not.
_PEFT_HEADS = {
    Task.TEXT_CLASSIFICATION: ("classifier", "score"),
    Task.TOKEN_CLASSIFICATION: ("classifier", "score"),
    Task.QUESTION_ANSWERING: ("qa_outputs",),
}


@dataclass(frozen=True)
class PairPlan:
    """One LoRA pair.

    Attributes:
        shape: Of the weight, as stored.
        transposed: Whether `B·A` is the transpose of the weight's difference.
        weight: Path of the weight whose difference it is; None for a pair of zeros: its bias alone differs, or nothing
            but whole modules does, and PEFT loads no adapter without a pair.
    """

    module: str
    shape: tuple[int, int]
    is_embedding: bool
    transposed: bool
    weight: str | None


@dataclass(frozen=True)
class Placement:
    """The adapter's modules.

    Attributes:
        wholes: Module → why it is saved whole.
        has_bias: Whether every pair carries a bias (`lora_bias`).
        left_out: What differs and stays the base's, as the user asked.
    """

    pairs: tuple[PairPlan, ...]
    wholes: dict[str, str]
    has_bias: bool
    left_out: tuple[Difference, ...]


def place(checkpoints: Checkpoints, differences: Iterable[Difference], leave_out: Collection[str]) -> Placement:
    """Decide what carries each difference.

    Raises:
        InputRefused: Nothing differs, or a parameter of the model itself does, which is no module's.
    """
    differences = list(differences)
    if not differences:
        raise InputRefused(
            "The fine-tune is the base: no tensor differs",
            where=f"{checkpoints.base.path} and {checkpoints.tuned.path}",
            next_step="name the base first and the fine-tune second; check that the training changed anything",
        )
    # What the base lacks cannot be left out: there would be nothing in its place.
    left_out = tuple(d for d in differences if d.in_base and not d.is_head and d.kind in leave_out)
    carried = [d for d in differences if d not in left_out]
    if not carried:
        raise InputRefused(
            "Nothing that differs is left to extract",
            where=str(checkpoints.tuned.path),
            found=some_of([d.path for d in left_out], 6),
            next_step="leave out less",
        )
    has_bias = any(d.kind is DifferenceKind.BIAS and d.in_base and not d.is_head for d in carried)
    wholes: dict[str, str] = {}
    for name in _PEFT_HEADS.get(checkpoints.task, ()):
        if any(child == name for child, _ in checkpoints.model.named_children()):
            wholes[name] = _HEAD
    for d in carried:
        if d.is_head:
            wholes[d.path.split(".")[0]] = _HEAD
        elif not d.in_base:
            wholes[_owner(d)] = _LACKED
        elif d.kind is DifferenceKind.EMBEDDING and has_bias:
            wholes[d.module] = "PEFT has no lora_bias beside embedding pairs"
        elif d.kind is DifferenceKind.OTHER:
            wholes[_owner(d)] = f"no pair for {type(checkpoints.model.get_submodule(d.module)).__name__}"
        elif d.kind is DifferenceKind.LINEAR and has_bias and _is_tied_embedding(checkpoints, d):
            wholes[d.module] = "tied to an embedding that is saved whole"
    wholes = _as_peft_matches(checkpoints, wholes)
    pairs = _pairs(checkpoints, [d for d in carried if not _inside(d.module, wholes)]) or [
        _pair_of_zeros(checkpoints, wholes)
    ]
    return Placement(tuple(pairs), wholes, has_bias, left_out)


def kinds_only_merged(checkpoints: Checkpoints, placement: Placement) -> list[DifferenceKind]:
    """The kinds to leave out so that every module saved whole is Linear, which is all that a dynamic graph can replace.

    Modules that the base lacks are not counted: they cannot be left out.
    """
    found = set()
    for whole, why in placement.wholes.items():
        for module in checkpoints.model.get_submodule(whole).modules():
            if isinstance(module, torch.nn.Linear) or why in (_HEAD, _LACKED):
                continue
            if any(True for _ in module.parameters(recurse=False)):
                found.add(DifferenceKind.EMBEDDING if isinstance(module, torch.nn.Embedding) else DifferenceKind.OTHER)
    return sorted(found)


def _owner(difference: Difference) -> str:
    if not difference.module:
        raise InputRefused(
            "A parameter of the model itself differs; PEFT saves modules",
            where=difference.path,
            next_step="leave it out with --leave-out others, or export the fine-tune as a base of its own",
        )
    return difference.module


def _is_tied_embedding(checkpoints: Checkpoints, difference: Difference) -> bool:
    owners = (alias.rpartition(".")[0] for alias in checkpoints.aliases.get(difference.path, ()))
    return any(isinstance(checkpoints.model.get_submodule(owner), torch.nn.Embedding) for owner in owners)


def _as_peft_matches(checkpoints: Checkpoints, wholes: dict[str, str]) -> dict[str, str]:
    """`wholes` with what PEFT's matching (`endswith`) takes beside them, without what lies inside another."""
    matched = dict(wholes)
    names = (*wholes, *_PEFT_HEADS.get(checkpoints.task, ()))
    for path, _ in checkpoints.model.named_modules(remove_duplicate=False):
        if path not in matched and any(path.endswith(name) for name in names):
            matched[path] = "PEFT saves it with a module whose name ends alike"
    return {path: why for path, why in matched.items() if not _inside(path.rpartition(".")[0], matched)}


def _inside(module: str, wholes: Iterable[str]) -> bool:
    return any(module == whole or module.startswith(f"{whole}.") for whole in wholes)


def _pairs(checkpoints: Checkpoints, differences: list[Difference]) -> list[PairPlan]:
    by_module: dict[str, PairPlan] = {}
    for d in differences:
        if d.kind is DifferenceKind.BIAS:
            shape = tuple(checkpoints.model.get_parameter(f"{d.module}.weight").shape)
            by_module.setdefault(d.module, PairPlan(d.module, shape, False, d.transposed, None))
        else:
            by_module[d.module] = PairPlan(d.module, d.shape, d.kind is DifferenceKind.EMBEDDING, d.transposed, d.path)
    return list(by_module.values())


def _pair_of_zeros(checkpoints: Checkpoints, wholes: dict[str, str]) -> PairPlan:
    for path, module in checkpoints.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not _inside(path, wholes):
            return PairPlan(path, tuple(module.weight.shape), False, False, None)
    raise InputRefused(
        "Only modules that are saved whole differ, and PEFT loads no adapter without a LoRA pair",
        where=", ".join(wholes),
        next_step="export the fine-tune as a base of its own",
    )
