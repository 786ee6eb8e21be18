"""What an export will hold: its files, and the bytes of its weights. `--dry-run` shows it; the export goes by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_export.adapters.factors import Adapter
from lora_export.artifact import ADAPTERS, MANIFEST, SIGNATURE
from lora_export.base.tasks import SEQ2SEQ, Task, graphs_of
from lora_export.contract import DECODER, ENCODER, SINGLE, adapter_file, data_file, graph_file
from lora_export.export.plan import Plan
from lora_export.export.quantizing import planned_sizes
from lora_export.export.resolve import Resolved
from lora_export.export.tied import refuse_changed_embedding, untied_modules
from lora_export.other_tools import GENAI_CONFIG
from lora_export.progress import Progress
from lora_export.site_choice import SiteChoice

# Modules of a decoder that only its first step computes: keys and values of the source.
_OF_THE_SOURCE = (
    "EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj",
)  # fmt: skip


def planned_files(plan: Plan, resolved: Resolved, *, signed: bool) -> tuple[str, ...]:
    """The files of an export, in no order, reports aside."""
    graphs = graphs_of(plan.task)
    files = [name(graph) for graph in graphs for name in (graph_file, data_file)]
    files += [MANIFEST, "config.json", *plan.carried.files]
    files += [GENAI_CONFIG] if plan.task is Task.TEXT_GENERATION else []
    files += [SIGNATURE] if signed else []
    if plan.request.mode == "dynamic":
        for adapter in resolved.adapters:
            touched = [graph for graph in graphs if graph == SINGLE or _touches(adapter, graph)]
            files += [f"{ADAPTERS}/{adapter_file(adapter.name, graph)}" for graph in touched]
    return tuple(dict.fromkeys(files))


def _touches(adapter: Adapter, graph: str) -> bool:
    """Whether an adapter has any module in `graph` of an encoder-decoder."""
    modules = [*adapter.modules, *(path.rpartition(".")[0] for path in adapter.replaced)]
    of_encoder = [module for module in modules if ".encoder." in f".{module}"]
    of_decoder = [module for module in modules if module not in of_encoder]
    if graph == ENCODER:
        return bool(of_encoder)
    return bool(of_decoder if graph == DECODER else [m for m in of_decoder if not m.endswith(_OF_THE_SOURCE)])


def planned_bytes(plan: Plan, resolved: Resolved, choice: SiteChoice) -> int:
    """Bytes of the weights of an export, before each is padded to a page.

    1. Every parameter of the model, tied ones once.
    2. A head that is split off the embedding that it is tied to, as an adapter changes or replaces it alone.
    3. Of an encoder-decoder, the embedding that encoder and decoder share, which each has in its own file.
    4. A linear map that is quantized, its integers and scales; of a head tied to an embedding, beside the floats.
    5. The linear layers of an embedding of texts, in float32.

    Of a graph that was given, the bytes of its files.

    Raises:
        InputRefused: An adapter changes what several embeddings share.
    """
    if plan.given_graph is not None:
        return plan.given_graph.n_bytes
    if len(graphs_of(plan.task)) > 1:
        refuse_changed_embedding(resolved)
    item = 4 if plan.dtype == "float32" else 2
    shapes, aliases = resolved.parameters.shapes, resolved.parameters.aliases
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    stored = planned_sizes(plan, resolved, choice)
    is_table = {path: any(other not in stored for other in aliases.get(path, (path,))) for path in stored}
    sizes = {path: size for path, size in sizes.items() if path not in stored or is_table[path]}
    total = sum({aliases.get(path, (path,)): size for path, size in sizes.items()}.values())
    split = {f"{module}.weight" for module in untied_modules(resolved)}
    if plan.request.mode == "dynamic":
        split |= {path for path in choice.parameters if len(aliases.get(path, ())) > 1}
    total += sum(sizes.get(path, 0) for path in split)
    if plan.task in SEQ2SEQ:
        total += max((size for path, size in sizes.items() if _is_shared(aliases.get(path, ()))), default=0)
    integers = {aliases.get(path, (path,)): size for path, size in stored.items()}
    return item * total + sum(integers.values()) + (0 if plan.head is None else plan.head.n_bytes)


def _is_shared(paths: Sequence[str]) -> bool:
    """Whether the encoder and another part of the model read one tensor; Whisper's encoder has no embedding."""
    of_encoder = [".encoder." in f".{path}" for path in paths]
    return any(of_encoder) and not all(of_encoder)


class Meter:
    """Counts written bytes for the progress display."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, name: str, n_bytes: int) -> None:
        self._done += n_bytes
        self._progress("writing weights", self._done, self._total)
