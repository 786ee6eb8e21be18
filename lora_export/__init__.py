"""lora-export: from a Transformers base and PEFT adapters to ONNX Runtime, with proof.

    pipeline.py     the main path: export, add_adapter, remove_adapters, check, bench, extract_adapter,
                    fleet
    trial.py        `run`: try an export; what each task takes, and answers
    answers.py      a task's outputs as people read them, for `run` and `serve`

    cli/            all of Click; the only room that exits (a verdict's exit code: cli/output.py)
    serve/          an export over HTTP, in the form of OpenAI's API
    export/         from a request to all that an export holds
    check/          is the export what was trained?
    bench/          what does it cost?
    fleet/          many adapters of one base, packed and checked one by one
    report/         what people and programs read of a result, a file for each format: pure functions
    extract/        a full fine-tune as an adapter
    integrity/      is the folder still what was exported?
    runtime/        run an export, with onnxruntime and numpy only
    graph/          passes over an onnx-ir model: adapter inputs, fusions, the cache's layout, weights
    adapters/       a trained adapter on its base: reading, mathematics, packing, what is supported
    base/           a base checkpoint: reading (quantized ones too), tasks, the weightless model, its trace

    contract.py     the exported graph's contract: inputs, outputs, the table of adapter-input kinds, a decoder's
                    cache layouts
    packed.py       what an adapter input of several modules says (who shares: graph/packed_pairs.py)
    site_choice.py  which modules get adapter inputs, of which kinds
    quantization.py how an export stores linear maps as integers (how a base does: base/quantized.py)
    sentence.py     the kinds of pooling: how a text's states become one embedding
    agreement.py    whether a contract, its cache layout included, is that of its graph
    other_tools.py  the ONNX file and the settings in another tool's folder
    named.py        what a user names: a path, or a hub id
    reading.py      JSON that others made, and the numbers in it
    json_schema.py  whether a JSON value follows a schema of ours
    artifact.py     the exported folder's files and its manifest
    own_hash.py     a JSON file that holds a hash of itself
    carried.py      what a host needs beside the graph: tokenizers, processors, licences
    folders.py      folders that one process changes, exchanged at once
    staging.py      a folder that appears whole or not at all
    changing.py     a change of some of an export's files, at once or not at all
    environment.py  where a result was obtained
    progress.py     what a caller is told while a command works
    verdict.py      the values that the results of check and bench have in common
    compat.py       the list of every private or patched symbol of another library, and where each is used
    quiet.py        libraries that print, silenced
    errors.py       the error tree, each error with its exit code (a fleet's: fleet/outcomes.py)

Every room's `__init__` says what it is for, its files in reading order, and what it imports. Imports never run in a
circle: pyproject.toml names the layers. Tests hold both.

Importing this package imports none of its heavy dependencies; the sessions need onnxruntime and numpy only.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError, UsageProblem

if TYPE_CHECKING:
    from lora_export.runtime.adapter_session import AdapterSession
    from lora_export.runtime.generate import generate
    from lora_export.runtime.seq2seq_session import Seq2SeqSession

__all__ = [
    "AdapterSession", "EnvironmentUnusable", "InputRefused", "LoraExportError", "Seq2SeqSession", "UsageProblem",
    "__version__", "generate",
]  # fmt: skip

try:
    __version__ = version("lora-export")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"


# What is imported when it is first asked for.
_LATER = {
    "AdapterSession": "lora_export.runtime.adapter_session",
    "Seq2SeqSession": "lora_export.runtime.seq2seq_session",
    "generate": "lora_export.runtime.generate",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
