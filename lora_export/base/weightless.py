"""A base model without weights: right class, right shapes, no memory.

Every parameter and persistent buffer is one zero of the CPU expanded to its shape (stride 0). On the meta device
itself, PEFT loses an adapter's tensors and code with constants cannot be traced; here both work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from lora_export.base.tasks import Task, model_class, require_model_type
from lora_export.errors import InputRefused

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_weightless(task: Task, config, dtype: str) -> torch.nn.Module:
    """The model of `task` for a `PretrainedConfig`, in eval mode, tied, weightless.

    Non-persistent buffers (`inv_freq`, `position_ids`) are not in a checkpoint, so they are computed for real, by
    the code that `from_pretrained` itself uses for them.

    Raises:
        InputRefused: Transformers has no such model for the task.
    """
    require_model_type(task, config.model_type)
    kind = model_class(task, config)
    try:
        with torch.device("meta"):
            build = getattr(kind, "from_config", None) or kind._from_config
            model = build(config, dtype=TORCH_DTYPES[dtype])
    except ValueError as error:
        raise InputRefused(
            f"Transformers has no {task} model for this base",
            where="config.json: model_type",
            found=str(getattr(config, "model_type", None)),
            next_step="name another task with --task",
        ) from error
    if dtype == "float16":
        _keep_in_float32(model)
    for module in model.modules():
        _replace_tensors(module)
    model.initialize_weights()
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _keep_in_float32(model: torch.nn.Module) -> None:
    """Keep what `from_pretrained` keeps when it loads in float16: T5's second projection, which overflows."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._keep_in_fp32_modules or ()]
    for name, module in model.named_modules():
        if module._parameters and any(pattern.search(f"{name}.weight") for pattern in kept):
            module.float()


def _replace_tensors(module: torch.nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[name] = _marked_initialized(torch.nn.Parameter(zero, requires_grad=False))
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        if name in module._non_persistent_buffers_set:
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        else:
            module._buffers[name] = _marked_initialized(torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))


def untie(model: torch.nn.Module, paths: Iterable[str]) -> None:
    """Give each of `paths` of a weightless model, changed in place, a parameter of its own."""
    for path in paths:
        module, _, name = path.rpartition(".")
        zero = torch.zeros((), dtype=model.get_parameter(path).dtype).expand(model.get_parameter(path).shape)
        setattr(model.get_submodule(module), name, torch.nn.Parameter(zero, requires_grad=False))


def _marked_initialized(tensor: torch.Tensor) -> torch.Tensor:
    """`initialize_weights` leaves tensors with this flag alone, as it does for those a checkpoint has filled."""
    tensor._is_hf_initialized = True
    return tensor


def parameter_aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """For every parameter and persistent buffer path of `model`, all paths of the same tensor, itself included."""
    paths: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        paths.setdefault(id(tensor), []).append(name)
    return {name: tuple(group) for group in paths.values() for name in group}


def vocabulary_tables(model: torch.nn.Module) -> tuple[str, ...]:
    """The paths of the embeddings that have a row for each token of the vocabulary."""
    n_tokens = getattr(model.config.get_text_config(), "vocab_size", None)
    tables = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    return tuple(f"{name}.weight" for name, table in tables.items() if table.num_embeddings == n_tokens)


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether `module` is Transformers' Conv1D: a linear map whose weight is stored `[in, out]` (GPT-2)."""
    return type(module).__name__ == "Conv1D"
