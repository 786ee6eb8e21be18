"""Go on with a text in ONNX Runtime GenAI, token by token: as the base, and with each adapter of an exported decoder.

    .venv-genai/bin/python samples/genai.py FOLDER TEXT [--max-new-tokens 40]

Needs onnxruntime-genai (`ci/setup genai`) and nothing of this package. GenAI runs one adapter at a time, on an export
with optional inputs; it knows no gate, so an activated LoRA is active for all tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import onnxruntime_genai as og
from onnxruntime import AdapterFormat

_DTYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64"}
_COMPANIONS = {
    "lora_A": ["lora_B"],
    "lora_B": ["lora_A"],
    "token_ids": ["token_delta"],
    "token_delta": ["token_ids"],
    "weight": ["bias"],
}


def refuse(what: str) -> NoReturn:
    print(f"refused: {what}", file=sys.stderr)
    sys.exit(3)  # as lora-export has it


def require_adapter(folder: Path, file: str, contract: dict) -> None:
    """Leave with the file and the tensor if an adapter does not fit: ONNX Runtime would write as the base does."""
    try:
        found = AdapterFormat.read_adapter(str(folder / file)).get_parameters()
    except Exception as error:  # the package raises no other
        refuse(f"{file} cannot be read: {error}")
    entries = {entry["name"]: entry for entry in contract["adapter_inputs"]}
    by_kind = {(entry["module"], entry["kind"]): name for name, entry in entries.items()}
    sizes: dict[str, int] = {"rows": 1}
    for name, value in found.items():
        entry, dims, dtype = (
            entries.get(name),
            value.shape(),
            _DTYPES.get(value.data_type().removeprefix("tensor(").rstrip(")")),
        )
        if entry is None:
            refuse(f"{file} was made for another graph: {name} is no input")
        fits = len(dims) == len(entry["dims"]) and dtype == entry["dtype"]
        # A size that the contract names is the same wherever it is named: a pair's rank.
        if not fits or any(have != (sizes.setdefault(want, have) if isinstance(want, str) else want)
                           for want, have in zip(entry["dims"], dims, strict=True)):  # fmt: skip
            refuse(f"{file} was made for another graph: {name} is {dtype} {dims}, not {entry['dtype']} {entry['dims']}")
        for kind in _COMPANIONS.get(entry["kind"], ()):
            needed = by_kind.get((entry["module"], kind))
            if needed is not None and needed not in found:
                refuse(f"{file} lacks a tensor: {needed}")


def start_tokens(folder: Path) -> list[int]:
    """What the tokenizer puts before a text by its template, which GenAI's own tokenizer leaves out."""
    processor = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("post_processor") or {}
    steps = processor.get("processors", [processor])
    template = next((step for step in steps if step.get("type") == "TemplateProcessing"), {"single": [{}]})
    first = template["single"][0].get("SpecialToken")
    return template["special_tokens"][first["id"]]["ids"] if first else []


def tokens(
    model: og.Model, adapters: og.Adapters, name: str | None, prompt: Sequence[int], n_new: int
) -> Iterator[int]:
    """The greedy continuation of `prompt` by adapter `name`, each token as it comes."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + n_new, do_sample=False)
    generator = og.Generator(model, parameters)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens([list(prompt)])
    while not generator.is_done():
        generator.generate_next_token()
        if generator.token_count() <= len(prompt):
            return
        yield int(generator.get_next_tokens()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--ids", action="store_true", help="TEXT is token ids, and so is what is printed.")
    arguments = parser.parse_args()
    manifest = json.loads((arguments.folder / "lora_export.json").read_text(encoding="utf-8"))
    if not (arguments.folder / "genai_config.json").is_file():
        parser.error(f"{arguments.folder} has no genai_config.json: export a decoder with optional inputs")
    for record in manifest["adapters"]:
        require_adapter(arguments.folder, record["file"], manifest["contract"])
    model = og.Model(str(arguments.folder))
    adapters = og.Adapters(model)
    for record in manifest["adapters"]:
        adapters.load(str(arguments.folder / record["file"]), record["name"])
    tokenizer = None if arguments.ids else og.Tokenizer(model)
    if arguments.ids:
        prompt = [int(each) for each in arguments.text.split()]
    else:
        own, start = tokenizer.encode(arguments.text).tolist(), start_tokens(arguments.folder)
        prompt = own if own[: len(start)] == start else [*start, *own]
    for name in (None, *(record["name"] for record in manifest["adapters"])):
        stream = None if arguments.ids else tokenizer.create_stream()
        print(f"[{name or 'base'}]", "" if arguments.ids else arguments.text, end="", flush=True)
        for token in tokens(model, adapters, name, prompt, arguments.max_new_tokens):
            print(f" {token}" if stream is None else stream.decode(token), end="", flush=True)
        print()


if __name__ == "__main__":
    main()
