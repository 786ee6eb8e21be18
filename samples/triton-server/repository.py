"""Write Triton model repositories for an exported encoder or classifier.

    python samples/triton-server/repository.py FOLDER OUT

`OUT/python/lora`: Triton's Python backend with `AdapterSession`; a request names an adapter for each of its rows, and
the rows of several requests run as one batch. `OUT/onnx/lora`, for an export of `--inputs required`: the ONNX Runtime
backend, which is sent the adapters' tensors with each request (`client.py` does so). No Triton server has run these
here: the settings are held to Triton's protobuf schema, and a test runs the Python backend's code without the server.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from lora_export.artifact import Manifest, read_manifest
from lora_export.contract import TensorSpec
from lora_export.errors import InputRefused, LoraExportError

NAME = "lora"
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
LARGEST_BATCH, LONGEST_WAIT_US = 32, 2000


def main(folder: Path, out: Path) -> None:
    manifest = read_manifest(folder)
    contract = manifest.contract
    if contract.past:
        raise InputRefused(
            "These repositories are for encoders and classifiers", where=str(folder), found=manifest.task
        )
    write(out / "python" / NAME, python_config(manifest, folder.resolve()))
    shutil.copy(Path(__file__).with_name("model.py"), out / "python" / NAME / "1" / "model.py")
    if contract.adapter_inputs_required:
        write(out / "onnx" / NAME, onnx_config(manifest))
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(folder / name, out / "onnx" / NAME / "1" / name)


def write(model: Path, config: str) -> None:
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(config, encoding="utf-8")


def python_config(manifest: Manifest, folder: Path) -> str:
    """Rows of several requests are one batch; they are padded in model.py, so shapes may differ."""
    contract = manifest.contract
    outputs = [spec for spec in contract.outputs if spec.name in ("logits", "last_hidden_state")]
    device = "KIND_GPU" if manifest.provider == "cuda" else "KIND_CPU"
    return f"""name: "{NAME}"
backend: "python"
max_batch_size: {LARGEST_BATCH}
{entries("input", [*contract.inputs, TensorSpec("adapters", "text", ("rows", 1))], has_batch=True)}
{entries("output", outputs, has_batch=True)}
parameters {{ key: "folder" value {{ string_value: "{folder}" }} }}
instance_group [ {{ kind: {device} count: 1 }} ]
dynamic_batching {{ max_queue_delay_microseconds: {LONGEST_WAIT_US} }}
"""


def onnx_config(manifest: Manifest) -> str:
    """No batching by the server: the first axis of an adapter input is 1 or the batch."""
    contract = manifest.contract
    outputs = [spec for spec in contract.outputs if spec.name in ("logits", "last_hidden_state")]
    return f"""name: "{NAME}"
backend: "onnxruntime"
max_batch_size: 0
{entries("input", [*contract.inputs, *contract.adapter_inputs], has_batch=False)}
{entries("output", outputs, has_batch=False)}
instance_group [ {{ kind: {"KIND_GPU" if manifest.provider == "cuda" else "KIND_CPU"} count: 1 }} ]
"""


def entries(field: str, specs: Iterable[TensorSpec], *, has_batch: bool) -> str:
    """`field` for each of `specs`; -1 is a size that varies, and a first axis of the batch is left out."""
    lines = []
    for spec in specs:
        dims = [dim if isinstance(dim, int) else -1 for dim in spec.dims[1 if has_batch else 0 :]]
        dtype = "TYPE_STRING" if spec.dtype == "text" else TYPES[spec.dtype]
        ragged = " allow_ragged_batch: true" if field == "input" and has_batch and -1 in dims else ""
        lines.append(f'{field} {{ name: "{spec.name}" data_type: {dtype} dims: {dims}{ragged} }}')
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except LoraExportError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
