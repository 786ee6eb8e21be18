"""Which task is exported: the one asked for, the adapters' own, or the one whose model has the adapters' modules.

A base records what it was trained for, and its adapters another task more often than not: an adapter that classifies
on a base that fills masks. An adapter's task type tells it, the model class that PEFT records tells it, and so do the
names in its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_export.adapters.folder import AdapterFolder
from lora_export.adapters.peft_writer import PREFIX
from lora_export.base.checkpoint import Checkpoint
from lora_export.base.conversion import renamed_paths
from lora_export.base.decoder import language_model_of
from lora_export.base.tasks import Task, is_multimodal, resolve_task, tasks_of
from lora_export.base.weightless import build_weightless
from lora_export.errors import InputRefused, some_of


@dataclass(frozen=True)
class Choice:
    """A task, its weightless model in float32 where there are adapters, and what to say of the choice."""

    task: Task
    model: torch.nn.Module | None
    remarks: tuple[str, ...] = ()


def choose_task(requested: str | None, checkpoint: Checkpoint, folders: Sequence[AdapterFolder]) -> Choice:
    """The task to export.

    Raises:
        InputRefused: The adapters are of different tasks, no task follows, or the adapters' names fit other tasks.
    """
    types = {folder.name: folder.config.get("task_type") for folder in folders}
    is_told = requested is not None or any(types.values())
    classes = {folder.name: _trained_class(folder) for folder in folders}
    try:
        task = resolve_task(requested, checkpoint.config, types, where=str(checkpoint.path), trained_classes=classes)
    except InputRefused:
        is_whole = any(map(is_multimodal, checkpoint.config.get("architectures") or []))
        fitting = [] if is_told or is_whole or not folders else _fitting(checkpoint, folders)
        if len(fitting) != 1:
            raise
        return fitting[0]
    if not folders:
        return Choice(task, None)
    model = _model_of(task, checkpoint)
    strange = _strange_names(model, folders)
    fitting = _fitting(checkpoint, folders, but=task) if strange else []
    if not fitting:  # what does not fit is told where the adapter is read
        return Choice(task, model, _of_language_model_alone(model, folders))
    if len(fitting) == 1 and not is_told:
        return fitting[0]
    raise InputRefused(
        f"The adapter has modules that the base's model for {task} does not have",
        where=", ".join(str(folder.path) for folder in folders),
        found=some_of(strange, 3),
        next_step="name its task: " + " or ".join(f"--task {choice.task}" for choice in fitting),
    )


def _of_language_model_alone(model: torch.nn.Module, folders: Sequence[AdapterFolder]) -> tuple[str, ...]:
    """What to say of a multimodal base, whose graph takes text alone.

    Raises:
        InputRefused: An adapter changes other parts of it than its language model and its head.
    """
    path = language_model_of(model) if is_multimodal(type(model).__name__) else None
    if path is None:
        return ()
    beside = {name for name, _ in model.named_children()} - {path.partition(".")[0], "lm_head"}
    beside |= {f"model.{name}" for name, _ in getattr(model, "model", model).named_children()} - {path}
    for folder in folders:
        names = sorted(key.removeprefix(PREFIX) for key in folder.shapes)
        if touched := [name for name in names if name.startswith(tuple(f"{part}." for part in beside))]:
            raise InputRefused(
                "The adapter changes parts of a multimodal base that its language model alone does not run",
                where=f"{folder.path}: {some_of(touched, 3)}",
                expected=f"modules in {path}",
                found=f"model_type {model.config.model_type}",
                next_step="serve it with Transformers and PEFT; images and sounds are not exported",
            )
    return (f"the base is multimodal: its language model alone ({path}) is exported, which takes text",)


def _trained_class(folder: AdapterFolder) -> str | None:
    """The model class that PEFT records where the adapter has no task type."""
    mapping = folder.config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name if isinstance(name, str) else None


def _fitting(checkpoint: Checkpoint, folders: Sequence[AdapterFolder], but: Task | None = None) -> list[Choice]:
    """The tasks of the base's model type whose models have all modules that the adapters name."""
    found = []
    for task in tasks_of(checkpoint.config.get("model_type")):
        if task is but:
            continue
        try:
            model = _model_of(task, checkpoint)
        except InputRefused:  # a task that this base cannot do
            continue
        if not _strange_names(model, folders):
            said = f"exporting {task}: it is the task whose model has the adapter's modules (--task names another)"
            found.append(Choice(task, model, (said,)))
    return found


def _model_of(task: Task, checkpoint: Checkpoint) -> torch.nn.Module:
    most = checkpoint.most_parameters
    return build_weightless(task, checkpoint.load_config(), "float32", most_parameters=most)


def _strange_names(model: torch.nn.Module, folders: Sequence[AdapterFolder]) -> list[str]:
    """The names in the adapters' files that begin with no part of `model`, today or in Transformers 4.

    A body alone and the same body under a head differ by a prefix only (`encoder.…`, `bert.encoder.…`): they are not
    the same task, although a checkpoint of one can be loaded as the other.
    """
    paths = {key.removeprefix(PREFIX).partition(".lora_")[0] for f in folders for key in f.shapes if _is_named(key)}
    parts = {name for name, _ in model.named_children()}
    strange = {path for path in paths if path.partition(".")[0] not in parts}
    prefix = f"{model.base_model_prefix}."
    renamed = renamed_paths(model, strange).items()
    return sorted(strange - {old for old, new in renamed if new.removeprefix(prefix) != old.removeprefix(prefix)})


def _is_named(key: str) -> bool:
    return key.startswith(PREFIX) and "." in key.removeprefix(PREFIX)
