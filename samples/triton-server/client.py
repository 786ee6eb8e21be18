"""Ask a Triton server, by KServe's v2 protocol over HTTP with binary tensors; needs numpy and this package only.

    python samples/triton-server/client.py http://localhost:8000 FOLDER [--backend onnx] NAME=TEXT...

NAME is an adapter, or empty for the base. `FOLDER` is the exported folder, for its tokenizer; with `--backend onnx`
its adapters' tensors are sent along.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_export.artifact import read_manifest
from lora_export.contract import AdapterInputKind, Default, GraphContract

DATATYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64"}


def infer(url: str, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The outputs of `model` for `inputs`.

    Raises:
        RuntimeError: The server refuses, with what it says.
    """
    parts = {name: _bytes(array) for name, array in inputs.items()}
    described = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": DATATYPES.get(array.dtype.name, "BYTES"),
            "parameters": {"binary_data_size": len(parts[name])},
        }
        for name, array in inputs.items()
    ]
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    header = json.dumps({"inputs": described, "outputs": wanted}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    request = urllib.request.Request(f"{url}/v2/models/{model}/infer", header + b"".join(parts.values()), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            length, body = int(response.headers["Inference-Header-Content-Length"]), response.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.loads(error.read())["error"]) from error
    found, at = {}, length
    dtypes = {datatype: dtype for dtype, datatype in DATATYPES.items()}
    for output in json.loads(body[:length])["outputs"]:
        n = output["parameters"]["binary_data_size"]
        found[output["name"]] = np.frombuffer(body[at : at + n], dtypes[output["datatype"]]).reshape(output["shape"])
        at += n
    return found


def _bytes(array: np.ndarray) -> bytes:
    """A tensor as the protocol has it; texts each after its length."""
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array).tobytes()
    texts = [text.encode() for text in array.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def named(adapters: Sequence[str]) -> dict[str, np.ndarray]:
    """The input by which the Python backend is told each row's adapter."""
    return {"adapters": np.array(adapters, object).reshape(-1, 1)}


def without_empty(feeds: Mapping[str, np.ndarray], contract: GraphContract) -> dict[str, np.ndarray]:
    """Adapter inputs for the ONNX Runtime backend, none without elements: a pair of zeros, and a token that is none."""
    found = dict(feeds)
    for entry in contract.adapter_inputs:
        if entry.spec.default is Default.EMPTY and found[entry.name].size == 0:
            shape = tuple(1 if i == entry.spec.axis else n for i, n in enumerate(found[entry.name].shape))
            fill = -1 if entry.kind is AdapterInputKind.TOKEN_IDS else 0
            found[entry.name] = np.full(shape, fill, found[entry.name].dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", nargs="+", metavar="NAME=TEXT")
    parser.add_argument("--backend", choices=("python", "onnx"), default="python")
    arguments = parser.parse_args()
    from tokenizers import Tokenizer

    names, texts = zip(*(text.split("=", 1) for text in arguments.texts), strict=True)
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(texts))
    own = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    contract = read_manifest(arguments.folder).contract
    inputs = {s.name: np.array([getattr(each, own[s.name]) for each in encoded], np.int64) for s in contract.inputs}
    if arguments.backend == "python":
        inputs |= named(names)
    else:
        from lora_export import AdapterSession

        session = AdapterSession(arguments.folder, "cpu")
        inputs = without_empty(session.feeds(inputs, [name or None for name in names]), contract)
    logits = infer(arguments.url, "lora", inputs, ["logits"])["logits"]
    for name, text, row in zip(names, texts, logits, strict=True):
        print(f"{name or 'base':10} {row.argmax()}   {text[:60]}")


if __name__ == "__main__":
    main()
