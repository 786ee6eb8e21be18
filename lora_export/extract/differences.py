"""Which tensors of a full fine-tune differ from its base's, and what each of them is. Reads one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from lora_export.base.checkpoint import Checkpoint, checkpoint_names
from lora_export.base.tasks import HEADED, Task
from lora_export.base.weightless import build_weightless, is_conv1d, parameter_aliases
from lora_export.errors import InputRefused, some_of

# Configuration that changes no output: names and provenance, training, generation, what the checkpoint is stored in.
_WITHOUT_EFFECT = (
    "architectures", "id2label", "label2id", "num_labels", "_name_or_path", "name_or_path", "transformers_version",
    "dtype", "torch_dtype", "problem_type", "use_cache", "gradient_checkpointing", "finetuning_task",
    "initializer_range", "bos_token_id", "eos_token_id", "output_attentions", "output_hidden_states", "return_dict",
    "task_specific_params", "_attn_implementation", "tokenizer_class",
)  # fmt: skip


class DifferenceKind(StrEnum):
    """What a parameter is, seen from PEFT: what of it an adapter can carry depends on that alone."""

    LINEAR = "linear"  # the weight of nn.Linear or Conv1D
    BIAS = "biases"  # the bias of one of those
    EMBEDDING = "embeddings"
    OTHER = "others"  # norms, convolutions, parameters of a model's own modules


@dataclass(frozen=True)
class Difference:
    """A parameter that differs, or that only the fine-tune has.

    Attributes:
        path: Its path in the model, and that of its module (`model.norm.weight`, `model.norm`).
        in_base: Whether the base holds it in the same shape.
        is_head: Whether it belongs to a classification head.
        transposed: Whether an adapter's `B·A` is its delta's transpose: a Conv1D's, an embedding's.
    """

    path: str
    module: str
    kind: DifferenceKind
    shape: tuple[int, ...]
    in_base: bool
    is_head: bool
    transposed: bool


@dataclass(frozen=True)
class Checkpoints:
    """A base and its full fine-tune, opened on the fine-tune's model (weightless) of one task.

    Attributes:
        base_names, tuned_names: Model path → stored name, in either checkpoint.
        aliases: Model path → all paths of the same (tied) tensor.
    """

    task: Task
    base: Checkpoint
    tuned: Checkpoint
    config: object
    model: torch.nn.Module
    base_names: Mapping[str, str]
    tuned_names: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]

    def read_tuned(self, path: str) -> torch.Tensor:
        """The fine-tune's tensor as stored.

        Raises:
            InputRefused: Its checkpoint lacks it.
        """
        if (name := self._stored(self.tuned_names, path)) is not None:
            return self.tuned.files.read(name)
        raise InputRefused(
            "The fine-tune has no tensor for a parameter of its model",
            where=f"{self.tuned.path}: {path}",
            next_step="name the task it was trained for with --task",
        )

    def read_base(self, path: str) -> torch.Tensor | None:
        """The base's tensor as stored; None if it has none of this shape."""
        name = self._stored(self.base_names, path)
        return None if name is None else self.base.files.read(name)

    def _stored(self, names: Mapping[str, str], path: str) -> str | None:
        return next((names[alias] for alias in (path, *self.aliases.get(path, ())) if alias in names), None)

    def delta(self, path: str) -> torch.Tensor:
        """`W1 − W0` in float32, in the layout that is stored."""
        return self.read_tuned(path).to(torch.float32, copy=True).sub_(self.read_base(path))

    def is_head(self, path: str) -> bool:
        """Whether `path` is outside the body of a classifier."""
        return _is_head(path, self.task, self.model)

    def unused(self) -> list[str]:
        """Tensors of the fine-tune that its model has no place for; Transformers ignores them too."""
        return sorted(set(self.tuned.files.tensors) - set(self.tuned_names.values()))


def open_checkpoints(base: Checkpoint, tuned: Checkpoint, task: Task) -> Checkpoints:
    """Match the tensors of both checkpoints to the fine-tune's model.

    Raises:
        InputRefused: Another architecture, a configuration that changes the outputs, or shapes that differ outside
            a classification head.
    """
    _ = base.dtype, tuned.dtype  # quantized ones are refused
    config, base_config = tuned.load_config(), base.load_config()
    _require_same_config(base_config, config, task, base=base, tuned=tuned)
    model = build_weightless(task, config, "float32")
    heads = frozenset(path for path in model.state_dict() if _is_head(path, task, model))
    try:
        base_names = checkpoint_names(model, base.files, replaced=heads)
    except InputRefused as error:
        raise InputRefused(
            "The base's tensors do not fit the fine-tune's model",
            where=error.where,
            expected=error.expected,
            found=error.found,
            next_step="name the base it was trained from; a resized vocabulary needs a base resized likewise",
        ) from error
    return Checkpoints(
        task, base, tuned, config, model, base_names, checkpoint_names(model, tuned.files), parameter_aliases(model)
    )


def _is_head(path: str, task: Task, model: torch.nn.Module) -> bool:
    return task in HEADED and not path.startswith(f"{model.base_model_prefix}.")


def _require_same_config(base_config, config, task: Task, *, base: Checkpoint, tuned: Checkpoint) -> None:
    if type(base_config) is not type(config):
        raise InputRefused(
            "The fine-tune is of another architecture than the base",
            where=f"{tuned.path}/config.json: model_type",
            expected=base_config.model_type,
            found=config.model_type,
            next_step="name the base that it was trained from",
        )
    ours, theirs = dict(_flat(config.to_dict())), dict(_flat(base_config.to_dict()))
    # A decoder's positions and last token come from the mask, whatever the padding.
    ignored = (*_WITHOUT_EFFECT, "pad_token_id") if task is Task.TEXT_GENERATION else _WITHOUT_EFFECT
    different = sorted(
        key
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key) and key.split(".")[-1] not in ignored and "drop" not in key
    )
    different = [key for key in different if key.split(".")[0] not in ignored]
    if different:
        raise InputRefused(
            "The fine-tune's configuration differs from the base's; an adapter carries weights, not configuration",
            where=f"{tuned.path}/config.json: " + some_of(different, 6),
            expected=some_of([f"{key} = {theirs.get(key)!r}" for key in different], 6),
            found=some_of([f"{key} = {ours.get(key)!r}" for key in different], 6),
            next_step="name the base that it was trained from, or first give a copy of the base this configuration",
        )


def _flat(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_differences(
    checkpoints: Checkpoints, progress: Callable[[str, int], None] = lambda path, n_elements: None
) -> list[Difference]:
    """Every parameter and persistent buffer of the fine-tune's model that is not the base's, in the model's order.

    Where the two are stored in different dtypes, what the narrower one cannot hold is no difference.

    Args:
        progress: Called after each tensor with its path and its number of elements.

    Raises:
        InputRefused: The fine-tune lacks a tensor, or one that differs is not finite.
    """
    found = []
    for path, tensor in checkpoints.model.state_dict().items():
        stored = checkpoints.read_tuned(path)
        base = checkpoints.read_base(path)
        if base is None or not _equal(base, stored):
            _require_finite(checkpoints.tuned, path, stored)
            if base is not None:
                _require_finite(checkpoints.base, path, base)
            kind, transposed = _kind_of(checkpoints.model, path)
            module, in_base = path.rpartition(".")[0], base is not None
            found.append(
                Difference(path, module, kind, tuple(tensor.shape), in_base, checkpoints.is_head(path), transposed)
            )
        progress(path, tensor.numel())
    return found


def _equal(base: torch.Tensor, tuned: torch.Tensor) -> bool:
    if base.dtype is not tuned.dtype and base.is_floating_point() and tuned.is_floating_point():
        narrower = min(base.dtype, tuned.dtype, key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).max))
        base, tuned = base.to(narrower), tuned.to(narrower)
    return torch.equal(base, tuned)


def _require_finite(checkpoint: Checkpoint, path: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputRefused(
            "A weight is not finite",
            where=f"{checkpoint.path}: {path}",
            found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} elements are NaN or infinite",
            next_step="the training diverged, or the file is damaged; use another checkpoint",
        )


def _kind_of(model: torch.nn.Module, path: str) -> tuple[DifferenceKind, bool]:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    is_in_out = is_conv1d(module)
    if isinstance(module, torch.nn.Linear) or is_in_out:
        return (DifferenceKind.LINEAR if name == "weight" else DifferenceKind.BIAS), is_in_out
    if isinstance(module, torch.nn.Embedding) and name == "weight":
        return DifferenceKind.EMBEDDING, True
    return DifferenceKind.OTHER, False
