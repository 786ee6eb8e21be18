"""An adapter as the named tensors of a dynamic graph, and as a file that ONNX Runtime's own `LoraAdapter` loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from lora_export.adapters.factors import Adapter, fold, served_pair
from lora_export.contract import AdapterInputKind, GraphContract
from lora_export.errors import InputRefused

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16


def pack(
    adapter: Adapter,
    contract: GraphContract,
    base_weight: Callable[[str], torch.Tensor],
    elsewhere: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The tensors `adapter` feeds to a graph of `contract`, by input name, sorted; absent inputs keep their default.

    1. A pair on a module with LoRA inputs: `[1, in, rank]` and `[1, rank, out]`, scale folded in.
    2. A replaced Linear: weight `[1, in, out]`, bias `[1, 1, out]`.
    3. A pair on a module that the graph takes as a whole (another adapter replaces it): folded into the base's.

    Args:
        base_weight: Reads a parameter of the base by path, for case 3.
        elsewhere: Modules that another graph of the export takes, and this one need not.

    Raises:
        InputRefused: The adapter needs modules that the graph has no inputs for; all are named.
    """
    missing: list[str] = []
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in adapter.lora.items():
        inputs = contract.of_module(module)
        if AdapterInputKind.LORA_A in inputs:
            a, b = inputs[AdapterInputKind.LORA_A], inputs[AdapterInputKind.LORA_B]
            tensors[a.name], tensors[b.name] = served_pair(pair, _TORCH_DTYPES[a.dtype])
        elif AdapterInputKind.WEIGHT in inputs:
            entry = inputs[AdapterInputKind.WEIGHT]
            folded = fold(base_weight(f"{module}.weight"), [pair], _TORCH_DTYPES[entry.dtype])
            tensors[entry.name] = (folded if pair.weight_is_in_out else folded.T).unsqueeze(0).contiguous()
        else:
            missing += [module] if module not in elsewhere else []
    for module in adapter.replaced_modules:
        inputs = contract.of_module(module)
        if AdapterInputKind.WEIGHT not in inputs:
            missing += [module] if module not in elsewhere else []
            continue
        weight = inputs[AdapterInputKind.WEIGHT]
        dtype = _TORCH_DTYPES[weight.dtype]
        tensors[weight.name] = adapter.replaced[f"{module}.weight"].float().T.unsqueeze(0).to(dtype).contiguous()
        if (bias := inputs.get(AdapterInputKind.BIAS)) is not None:
            tensors[bias.name] = adapter.replaced[f"{module}.bias"].float().reshape(1, 1, -1).to(dtype).contiguous()
    if missing:
        raise InputRefused(
            f"Adapter {adapter.name!r} needs modules that the graph has no inputs for",
            where=", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else ""),
            expected=f"one of the {len(contract.modules)} modules that the graph serves",
            next_step="export again with this adapter in the list, or name its modules with --targets",
        )
    return dict(sorted(tensors.items()))


def write_onnx_adapter(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as an `.onnx_adapter` file (ONNX Runtime's flatbuffer format, version 1)."""
    import onnxruntime as ort

    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: _ort_value(tensor) for name, tensor in tensors.items()})
    adapter.export_adapter(str(path))


def _ort_value(tensor: torch.Tensor):
    import onnxruntime as ort

    if tensor.dtype is torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
