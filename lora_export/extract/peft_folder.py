"""The extracted adapter on disk, as PEFT would have saved it: written a tensor at a time, then loaded to prove it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lora_export.adapters import peft_writer
from lora_export.adapters.peft_writer import PREFIX, WEIGHTS
from lora_export.base.weightless import as_numpy
from lora_export.errors import LoraExportError
from lora_export.extract.placement import PairPlan, Placement

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class TensorFile:
    """A safetensors file whose tensors are written as they come, so that none of them stays in memory.

    The format (huggingface.co/docs/safetensors): the length of a JSON header as 8 little-endian bytes, the header, then
    the tensors' bytes. The header is known last, so the bytes wait in a file beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._body_path = path, path.with_suffix(".body")
        self._body = self._body_path.open("wb")
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        start = self._body.tell()
        self._body.write(as_numpy(tensor.detach().contiguous()).tobytes())
        offsets = [start, self._body.tell()]
        self._header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self.shapes[name] = tuple(tensor.shape)

    def close(self) -> None:
        """Write the file; without this there is none."""
        self._body.close()
        header = json.dumps(self._header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with self._path.open("wb") as file, self._body_path.open("rb") as body:
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(body, file, 1 << 22)
        self._body_path.unlink()


def pair_tensors(
    plan: PairPlan, a: torch.Tensor, b: torch.Tensor, *, bias: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of one pair by PEFT's keys, from `ΔW = B·A` in the layout of the stored weight."""
    if plan.transposed:
        a, b = b.T, a.T
    name = f"{PREFIX}{plan.module}"
    if plan.is_embedding:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return tensors if bias is None else tensors | {f"{name}.lora_B.bias": bias}


def write_config(
    folder: Path,
    placement: Placement,
    ranks: Mapping[str, int],
    *,
    modules: Iterable[str],
    base: str,
    task_type: str | None,
) -> None:
    """`adapter_config.json`, alpha equal to the rank everywhere, so that every scale is 1.

    Args:
        ranks: Rank by module.
        modules: All modules of the model.
        base: What to record as `base_model_name_or_path`.
    """
    options = {
        "modules_to_save": sorted(placement.wholes) or None,
        "fan_in_fan_out": any(plan.transposed and not plan.is_embedding for plan in placement.pairs),
        "lora_bias": placement.has_bias,
        "task_type": task_type,
        "base_model_name_or_path": base,
    }
    peft_writer.write_config(folder, ranks, ranks, everything=list(modules), options=options)


def prove_loads(folder: Path, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Load the adapter with PEFT onto its weightless base: every tensor must arrive, and every scale be 1.

    Args:
        model: The fine-tune's model, weightless; PEFT changes it.
        shapes: Shape of every tensor that was written.

    Raises:
        LoraExportError: It does not: a defect of this package or a PEFT that behaves otherwise.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=True)
        found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    problems = [str(w.message) for w in caught if "keys" in str(w.message)]
    problems += [f"{name} is not in PEFT's model" for name in shapes.keys() - found.keys()]
    problems += [f"{name} is not in the file" for name in found.keys() - shapes.keys()]
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in shapes.keys() & found.keys():
            # PEFT holds an adapter of a 16-bit base in float32.
            if not torch.equal(found[name], file.get_tensor(name).to(found[name].dtype)):
                problems.append(f"{name} has other values")
    for name, module in loaded.named_modules():
        if isinstance(module, LoraLayer) and any(scale != 1 for scale in module.scaling.values()):
            problems.append(f"{name} has a scale other than 1")
    if problems:
        raise LoraExportError(
            "PEFT does not load the extracted adapter as it was written; nothing was published",
            where=str(folder),
            found="; ".join(sorted(problems)[:6]),
            next_step="please report it, with the versions of peft and transformers",
        )
