"""Go on with a text in ONNX Runtime GenAI, token by token: as the base, and with each adapter of an exported decoder.

    .venv-genai/bin/python samples/genai.py FOLDER TEXT [--max-new-tokens 40]

Needs onnxruntime-genai (`ci/setup genai`) and nothing of this package. GenAI runs one adapter at a time, on an export
with optional inputs; it knows no gate, so an activated LoRA is active for all tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnxruntime_genai as og


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
