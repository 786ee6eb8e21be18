"""Which stored tensors make each parameter of a model: one under another name, or several by a conversion.

Transformers keeps some parameters in another layout than their checkpoints do: the experts of a layer merged into one
tensor, projections packed or split. Names and conversions are Transformers' own (`core_model_loading`,
`conversion_mapping`); ours is that a parameter is converted when it is read, from its own tensors only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from lora_export.base.stored import SafetensorsFiles
from lora_export.compat import borrow
from lora_export.errors import InputRefused, some_of


@dataclass(frozen=True, eq=False)
class Converted:
    """A parameter that Transformers makes of stored tensors when it loads a checkpoint.

    Attributes:
        path: The parameter's path in the model.
        shape: What the conversion makes of the stored shapes.
        sources: The stored tensors by the converter's pattern that each matches, in the order of the conversion.
    """

    path: str
    shape: tuple[int, ...]
    sources: Mapping[str, tuple[str, ...]]
    _conversion: _Conversion = field(repr=False)

    def read(self, files: SafetensorsFiles) -> torch.Tensor:
        """The parameter in the dtype it is stored in; its tensors are read now and dropped afterwards."""
        return self._conversion.run(files.read)[self.path]


@dataclass
class _Conversion:
    """A `WeightConverter`, the tensors it takes, and the first parameter it makes, which it is known by."""

    converter: object
    first_path: str
    model: torch.nn.Module
    sources: dict[str, list[str]] = field(default_factory=dict)

    def run(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters it makes, by path; usually one."""
        converter = copy.deepcopy(self.converter)  # it collects its tensors in itself
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.first_path, name, pattern, read(name))
        made = converter.convert(self.first_path, model=self.model, config=self.model.config)
        return {path: tensor[0] if isinstance(tensor, list) else tensor for path, tensor in made.items()}


def stored_parameters(model: torch.nn.Module, files: SafetensorsFiles) -> Iterator[tuple[str, str | Converted]]:
    """Every parameter and persistent buffer of `model` that `files` hold: its path, and the stored name or conversion.

    Follows `convert_and_load_state_dict_in_model`: the same order, renamings, and fall-back to the stored name.

    Raises:
        InputRefused: Stored tensors do not convert, or a parameter is stored both whole and in parts.
    """
    rename_source_key, dot_natural_key = borrow("rename_source_key"), borrow("dot_natural_key")
    converter_class, renaming_class = borrow("WeightConverter"), borrow("WeightRenaming")
    state = model.state_dict(keep_vars=True)
    mapping = borrow("get_model_conversion_mapping")(model)
    renamings = [entry for entry in mapping if isinstance(entry, renaming_class)]
    converters = [entry for entry in mapping if isinstance(entry, converter_class)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    whole: dict[str, str] = {}
    conversions: dict[str, _Conversion] = {}
    for stored in sorted(files.tensors, key=dot_natural_key):
        path, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if path not in state and stored in state:
            path, pattern = rename_source_key(stored, [], [], model.base_model_prefix, state)
        if path not in state:
            continue
        if pattern is None:
            whole.setdefault(path, stored)
        else:
            conversion = conversions.setdefault(path, _Conversion(by_pattern[pattern], path, model))
            conversion.sources.setdefault(pattern, []).append(stored)
    yield from whole.items()
    for conversion in conversions.values():
        for converted in _converted(conversion, files):
            if converted.path in whole:
                _refuse_twice(converted, whole[converted.path], files)
            if converted.path in state:
                yield converted.path, converted


def renamed_paths(model: torch.nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """What Transformers calls the module of each of `modules` now, as it would find their weights in a checkpoint.

    Only those that have another name and are stored whole: experts that became one tensor are PEFT's to convert.

    Args:
        modules: Paths of modules as a checkpoint of `model` may have them.
    """
    rename_source_key = borrow("rename_source_key")
    mapping = borrow("get_model_conversion_mapping")(model)
    renamings = [entry for entry in mapping if isinstance(entry, borrow("WeightRenaming"))]
    converters = [entry for entry in mapping if isinstance(entry, borrow("WeightConverter"))]
    state = model.state_dict(keep_vars=True)
    found = {}
    for module in modules:
        path, pattern = rename_source_key(f"{module}.weight", renamings, converters, model.base_model_prefix, state)
        if pattern is None and path in state and path != f"{module}.weight":
            found[module] = path.removesuffix(".weight")
    return found


def _converted(conversion: _Conversion, files: SafetensorsFiles) -> Iterator[Converted]:
    """What `conversion` makes, found by running it on the stored shapes alone."""

    def shape_only(name: str) -> torch.Tensor:
        return torch.empty(files.tensors[name].shape, device="meta")

    names = [name for group in conversion.sources.values() for name in group]
    try:
        made = conversion.run(shape_only)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputRefused(
            "Transformers cannot convert these tensors of the base into the parameter they are for",
            where=f"{files.tensors[names[0]].file}: {some_of(names, 3)} → {conversion.first_path}",
            found=" ".join(str(error).split())[:300],
            next_step="fetch the checkpoint again; a tensor of it may be missing",
        ) from error
    sources = {pattern: tuple(group) for pattern, group in conversion.sources.items()}
    for path, tensor in made.items():
        yield Converted(path, tuple(tensor.shape), sources, conversion)


def _refuse_twice(converted: Converted, whole: str, files: SafetensorsFiles) -> None:
    names = [name for group in converted.sources.values() for name in group]
    raise InputRefused(
        "A parameter is stored twice, whole and in parts",
        where=f"{files.tensors[whole].file}: {converted.path}",
        found=f"{whole}, and {some_of(names, 3)}",
        next_step="load the base in Transformers, save it again, and export that",
    )
