"""A base model without weights: right class, right shapes, no memory.

Every parameter and persistent buffer is one zero of the CPU expanded to its shape (stride 0). On the meta device
itself, PEFT loses an adapter's tensors and code with constants cannot be traced; here both work.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from lora_export.base.config import field_at_fault
from lora_export.base.decoder import language_model_of, refuse_other_states
from lora_export.base.tasks import Task, model_class, require_model_type
from lora_export.errors import InputRefused, refused_if_it_fails

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Computed tables of real models take some hundred MB at most: causal masks of GPT-2's kin, rotary tables.
_MOST_COMPUTED_BYTES = 4 * 2**30


def build_weightless(task: Task, config, dtype: str, *, most_parameters: int | None = None) -> torch.nn.Module:
    """The model of `task` for a `PretrainedConfig`, in eval mode, tied, weightless.

    Non-persistent buffers (`inv_freq`, `position_ids`) are not in a checkpoint, so they are computed for real, by
    the code that `from_pretrained` itself uses for them.

    Args:
        most_parameters: Stop once the model has more (`Checkpoint.most_parameters`); None for no limit.

    Raises:
        InputRefused: Transformers has no such model for the task, cannot build it from this config, or would build more
            than the checkpoint holds.
    """
    require_model_type(task, config.model_type)

    def where() -> str:
        def build(fields: dict) -> torch.nn.Module:
            return _on_meta(task, type(config).from_dict(fields), dtype, most=most_parameters)

        field = field_at_fault(config.to_diff_dict(), build)
        return "config.json" + (f": {field}" if field else "")

    with refused_if_it_fails(
        f"Transformers cannot build a {config.model_type} model for {task} from this base's config",
        where=where,
        next_step="mend the field, or fetch the base's config.json again",
    ):
        model = _on_meta(task, config, dtype, most=most_parameters)
        if task is Task.TEXT_GENERATION:
            language_model_of(model)
            refuse_other_states(model)
        _refuse_large_buffers(model)
        if dtype == "float16":
            _keep_in_float32(model)
        for module in model.modules():
            _replace_tensors(module)
        model.initialize_weights()
        model.tie_weights()
    return model.eval().requires_grad_(False)


def _on_meta(task: Task, config, dtype: str, *, most: int | None) -> torch.nn.Module:
    """The model on the meta device: modules and shapes, no memory."""
    kind = model_class(task, config)
    try:
        with _at_most(most, config), torch.device("meta"):
            build = getattr(kind, "from_config", None) or kind._from_config
            return build(config, dtype=TORCH_DTYPES[dtype])
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise InputRefused(
            f"Transformers has no {task} model for this base",
            where="config.json: model_type",
            found=str(getattr(config, "model_type", None)),
            next_step="name another task with --task",
        ) from error


@contextlib.contextmanager
def _at_most(n_parameters: int | None, config) -> Iterator[None]:
    """Refuse a model as soon as it has registered more parameters than this."""
    if n_parameters is None:
        yield
        return
    n_found = 0

    def count(module: torch.nn.Module, name: str, parameter: object) -> None:
        nonlocal n_found
        n_found += 1
        if n_found > n_parameters:
            raise InputRefused(
                "The base's config describes a larger model than its checkpoint holds",
                where=f"config.json of a {config.model_type} base",
                expected=f"no more than {n_parameters} parameters, going by the number of stored tensors",
                next_step="fetch the base again; its config.json and its weights are of different models",
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _refuse_large_buffers(model: torch.nn.Module) -> None:
    """Refuse what would be computed because no checkpoint holds it, where no model of this kind is so large."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer is not None}
    n_bytes = sum(buffer.nbytes for buffer in buffers.values())
    if n_bytes > _MOST_COMPUTED_BYTES:
        name, largest = max(buffers.items(), key=lambda item: item[1].nbytes)
        raise InputRefused(
            "The base's config asks for computed tables that are too large",
            where=f"config.json of a {model.config.model_type} base",
            expected=f"{_MOST_COMPUTED_BYTES} bytes at most",
            found=f"{n_bytes} bytes; the largest is {name} {list(largest.shape)}",
            next_step="fetch the base's config.json again",
        )


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


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """`tensor` as an array sharing its memory; bfloat16 as ml_dtypes' type, which onnx-ir and safetensors know."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
