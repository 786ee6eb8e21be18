"""Whether a base's weights are quantized: read off its config, and off the names and dtypes of its tensors.

The numbers that a quantized checkpoint stores are no weights without the scales beside them. Where the config declares
a method that `restored.py` knows, its weights are read in floats; any other base is refused before its shapes are
looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_export.base.restored import RestoredFiles, restored_files
from lora_export.base.stored import SAFETENSORS_DTYPES, SafetensorsFiles
from lora_export.errors import InputRefused, some_of

# How the tensors of each method are named beside a weight, for folders whose config does not say.
_BY_ENDING = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit (fp4)",
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8 with a scale a block",
    ".weight_scale": "integers or fp8 with a scale beside each weight",
    "_blocks": "MXFP4",
}
_WAY_OUT = (
    "export from the checkpoint that was quantized; or load this one in Transformers, call `model.dequantize()`, save "
    "it, and export that"
)


def refuse_quantized(config: Mapping[str, object], files: SafetensorsFiles, folder: Path) -> None:
    """Raise InputRefused if the base in `folder` is quantized; the message names the method.

    Args:
        config: `config.json`.
    """
    stored = _method_stored(files)
    declared = _method_declared(config)
    if declared is not None:
        is_leftover = stored is None and all(info.dtype in SAFETENSORS_DTYPES for info in files.tensors.values())
        raise InputRefused(
            f"The base's weights are quantized: {declared}",
            where=f"{folder}/config.json: quantization_config",
            expected="weights stored in float32, float16 or bfloat16",
            found="a quantization_config, though all tensors are stored as floats" if is_leftover else stored,
            next_step="remove quantization_config from config.json if the weights were dequantized"
            if is_leftover
            else _WAY_OUT,
        )
    if stored is not None:
        raise InputRefused(
            f"The base's weights are quantized: {stored}",
            where=str(folder),
            expected="weights stored in float32, float16 or bfloat16",
            next_step=_WAY_OUT,
        )


def in_floats(config: Mapping[str, object], files: SafetensorsFiles) -> tuple[dict, RestoredFiles | None, str | None]:
    """The config without its quantization, the files with the weights in floats, and the method in words.

    The files are None where the config declares none, or one that is not read.

    Raises:
        InputRefused: Tensors that belong to a weight are missing, or not of its size.
    """
    declared = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(declared, Mapping):
        return dict(config), None, None
    dtype = config.get("dtype", config.get("torch_dtype"))
    restored = restored_files(files, declared, dtype if isinstance(dtype, str) else None)
    if restored is None:
        return dict(config), None, None
    plain = {name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")}
    return plain, restored, _described(declared)


def refuse_other_dtypes(names: Iterable[str], files: SafetensorsFiles) -> None:
    """Raise InputRefused if one of the stored tensors `names`, which make floating parameters, is no such float."""
    wrong = [name for name in names if files.tensors[name].dtype not in SAFETENSORS_DTYPES]
    if wrong:
        first = files.tensors[wrong[0]]
        raise InputRefused(
            "A parameter of the base is stored in a dtype that is not exported",
            where=f"{first.file}: {some_of(wrong, 3)}",
            expected="float32, float16 or bfloat16",
            found=", ".join(sorted({files.tensors[name].dtype for name in wrong})),
            next_step=_WAY_OUT,
        )


def _method_declared(config: Mapping[str, object]) -> str | None:
    """The method that `quantization_config` names, of the model or of a part of it; None without one."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for part in parts:
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, Mapping):
            return _described(found)
    return None


def _described(quantization: Mapping[str, object]) -> str:
    method = str(quantization.get("quant_method", "of an unnamed method"))
    if method == "bitsandbytes" or "load_in_4bit" in quantization:
        is_4bit = quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")
        kind = quantization.get("bnb_4bit_quant_type", "fp4")
        return f"bitsandbytes 4-bit ({kind})" if is_4bit else "bitsandbytes 8-bit"
    names = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "fp8", "mxfp4": "MXFP4"}
    details = {"bits": "{}-bit", "format": "{}", "weight_block_size": "blocks of {}"}
    shown = [text.format(quantization[key]) for key, text in details.items() if quantization.get(key)]
    return names.get(method, method) + (f" ({', '.join(shown)})" if shown else "")


def _method_stored(files: SafetensorsFiles) -> str | None:
    """The method that the tensors' names tell, where some tensor is no float; None if they tell of none."""
    if all(info.dtype in SAFETENSORS_DTYPES for info in files.tensors.values()):
        return None
    for ending, method in _BY_ENDING.items():
        found = [name for name in files.tensors if name.endswith(ending)]
        if found:
            return f"{method}, as {some_of(found, 1)} tells"
    return None
