"""The model config that each adapter makes of its base's: its labels, and the vocabulary that its file has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from lora_export.adapters.folder import AdapterFolder
from lora_export.base.tasks import CLASSIFICATION, Task
from lora_export.base.weightless import vocabulary_tables
from lora_export.errors import InputRefused


def configs_for(config, task: Task, folders: Sequence[AdapterFolder], *, model) -> tuple:
    """For each adapter, the `config` of `model` with the number of labels and the vocabulary that its file has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return tuple(
        _config_for(config, task, folder, shapes=shapes, tables=vocabulary_tables(model)) for folder in folders
    )


def _config_for(
    config, task: Task, folder: AdapterFolder, *, shapes: Mapping[str, tuple[int, ...]], tables: Sequence[str]
):
    """`config`, changed where the adapter's file has another number of rows than the base's `shapes`."""
    labels = config.num_labels
    for key, shape in folder.shapes.items():
        path = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        expected = shapes.get(path)
        if not expected or shape[1:] != expected[1:] or shape[0] == expected[0]:
            continue
        if path in tables:
            config = copy.deepcopy(config)
            config.get_text_config().vocab_size = shape[0]
        elif task in CLASSIFICATION and expected[0] == config.num_labels:
            labels = shape[0]
    brings_head = task in CLASSIFICATION and bool(folder.config.get("modules_to_save"))
    return _with_labels(config, folder.labels, labels) if brings_head else config


def _with_labels(config, labels: dict[int, str] | None, n_labels: int):
    """A copy of `config` for `n_labels` classes, named by `labels` where they fit, else `LABEL_i`."""
    config = copy.deepcopy(config)
    if labels is not None and sorted(labels) == list(range(n_labels)):
        config.id2label, config.label2id = dict(labels), {name: index for index, name in labels.items()}
    elif n_labels != config.num_labels:
        config.num_labels = n_labels
    return config


def remarks_on_labels(folders: Sequence[AdapterFolder], configs: Sequence, task: Task) -> tuple[str, ...]:
    """A word on each adapter that brings a head of several classes whose names nothing tells.

    Args:
        configs: From `configs_for`; empty where there is no model to tell the classes of.
    """
    if task not in CLASSIFICATION:
        return ()
    unnamed = [
        folder.name
        for folder, config in zip(folders, configs, strict=bool(configs))
        if folder.config.get("modules_to_save") and config.num_labels > 1 and _are_numbers(config.id2label)
    ]
    return tuple(
        f"{name!r} names no classes, so they are LABEL_0, LABEL_1 …: PEFT saves no names. "
        "model.config.save_pretrained(ADAPTER) beside the adapter does, before the export."
        for name in unnamed
    )


def _are_numbers(labels: Mapping[int, str] | None) -> bool:
    return labels is None or all(label == f"LABEL_{index}" for index, label in labels.items())


def merged_config(folders: Sequence[AdapterFolder], configs: Sequence):
    sizes = {folder.name: config.num_labels for folder, config in zip(folders, configs, strict=True)}
    with_heads = [
        config for folder, config in zip(folders, configs, strict=True) if folder.config.get("modules_to_save")
    ]
    if len(with_heads) > 1:
        raise InputRefused(
            "Several adapters bring a module of their own (modules_to_save); a merged graph holds one",
            where=", ".join(f"{name} ({n} labels)" for name, n in sizes.items()),
            next_step="merge one of them, or serve all of them with `lora-export dynamic`",
        )
    return with_heads[0] if with_heads else configs[0]


def vocabulary_of(config) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)
