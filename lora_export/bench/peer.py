"""A graph that another tool wrote, as a bench times it: fed by its inputs' names, no manifest needed.

ONNX Runtime GenAI's model builder, ONNX Runtime's optimizer and Optimum name inputs as Transformers does. Each input
gets the values that this export's input of that name gets, in the dtype that the graph takes. What has no values is
refused by name, before anything is timed.

A cache is two buffers, past and present, unless `genai_config.json` says that they may be one
(`past_present_share_buffer`): then they are one, as that tool's own runtime has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.artifact import MANIFEST, sha256_of
from lora_export.bench.budget import AGAINST
from lora_export.bench.latency import Candidate
from lora_export.bench.memory_job import MemoryJob
from lora_export.bench.peer_session import PeerSession, open_peer
from lora_export.bench.shapes import Shape, shape_text
from lora_export.bench.workloads import size_of
from lora_export.contract import LOGITS_TO_KEEP, SINGLE, CacheLayout, GraphContract, TensorSpec
from lora_export.errors import InputRefused, some_of
from lora_export.other_tools import GENAI_CONFIG, find_graph, json_beside
from lora_export.runtime.described import declared_in
from lora_export.verdict import Subject

OTHER_TOOL = "other"
# What a graph may do without, since it then takes what the values given here say: all real, at their own places.
_IMPLIED = ("attention_mask", "position_ids", "token_type_ids")
_SHOWN = 6


@dataclass(frozen=True)
class Peer:
    """Another tool's graph.

    Attributes:
        given: The folder or file as the user named it.
        graph: Its ONNX file.
        contract: What it takes and gives; sizes that it leaves open are this export's where these are fixed.
        vocabulary: Tokens that it knows; None where nothing says.
        is_of_base: As in `OtherExport`.
    """

    given: Path
    graph: Path
    contract: GraphContract
    vocabulary: int | None
    is_of_base = True

    @property
    def graphs(self) -> Mapping[str, GraphContract]:
        return {SINGLE: self.contract}

    def candidate(self, served: Sequence[str]) -> Candidate:
        """It as it is, whatever adapters are `served` beside it."""
        return Candidate(AGAINST, f"{self.given}: the graph of another tool, as it is", AGAINST)

    def open(self, provider: str) -> PeerSession:
        return open_peer(self.graph, self.contract, provider)

    def memory_job(self, provider: str, vocabulary: int, runs: Sequence) -> MemoryJob:
        return MemoryJob(str(self.graph), provider, vocabulary, runs, self.contract.to_dict())

    def notes(self, provider: str) -> list[str]:
        """How its cache is run, where it has one."""
        if not self.contract.past:
            return []
        if self.contract.cache_layout is CacheLayout.TOKENS:
            return [f"The other graph's past and present are one buffer, as its {GENAI_CONFIG} says."]
        return [f"The other graph's past and present are two buffers: no {GENAI_CONFIG} says that they may be one."]

    def subject(self, task: str) -> Subject:
        """The graph, in a report; `task` is that of the export that it is timed with."""
        dtype = next((spec.dtype for spec in self.contract.outputs), "unknown")
        files = sorted(path for path in self.graph.parent.glob(f"{self.graph.name}*") if path.is_file())
        return Subject(
            folder=str(self.given), kind=OTHER_TOOL, task=task, dtype=dtype, base="unknown", fused_for="unknown",
            adapters=(), graph_sha256=sha256_of(self.graph), n_bytes={path.name: path.stat().st_size for path in files},
        )  # fmt: skip


def is_export(path: Path) -> bool:
    """Whether this tool wrote it: its manifest lies there."""
    return (path / MANIFEST).is_file()


def read_peer(path: Path, own: Mapping[str, GraphContract], shapes: Sequence[Shape]) -> Peer:
    """The graph at `path`, a folder or an ONNX file.

    Args:
        own: The contracts of the export that it is timed with.
        shapes: What both will run.

    Raises:
        InputRefused: There is no such graph or more than one, ONNX Runtime cannot open it, or an input has no values.
    """
    if SINGLE not in own:
        raise InputRefused(
            "An encoder-decoder is several graphs, and only another export of this tool tells how they go together",
            where=str(path),
            next_step=f"give a folder with {MANIFEST}",
        )
    graph = find_graph(path, or_else=f"{MANIFEST}, ")
    config = json_beside(graph, GENAI_CONFIG)
    inputs, outputs = declared_in(graph)
    known = {spec.name: spec for spec in own[SINGLE].inputs}
    inputs = tuple(_with_sizes_of(spec, known.get(spec.name)) for spec in inputs)
    contract = GraphContract(inputs, outputs)
    if contract.past:
        shares = bool(config.get("search", {}).get("past_present_share_buffer", False))
        contract = replace(contract, cache_layout=CacheLayout.TOKENS if shares else CacheLayout.COLUMNS)
    for spec in inputs:
        _require_values(spec, known, shapes, where=f"{graph}: input {spec.name}")
    _require_all(contract, own[SINGLE], shapes, where=str(graph))
    vocabulary = config.get("model", {}).get("vocab_size") or json_beside(graph, "config.json").get("vocab_size")
    return Peer(path, graph, contract, vocabulary)


def _with_sizes_of(spec: TensorSpec, own: TensorSpec | None) -> TensorSpec:
    """`spec` with the fixed sizes of this export's input of the name where it leaves them open."""
    if own is None or len(own.dims) != len(spec.dims):
        return spec
    pairs = zip(spec.dims, own.dims, strict=True)
    dims = tuple(its if isinstance(its, int) or not isinstance(ours, int) else ours for its, ours in pairs)
    return replace(spec, dims=dims)


def _require_values(spec: TensorSpec, known: Mapping[str, TensorSpec], shapes: Sequence[Shape], *, where: str) -> None:
    taken = f"{spec.dtype} [{', '.join(str(dim) for dim in spec.dims)}]"
    if spec.name not in known and spec.name not in (*_IMPLIED, LOGITS_TO_KEEP):
        raise InputRefused(
            "The other graph takes an input that this bench has no values for",
            where=where,
            expected=some_of(list(dict.fromkeys([*known, *_IMPLIED, LOGITS_TO_KEEP])), _SHOWN),
            found=taken,
            next_step="compare graphs of the same model and task, exported with the inputs' names of Transformers",
        )
    for shape in shapes:
        size = size_of(spec, shape)
        fits = len(size) == len(spec.dims) and all(
            isinstance(n, int) and (not isinstance(dim, int) or dim == n)
            for dim, n in zip(spec.dims, size, strict=True)
        )
        own = known.get(spec.name)
        if not fits or (own is not None and size_of(own, shape) != size):
            wanted = size if own is None else size_of(own, shape)
            raise InputRefused(
                f"The other graph does not take this input at {shape_text(shape)}",
                where=where,
                expected=f"[{', '.join(map(str, wanted))}]",
                found=taken,
                next_step="compare graphs of the same model, or name shapes that both take (--shape)",
            )


def _require_all(contract: GraphContract, own: GraphContract, shapes: Sequence[Shape], *, where: str) -> None:
    """Refuse a graph that is not given what this export reads: it would compute something else."""
    taken = {spec.name for spec in contract.inputs}
    has_past = any(past for _, _, past in shapes) or bool(contract.past)
    unneeded = () if has_past else own.past
    needed = [spec.name for spec in own.inputs if spec.name not in _IMPLIED and spec not in unneeded]
    missing = [name for name in needed if name not in taken]
    if missing:
        raise InputRefused(
            "The other graph does not take an input that this export reads",
            where=f"{where}: input {missing[0]}",
            expected=some_of(needed, _SHOWN),
            found=some_of(sorted(taken), _SHOWN),
            next_step="compare graphs of the same model and task; one without a cache only at shapes without a past",
        )
