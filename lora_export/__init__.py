"""lora-export: from a Transformers base and PEFT adapters to ONNX Runtime, with proof.

    cli.py             the command line: parse, one pipeline call, render, exit code
    pipeline.py        the main path: export, add_adapter, check, bench, inspect
    extract.py         the other main path: a full fine-tune becomes an adapter
    report/            renderers of results: JSON, text, Markdown, HTML
    verify/            unmerged PEFT against ONNX Runtime; paired latencies
    finished_graph.py  a plan's graph: traced, given adapter inputs, fused, cached
    extraction/        what of a fine-tune differs from its base, as low-rank pairs
    plan.py            what was asked for, checked before any work
    foreign.py         adapters that PEFT did not save, as PEFT folders
    weights.py         the numbers: checkpoint tensors with adapters folded in
    graph/             passes over an onnx-ir model
    runtime/           ONNX Runtime sessions; `AdapterSession`
    integrity.py       an exported folder against its manifest, its sources and its signature
    signature.py       a folder's signature (OpenSSF model signing)
    artifact.py        the exported folder and its manifest
    adapters/          a trained adapter: reading, mathematics, packing, what is supported
    base/              a base checkpoint: reading, tasks, the weightless model, its trace
    contract.py        the exported graph's contract, shared by all of the above
    recipe.py          how a stored weight is made, as data
    errors.py          the error tree

Importing this package imports none of its heavy dependencies; the sessions need onnxruntime and numpy only.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError, UsageProblem

if TYPE_CHECKING:
    from lora_export.runtime.adapter_session import AdapterSession
    from lora_export.runtime.seq2seq_session import Seq2SeqSession

__all__ = [
    "AdapterSession", "EnvironmentUnusable", "InputRefused", "LoraExportError", "Seq2SeqSession", "UsageProblem",
    "__version__",
]  # fmt: skip

try:
    __version__ = version("lora-export")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"


def __getattr__(name: str) -> object:
    if name == "AdapterSession":
        from lora_export.runtime.adapter_session import AdapterSession

        return AdapterSession
    if name == "Seq2SeqSession":
        from lora_export.runtime.seq2seq_session import Seq2SeqSession

        return Seq2SeqSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
