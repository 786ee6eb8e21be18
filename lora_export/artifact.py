"""The exported folder: its files, its manifest, and how it appears all at once or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

from lora_export.contract import (
    DECODER,
    DECODER_WITH_PAST,
    ENCODER,
    SINGLE,
    AdapterInput,
    GraphContract,
    data_file,
    graph_file,
)
from lora_export.errors import InputRefused, UsageProblem, nearest
from lora_export.json_schema import violations
from lora_export.named import holds_no
from lora_export.own_hash import KEY, with_own_hash
from lora_export.quantization import Quantization
from lora_export.reading import json_of
from lora_export.sentence import SentenceEmbedding

MANIFEST, SIGNATURE = "lora_export.json", "model.sig"
ADAPTERS, REPORTS = "adapters", "reports"
SCHEMA_VERSION = 1

# Everything whose version decides the bytes of an export.
_DISTRIBUTIONS = ("lora-export", "torch", "transformers", "peft", "onnx", "onnx-ir", "onnxscript", "safetensors")


class ExportKind(StrEnum):
    MERGED = "merged"
    DYNAMIC = "dynamic"


@dataclass(frozen=True)
class SourceRecord:
    """An input as it was given and by hash: `files` maps file name to sha256."""

    given: str
    revision: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter of an export.

    Attributes:
        ranks: Distinct ranks over its modules.
        scales: Distinct scales over its modules, as PEFT resolved them.
        targets: Modules with a LoRA pair.
        replaced: Linear modules (and other tensors) it replaces as a whole.
        n_labels: Size of its classification head, if it brings one.
        files: Its `.onnx_adapter` for each graph that takes any of it, relative to the folder; empty if it is merged.
        weight: Its weight in a merged sum.
        convert_rank: The rank, or share of energy, that another tuner was converted to LoRA with; None for LoRA.
        invocation_tokens: Of an activated LoRA, active from where they last occur; None for all tokens.
        residual_base: The base is the one that the adapter's start left (PiSSA and its kin).
        preprocessing: Where, relative to the folder, the tokenizer, processor and generation settings lie that the
            adapter was trained with: "." or `adapters/<name>`; None where they are the base's, in the folder itself.
        other_base: The base that its config records, where that is not the export's by its name; None where it is.
        conversion_errors: What that lost, `‖ΔW − BA‖ / ‖ΔW‖` by module.
    """

    name: str
    source: SourceRecord
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    targets: tuple[str, ...]
    replaced: tuple[str, ...]
    labels: dict[int, str] | None = None
    n_labels: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    convert_rank: float | None = None
    conversion_errors: dict[str, float] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] | None = None
    residual_base: bool = False
    preprocessing: str | None = None
    other_base: str | None = None

    @property
    def file(self) -> str | None:
        """Its file in an export of one graph; None if it is merged."""
        return self.files.get(SINGLE)


@dataclass(frozen=True)
class Manifest:
    """`lora_export.json`.

    Attributes:
        graphs: The contract of each graph, in the order they run. The file of an export of one graph has that
            graph's `contract` instead, and each adapter's only `file` instead of its `files`.
        pad_token_id: Of a classifier on a decoder, which reads a text at its last token that is not this one.
        quantization: How the base's linear maps are stored as integers; None where all weights are floats.
        given_graph: The graph of another tool that the adapters were put onto; None where this tool made it.
        sentence_embedding: What the output of that name is; None where the graph has none.
    """

    kind: ExportKind
    task: str
    dtype: str
    provider: str
    base: SourceRecord
    adapters: tuple[AdapterRecord, ...]
    graphs: Mapping[str, GraphContract]
    files: dict[str, str]
    versions: dict[str, str] = field(default_factory=lambda: versions())
    schema: int = SCHEMA_VERSION
    pad_token_id: int | None = None
    quantization: Quantization | None = None
    given_graph: SourceRecord | None = None
    sentence_embedding: SentenceEmbedding | None = None

    @property
    def contract(self) -> GraphContract:
        """The contract of an export of one graph.

        Raises:
            UsageProblem: It has several graphs.
        """
        if SINGLE not in self.graphs:
            raise UsageProblem(
                "The export has several graphs, each with a contract of its own",
                found=", ".join(self.graphs),
                next_step="name one of them, or run it with Seq2SeqSession",
            )
        return self.graphs[SINGLE]

    def contract_of(self, graph: str) -> GraphContract:
        """The contract of one graph.

        Raises:
            UsageProblem: There is no such graph.
        """
        if graph not in self.graphs:
            raise UsageProblem(f"The export has no graph {graph!r}", found=", ".join(self.graphs))
        return self.graphs[graph]

    @property
    def adapter_inputs(self) -> tuple[AdapterInput, ...]:
        """The adapter inputs of all graphs; an input that two graphs take is in it twice."""
        return tuple(entry for contract in self.graphs.values() for entry in contract.adapter_inputs)

    @property
    def graph_files(self) -> tuple[str, ...]:
        """The graphs' own files and those of their weights, each once."""
        return tuple(dict.fromkeys(name(graph) for graph in self.graphs for name in (graph_file, data_file)))

    def weights_bytes(self, folder: Path) -> int:
        """Bytes of the graphs and their weights in `folder`."""
        return sum((folder / name).stat().st_size for name in self.graph_files)

    def adapter(self, name: str) -> AdapterRecord:
        """The record of adapter `name`.

        Raises:
            UsageProblem: There is no such adapter.
        """
        for record in self.adapters:
            if record.name == name:
                return record
        names = [record.name for record in self.adapters]
        found = ", ".join(names) or "no adapters at all"
        raise UsageProblem(f"The export has no adapter {name!r}", found=found, next_step=nearest(name, names))

    def require_served(self, name: str) -> None:
        """Refuse adapter `name` where a run cannot choose it.

        Raises:
            UsageProblem: There is no such adapter, or it is folded into the graph's weights.
        """
        if not self.adapter(name).files:
            raise UsageProblem(
                f"Adapter {name!r} is folded into the weights of a merged export and cannot be chosen",
                next_step="leave it out: every run has it; `lora-export dynamic` serves adapters by name",
            )

    def to_json(self) -> str:
        fields = asdict(self) | {"graphs": {name: contract.to_dict() for name, contract in self.graphs.items()}}
        if SINGLE in self.graphs:
            fields["contract"] = fields.pop("graphs")[SINGLE]
            for entry in fields["adapters"]:
                entry["file"] = entry.pop("files").get(SINGLE)
        return with_own_hash(fields)


def versions() -> dict[str, str]:
    """Installed versions of what decides an export's bytes, by distribution; "not installed" where one is missing."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the export in `folder`.

    Raises:
        InputRefused: The folder is no export, or its manifest is of another schema or damaged.
    """
    path = folder / MANIFEST
    try:
        fields = json_of(path.read_text(encoding="utf-8"))
        if fields["schema"] != SCHEMA_VERSION:
            raise InputRefused(
                "The export's manifest is of another version",
                where=str(path),
                expected=f"schema {SCHEMA_VERSION}",
                found=f"schema {fields['schema']!r}{_written_by(fields)}",
                next_step="export again, or use the lora-export version that wrote it",
            )
        _require_schema(fields, path)
        return _manifest_from(fields)
    except (FileNotFoundError, NotADirectoryError):
        writers = "as `lora-export merge` and `lora-export dynamic` write it"
        raise holds_no("export", folder, MANIFEST, expected=f"{MANIFEST}, {writers}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, repr(error)[:400]) from error


def _written_by(fields: Mapping) -> str:
    versions = fields.get("versions")
    found = versions.get("lora-export") if isinstance(versions, Mapping) else None
    return f", written by lora-export {found[:40]}" if isinstance(found, str) else ""


def _require_schema(fields: object, path: Path) -> None:
    schema = json_of(files("lora_export").joinpath("schema/manifest-1.schema.json").read_text(encoding="utf-8"))
    if (found := next(violations(fields, schema, schema), None)) is not None:
        raise _damaged(path, found)


def _damaged(path: Path, found: str) -> InputRefused:
    return InputRefused(
        "The export's manifest is damaged",
        where=str(path),
        expected="a file as the schema urn:lora-export:manifest:1 says",
        found=found,
        next_step="fetch the folder again, or export again",
    )


def record_from(entry: Mapping) -> AdapterRecord:
    """The adapter's record of which `entry`, of a manifest or of `dataclasses.asdict`, holds the fields."""
    sequences = {name: tuple(entry[name]) for name in ("ranks", "scales", "targets", "replaced")}
    labels = (given := entry["labels"]) and {int(key): value for key, value in given.items()}
    known = sequences | {"labels": labels, "source": SourceRecord(**entry["source"])}
    known["invocation_tokens"] = (tokens := entry.get("invocation_tokens")) and tuple(tokens)
    if "file" in entry:
        file = entry["file"]
        entry = {key: value for key, value in entry.items() if key != "file"}
        known["files"] = {} if file is None else {SINGLE: file}
    return AdapterRecord(**(dict(entry) | known))


def _manifest_from(fields: dict) -> Manifest:
    # JSON keeps names sorted; graphs are kept in the order they run.
    in_order = (SINGLE,) if "contract" in fields else (ENCODER, DECODER, DECODER_WITH_PAST)
    graphs = {graph: fields["contract"] if graph == SINGLE else fields["graphs"][graph] for graph in in_order}
    fields = {key: value for key, value in fields.items() if key not in (KEY, "contract")}
    changed = {
        "kind": ExportKind(fields["kind"]),
        "base": SourceRecord(**fields["base"]),
        "adapters": tuple(map(record_from, fields["adapters"])),
        "graphs": {graph: GraphContract.from_dict(contract) for graph, contract in graphs.items()},
    }
    read = {"quantization": Quantization.from_dict, "given_graph": lambda source: SourceRecord(**source)}
    read["sentence_embedding"] = SentenceEmbedding.from_dict
    changed |= {name: make(fields[name]) for name, make in read.items() if fields.get(name)}
    return Manifest(**(fields | changed))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest by rename, so that a reader sees the old one or the new one; the last file of an export."""
    temporary = folder / f".{MANIFEST}.{uuid.uuid4().hex[:8]}"
    temporary.write_text(manifest.to_json(), encoding="utf-8")
    temporary.replace(folder / MANIFEST)
