"""The weights of quantized checkpoints in floats, each from its own stored tensors when it is read.

    method                        stored beside `X`                                     value
    bitsandbytes nf4, fp4         X.weight.absmax, .quant_map, .quant_state.…, nested   map[q] · absmax of a block
    bitsandbytes 8-bit            X.SCB                                                 q · SCB / 127
    GPTQ                          X.qweight, .qzeros, .scales, .g_idx                   (q − zero) · scale of a group
    AWQ                           X.qweight, .qzeros, .scales                           the same, in another order
    compressed-tensors, integers  X.weight_packed, _scale, _shape, _zero_point          (q − zero) · scale
    compressed-tensors, fp8       X.weight_scale                                        q · scale
    fp8 in blocks                 X.weight_scale_inv                                    q · scale of a block

As the libraries define them, in the dtype that they give. Nothing of a library is called. (On a CPU, bitsandbytes 0.50
reads 4-bit weights wrongly whose rows are no multiple of their blocks; here they are what was quantized.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from lora_export.base.groups import Groups, InGroups, Read, unpacked, unpacked_awq, unsigned
from lora_export.base.stored import SafetensorsFiles, TensorInfo
from lora_export.errors import InputRefused

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STATE = ".weight.quant_state.bitsandbytes__"
# 1 / 127 as bitsandbytes has it.
_INT8_STEP = 7.874015718698502e-3


@dataclass(frozen=True)
class Restored:
    """A weight that several stored tensors make.

    Attributes:
        info: As if it were stored in floats.
        sources: The stored tensors.
        make: Reads them and makes the weight.
        in_groups: The same as integers in groups; None where its numbers are no even steps.
    """

    info: TensorInfo
    sources: tuple[str, ...]
    make: Callable[[Read], torch.Tensor]
    in_groups: InGroups | None = None


@dataclass(frozen=True)
class RestoredFiles(SafetensorsFiles):
    """Files whose quantized weights are read in floats; what they are made of is not there.

    Attributes:
        restored: By the name of the weight.
    """

    restored: Mapping[str, Restored] = field(default_factory=dict, repr=False, compare=False)
    stored: SafetensorsFiles | None = field(default=None, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.restored:
            return self.stored.read(name)
        restored = self.restored[name]
        value = restored.make(self.stored.read)
        if tuple(value.shape) != restored.info.shape:
            _refuse(self.stored, name, f"{list(restored.info.shape)}", found=f"{list(value.shape)}")
        return value.to(_TORCH[restored.info.dtype])

    def groups(self, name: str) -> Groups | None:
        in_groups = self.restored[name].in_groups if name in self.restored else None
        return None if in_groups is None else in_groups.groups(self.stored.read)

    def integers(self, name: str) -> torch.Tensor:
        return self.restored[name].in_groups.integers(self.stored.read)


def restored_files(files: SafetensorsFiles, quantization: Mapping, dtype: str | None) -> RestoredFiles | None:
    """`files` with its quantized weights in floats; None where nothing is stored in a way that is known.

    Args:
        quantization: `quantization_config` of `config.json`.
        dtype: What `config.json` says of the model's; None if nothing.

    Raises:
        InputRefused: Tensors that belong to a weight are missing, or not of its size.
    """
    found: dict[str, Restored] = {}
    for name in files.tensors:
        ending = next((ending for ending in _BY_ENDING if ending in name and _ends(name, ending)), None)
        if ending is None:
            continue
        prefix = name.partition(ending)[0]
        ending = ".weight_packed" if f"{prefix}.weight_packed" in files.tensors else ending
        if f"{prefix}.weight" not in found:
            found[f"{prefix}.weight"] = _BY_ENDING[ending](files, prefix, quantization, dtype=dtype)
    if not found:
        return None
    used = {source for restored in found.values() for source in restored.sources}
    tensors = {name: info for name, info in files.tensors.items() if name not in used}
    tensors |= {name: restored.info for name, restored in found.items()}
    return RestoredFiles(tensors, files.metadata, restored=found, stored=files)


def _refuse(files: SafetensorsFiles, name: str, expected: str, *, found: str) -> None:
    near = next((info.file for other, info in files.tensors.items() if other.startswith(name.rpartition(".")[0])), "")
    raise InputRefused(
        "A quantized weight of the base is not stored as its method says",
        where=f"{near}: {name}",
        expected=expected,
        found=found,
        next_step="fetch the checkpoint again, or export from the one that was quantized",
    )


def _need(files: SafetensorsFiles, prefix: str, *endings: str) -> tuple[str, ...]:
    names = tuple(f"{prefix}{ending}" for ending in endings)
    missing = [name for name in names if name not in files.tensors]
    if missing:
        _refuse(files, f"{prefix}.weight", ", ".join(names), found=f"no {missing[0]}")
    return names


def _there(files: SafetensorsFiles, prefix: str, *endings: str) -> tuple[str, ...]:
    return tuple(name for ending in endings if (name := f"{prefix}{ending}") in files.tensors)


def _bitsandbytes_4bit(files: SafetensorsFiles, prefix: str, quantization: Mapping, *, dtype: str | None) -> Restored:
    state_name = next(name for name in files.tensors if name.startswith(f"{prefix}{_STATE}"))
    weight, absmax, codes = _need(files, prefix, ".weight", ".weight.absmax", ".weight.quant_map")
    nested = _there(files, prefix, ".weight.nested_absmax", ".weight.nested_quant_map")
    try:
        state = json.loads(bytes(files.read(state_name).tolist()))
        shape = tuple(int(size) for size in state["shape"])
        block, element = int(state["blocksize"]), _DTYPES[state["dtype"]]
        nested_block, offset = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        _refuse(files, state_name, "a state with shape, blocksize and dtype", found=repr(error))
    n = math.prod(shape)
    n_blocks = -(-n // max(block, 1))
    sizes = math.prod(files.tensors[weight].shape), math.prod(files.tensors[absmax].shape)
    if (
        block < 1
        or nested_block < 1
        or sizes != (-(-n // 2), n_blocks)
        or ("nested_blocksize" in state) != bool(nested)
    ):
        _refuse(files, weight, f"{-(-n // 2)} bytes and {n_blocks} scales for {list(shape)}", found=f"{sizes}")

    def make(read: Read) -> torch.Tensor:
        scales = read(absmax)
        if nested:
            outer, table = read(nested[0]).float(), read(nested[1]).float()
            scales = table[scales.long()] * outer.repeat_interleave(nested_block)[: len(scales)] + offset
        packed = read(weight).reshape(-1)
        numbers = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n]
        values = read(codes).float()[numbers.long()]
        padded = torch.nn.functional.pad(values, (0, n_blocks * block - n)).reshape(n_blocks, block)
        return (padded * scales.float()[:, None]).reshape(-1)[:n].reshape(shape)

    info = TensorInfo(files.tensors[weight].file, element, shape)
    return Restored(info, (weight, absmax, codes, state_name, *nested), make)


def _bitsandbytes_8bit(files: SafetensorsFiles, prefix: str, quantization: Mapping, *, dtype: str | None) -> Restored:
    weight, scale = _need(files, prefix, ".weight", ".SCB")
    info = files.tensors[weight]
    if info.dtype != "I8" or len(info.shape) != 2 or files.tensors[scale].shape != (info.shape[0],):
        _refuse(files, weight, "8-bit integers and a scale a row", found=f"{info.dtype} {list(info.shape)}")
    sources = (weight, scale, *_there(files, prefix, ".weight_format"))

    def make(read: Read) -> torch.Tensor:
        return read(weight).float() * read(scale).float()[:, None] * _INT8_STEP

    in_groups = InGroups(
        lambda read: Groups(8, read(scale).float()[:, None] * _INT8_STEP), lambda read: unsigned(read(weight))
    )
    return Restored(TensorInfo(info.file, "F32", info.shape), sources, make, in_groups)


def _gptq_or_awq(files: SafetensorsFiles, prefix: str, quantization: Mapping, *, dtype: str | None) -> Restored:
    method, bits = quantization.get("quant_method"), quantization.get("bits", quantization.get("w_bit", 4))
    packed, zeros, scale = _need(files, prefix, ".qweight", ".qzeros", ".scales")
    if method not in ("gptq", "awq") or bits not in (4, 8) or (method == "awq" and bits != 4):
        _refuse(files, packed, "quant_method gptq (4 or 8 bits) or awq (4 bits)", found=f"{method}, {bits} bits")
    if method == "awq" and str(quantization.get("version", "gemm")).lower() != "gemm":
        _refuse(files, packed, "AWQ's version gemm", found=repr(quantization["version"]))
    index = _there(files, prefix, ".g_idx")
    shape, per_word = files.tensors[packed].shape, 32 // bits
    n_in = shape[0] * (per_word if method == "gptq" else 1)
    n_out = shape[1] * (1 if method == "gptq" else per_word)
    groups = files.tensors[scale].shape[0] if files.tensors[scale].shape else 0
    if groups < 1 or files.tensors[scale].shape != (groups, n_out):
        _refuse(files, scale, f"[groups, {n_out}]", found=f"{list(files.tensors[scale].shape)}")
    # GPTQ's first format stores a zero less one.
    less = 1 if method == "gptq" and quantization.get("checkpoint_format", "gptq") == "gptq" else 0
    is_gptq, size = method == "gptq", quantization.get("group_size")
    is_fit = isinstance(size, int) and size > 0 and -(-n_in // size) == groups
    columns = size if is_fit else -(-n_in // groups)
    if -(-n_in // columns) != groups and not index:
        _refuse(files, scale, f"group_size of {n_in} columns in {groups} groups", found=f"group_size {size}")

    def groups_of(read: Read) -> Groups:
        zero = (unpacked(read(zeros), bits) + less) & ((1 << bits) - 1) if is_gptq else unpacked_awq(read(zeros))
        of_column = read(index[0]) if index and is_gptq else None
        return Groups(bits, read(scale).T.contiguous(), zero.T.contiguous(), columns, of_column)

    def integers(read: Read) -> torch.Tensor:
        words = read(packed)
        return unpacked(words.T.contiguous(), bits) if is_gptq else unpacked_awq(words).T.contiguous()

    info = TensorInfo(files.tensors[packed].file, files.tensors[scale].dtype, (n_out, n_in))
    in_groups = InGroups(groups_of, integers)
    return Restored(info, (packed, zeros, scale, *index), in_groups.values, in_groups)


def _compressed_integers(files: SafetensorsFiles, prefix: str, quantization: Mapping, *, dtype: str | None) -> Restored:
    packed, scale, shape_name = _need(files, prefix, ".weight_packed", ".weight_scale", ".weight_shape")
    others = _there(files, prefix, ".weight_zero_point", ".weight_g_idx")
    shape = tuple(int(size) for size in files.read(shape_name).tolist())
    words = files.tensors[packed].shape
    bits = words[-1] * 32 // max(shape[-1], 1) if len(shape) == 2 and len(words) == 2 else 0
    if bits not in (4, 8) or words[0] != shape[0] or any(name.endswith("g_idx") for name in others):
        _refuse(files, packed, "4 or 8 bits a number, groups in order", found=f"{list(words)} words for {list(shape)}")
    scales = files.tensors[scale].shape
    groups = scales[-1] if len(scales) == 2 else 0
    if groups < 1 or scales[0] != shape[0] or shape[1] % groups:
        _refuse(files, scale, f"[{shape[0]}, groups], which divide {shape[1]} columns", found=f"{list(scales)}")

    def groups_of(read: Read) -> Groups:
        zeros = unpacked(read(others[0]).T.contiguous(), bits)[:, : shape[0]].T if others else None
        return Groups(bits, read(scale).reshape(shape[0], groups), zeros)

    def integers(read: Read) -> torch.Tensor:
        return unpacked(read(packed), bits)[:, : shape[1]]

    info = TensorInfo(files.tensors[packed].file, files.tensors[scale].dtype, shape)
    in_groups = InGroups(groups_of, integers)
    return Restored(info, (packed, scale, shape_name, *others), in_groups.values, in_groups)


def _scaled(files: SafetensorsFiles, prefix: str, quantization: Mapping, *, dtype: str | None) -> Restored:
    """fp8 or 8-bit integers with a scale for the tensor, a row, a group or a block."""
    weight = _need(files, prefix, ".weight")[0]
    (scale, *_) = _there(files, prefix, ".weight_scale_inv", ".weight_scale")
    info, scales = files.tensors[weight], files.tensors[scale]
    shape = scales.shape if len(scales.shape) == 2 else (scales.shape[0] if scales.shape else 1, 1)
    fits = len(info.shape) == 2 and all(
        0 < n <= size and size % n == 0 for n, size in zip(shape, info.shape, strict=False)
    )
    if info.dtype not in ("F8_E4M3", "F8_E5M2", "I8") or not fits:
        _refuse(
            files,
            weight,
            "8 bits a number, and scales that divide it",
            found=f"{info.dtype} {list(info.shape)}, {list(shape)}",
        )
    if _there(files, prefix, ".weight_zero_point"):
        _refuse(files, weight, "a symmetric weight", found="weight_zero_point")
    element = scales.dtype if scales.dtype in _TORCH and scale.endswith(".weight_scale") else _DTYPES.get(dtype, "BF16")
    sources = (weight, scale, *_there(files, prefix, ".input_scale", ".activation_scale", ".input_global_scale"))

    def make(read: Read) -> torch.Tensor:
        rows, columns = (size // n for size, n in zip(info.shape, shape, strict=True))
        wide = read(scale).float().reshape(shape).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return read(weight).float() * wide

    def groups_of(read: Read) -> Groups:
        return Groups(8, read(scale).reshape(shape).repeat_interleave(info.shape[0] // shape[0], 0))

    in_groups = InGroups(groups_of, lambda read: unsigned(read(weight))) if info.dtype == "I8" else None
    return Restored(TensorInfo(info.file, element, info.shape), sources, make, in_groups)


def _ends(name: str, ending: str) -> bool:
    return ending == _STATE or name.endswith(ending)


_BY_ENDING = {
    _STATE: _bitsandbytes_4bit,
    ".SCB": _bitsandbytes_8bit,
    ".qweight": _gptq_or_awq,
    ".weight_packed": _compressed_integers,
    ".weight_scale_inv": _scaled,
    ".weight_scale": _scaled,
}
