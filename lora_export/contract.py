"""The exported graphs' contracts: their inputs, their outputs, and the optional inputs that carry adapters.

Most tasks export one graph, `model`. Encoder-decoder tasks export three, named as Optimum names them: the encoder, the
decoder's first step, which also makes the cross-attention's keys and values, and its later steps, which read them.

Written into the manifest by an export; pack, check, the runtime and `add` read it from there and nowhere else.
Standard library only: a host without torch, onnx or PEFT reads it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property

from lora_export.packed import PackedPart

Dim = int | str

# Stems of the graphs' files.
SINGLE = "model"
ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"

# What the names of a cache's inputs begin with, and its outputs': `past_key_values.{i}.key` → `present.{i}.key`.
PAST, PRESENT = "past_key_values.", "present."


def present_of(past: str) -> str:
    """The output that is the cache input `past` after a run."""
    return PRESENT + past.removeprefix(PAST)


def graph_file(graph: str) -> str:
    """The ONNX file of `graph`."""
    return f"{graph}.onnx"


def data_file(graph: str) -> str:
    """The file that holds the weights of `graph`; the decoder's two graphs share theirs."""
    return f"{DECODER if graph == DECODER_WITH_PAST else graph}.onnx.data"


def adapter_file(adapter: str, graph: str) -> str:
    """The name of the file that `adapter` has for `graph`."""
    return f"{adapter}.onnx_adapter" if graph == SINGLE else f"{adapter}.{graph}.onnx_adapter"


class AdapterInputKind(StrEnum):
    """What an adapter input holds; `ADAPTER_INPUT_KINDS` has all else that is known of each."""

    LORA_A = "lora_A"
    LORA_B = "lora_B"
    GAIN = "lora_magnitude"
    WEIGHT = "weight"
    BIAS = "bias"
    TOKEN_IDS = "token_ids"
    TOKEN_DELTA = "token_delta"
    GATE = "lora_gate"


class Default(StrEnum):
    """What an input is where no adapter is fed. Each leaves the base as it is."""

    EMPTY = "empty"  # nothing along the kind's axis: rank 0, no tokens
    ONES = "ones"
    BASE = "base"  # the base's parameter of the input's name, stored; zeros for a module that has none
    BASE_TRANSPOSED = "base_transposed"  # likewise, `[out, in]` stored as `[in, out]`


class Blend(StrEnum):
    """What a row that runs adapters `k` with weights `w_k` is fed, of their tensors `b_k`."""

    CONCATENATE = "concatenate"  # [b_1 … b_n] along the kind's axis
    CONCATENATE_WEIGHTED = "concatenate_weighted"  # [w_1 b_1 … w_n b_n] along the kind's axis
    # b_0 + Σ w_k (b_k − b_0), b_0 the default: Ilharco et al., Task Arithmetic (arXiv 2212.04089), section 2
    TASK_VECTORS = "task_vectors"
    FROM_PROMPT = "from_prompt"  # no adapter brings it: the host makes it of the prompt's tokens


ROWS, GATE_LENGTH = "rows", "gate_length"
LOWEST = float("-inf")  # stands for the lowest finite number of a dtype: a padded class never wins


@dataclass(frozen=True)
class KindSpec:
    """All that is known of a kind of adapter input, whichever module and graph has it.

    Attributes:
        dims: Sizes, and names of axes.
        suffix: Of the input's name, `<module>.<suffix>`; the whole name of one that belongs to no module.
        axis: Where adapters differ in size, so that rows are padded with `fill`; None where they do not.
        dtype: None for the dtype of the graph.
        companions: What an adapter must bring beside it, where the module takes it.
        served: What of an adapter it serves, in the words of a refusal; empty for what a companion names.
    """

    kind: AdapterInputKind
    suffix: str
    dims: tuple[Dim, ...]
    default: Default
    blend: Blend
    axis: int | None = None
    fill: float = 0
    dtype: str | None = None
    companions: tuple[AdapterInputKind, ...] = ()
    served: str = ""

    @property
    def is_stored(self) -> bool:
        """Whether the default is a tensor of the base in the graph's data file."""
        return self.default in (Default.BASE, Default.BASE_TRANSPOSED)

    def name(self, module: str) -> str:
        """The input's name; for a stored default also the path of the base's parameter that it takes the place of."""
        return f"{module}.{self.suffix}" if module else self.suffix

    def dims_of(self, module: str, sizes: Mapping[str, int]) -> tuple[Dim, ...]:
        """The dims of the input of `module`, with the `sizes` that the module decides; other axes are symbols."""
        # Each module has its own: adapters differ in rank by module, and ONNX Runtime reuses buffers by symbol.
        symbol = {dim: f"{module}.{dim}" if module and dim != ROWS else dim for dim in self.dims}
        return tuple(dim if isinstance(dim, int) else sizes.get(dim, symbol[dim]) for dim in self.dims)

    def constant(self, dims: tuple[Dim, ...]) -> tuple[tuple[Dim, ...], int]:
        """Shape and number of the default of an input of `dims`, where it is not stored; of one stored, its zeros."""
        sizes = [1 if dim in (ROWS, GATE_LENGTH) else dim for dim in dims]
        if self.default is Default.EMPTY:
            sizes[self.axis] = 0
        return tuple(sizes), int(self.default is Default.ONES)


_K, _D, _B = AdapterInputKind, Default, Blend
# An embedding's in_features are its vocabulary, a convolution's in_channels·∏kernel. B has the scale folded in, and
# DoRA's gain m / ‖W + s·B·A‖, which by itself multiplies W x. The gate multiplies x A, 1 where the adapter is active;
# a graph has one, as an adapter is active for the same tokens in all its modules. A token id of -1 is none.
ADAPTER_INPUT_KINDS = (
    KindSpec(_K.LORA_A, "lora_A.weight", (ROWS, "in_features", "rank"), _D.EMPTY, _B.CONCATENATE, axis=2,
             companions=(_K.LORA_B,), served="pairs on linear modules and embeddings"),
    KindSpec(_K.LORA_B, "lora_B.weight", (ROWS, "rank", "out_features"), _D.EMPTY, _B.CONCATENATE_WEIGHTED, axis=1,
             companions=(_K.LORA_A,)),
    KindSpec(_K.GAIN, "lora_magnitude", (ROWS, 1, "out_features"), _D.ONES, _B.TASK_VECTORS),
    KindSpec(_K.WEIGHT, "weight", (ROWS, "in_features", "out_features"), _D.BASE_TRANSPOSED, _B.TASK_VECTORS, axis=2,
             companions=(_K.BIAS,), served="replaced Linear modules"),
    KindSpec(_K.BIAS, "bias", (ROWS, 1, "out_features"), _D.BASE, _B.TASK_VECTORS, axis=2, fill=LOWEST,
             served="biases"),
    KindSpec(_K.TOKEN_IDS, "token_ids", (ROWS, "n_tokens"), _D.EMPTY, _B.CONCATENATE, axis=1, fill=-1, dtype="int64",
             companions=(_K.TOKEN_DELTA,), served="token rows"),
    KindSpec(_K.TOKEN_DELTA, "token_delta", (ROWS, "n_tokens", "embedding_dim"), _D.EMPTY, _B.CONCATENATE_WEIGHTED,
             axis=1, companions=(_K.TOKEN_IDS,)),
    KindSpec(_K.GATE, "lora_gate", (ROWS, GATE_LENGTH, 1), _D.ONES, _B.FROM_PROMPT),
)  # fmt: skip
GATE_INPUT = str(AdapterInputKind.GATE)
# For how many of the last tokens a decoder gives logits, int64, a scalar; 0, the default, for all.
LOGITS_TO_KEEP = "num_logits_to_keep"


def spec_of(kind: AdapterInputKind) -> KindSpec:
    """The table's entry of `kind`."""
    return next(spec for spec in ADAPTER_INPUT_KINDS if spec.kind is kind)


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output: `dims` are sizes, or names of sizes that vary; `dtype` as NumPy spells it."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class StoredDefault:
    """Where the default of an adapter input lies in its graph's data file: byte `offset` and `length`."""

    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class AdapterInput:
    """One input `[rows, …]` of a dynamic graph, optional unless its contract says otherwise; `rows`: 1 or the batch.

    Attributes:
        module: The path of the module in the base model, the name that PEFT uses; empty for the gate, which is for all.
        default: The stored default; None where it is a constant, such as zeros for the bias of a module without one.
        base_has_default: False where the checkpoint lacks the tensor of a stored default (an encoder without a head).
        parts: The modules that share a pair, whose common name is `module`; empty where it is one module's own. A has
            the columns of all, B is block-diagonal.
    """

    name: str
    module: str
    kind: AdapterInputKind
    dtype: str
    dims: tuple[Dim, ...]
    default: StoredDefault | None = None
    base_has_default: bool = True
    parts: tuple[PackedPart, ...] = ()

    @property
    def spec(self) -> KindSpec:
        return spec_of(self.kind)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules it serves; none for the gate."""
        return tuple(part.module for part in self.parts) or ((self.module,) if self.module else ())


class CacheLayout(StrEnum):
    """Where a decoder's cache `[batch, heads, slots, size]` keeps a token's keys and values."""

    # Slot k is column k of the attention mask. Any number of rows goes on with any number of new tokens.
    COLUMNS = "columns"
    # A row's real tokens lie side by side from slot 0 on; what is in the slots after them means nothing. Past and
    # present may be one buffer with slots for more tokens than there are. Several rows at once run whole prompts, or go
    # on with one new token each; one row goes on with any number.
    TOKENS = "tokens"


@dataclass(frozen=True)
class GraphContract:
    """Everything a host must know to run one graph.

    Attributes:
        cache_layout: Of a decoder with a cache; None for other graphs, and in manifests from before there were two,
            which means COLUMNS.
        optional_inputs: Inputs that are no adapter's and have a default: LOGITS_TO_KEEP.
        adapter_inputs_required: The graph has no defaults of its own: a host feeds every adapter input in every run,
            its default where no adapter is. For hosts that cannot feed optional inputs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    adapter_inputs: tuple[AdapterInput, ...] = ()
    cache_layout: CacheLayout | None = None
    optional_inputs: tuple[TensorSpec, ...] = ()
    adapter_inputs_required: bool = False

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """The inputs that take the cache; none for a graph without one."""
        return tuple(spec for spec in self.inputs if spec.name.startswith(PAST))

    def of_module(self, module: str) -> dict[AdapterInputKind, AdapterInput]:
        """The adapter inputs of `module` by kind; empty if the graph has none there."""
        return dict(self._by_module.get(module, {}))

    @cached_property
    def _by_module(self) -> dict[str, dict[AdapterInputKind, AdapterInput]]:
        found: dict[str, dict[AdapterInputKind, AdapterInput]] = {}
        for entry in self.adapter_inputs:
            for module in {entry.module, *entry.modules}:
                found.setdefault(module, {})[entry.kind] = entry
        return found

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that adapters may touch, in graph order, each once."""
        return tuple(dict.fromkeys(module for entry in self.adapter_inputs for module in entry.modules))

    @property
    def gate(self) -> AdapterInput | None:
        """The gate; None where every adapter is active for all tokens."""
        return next((entry for entry in self.adapter_inputs if entry.kind is AdapterInputKind.GATE), None)

    def to_dict(self) -> dict:
        fields = asdict(self)
        for entry in fields["adapter_inputs"]:
            if not entry["parts"]:
                del entry["parts"]  # as before there were any
        return fields

    @classmethod
    def from_dict(cls, fields: dict) -> GraphContract:
        def spec(entry: dict) -> TensorSpec:
            return TensorSpec(entry["name"], entry["dtype"], tuple(entry["dims"]))

        def adapter_input(entry: dict) -> AdapterInput:
            stored = entry["default"]
            default = stored and StoredDefault(tuple(stored["shape"]), stored["offset"], stored["length"])
            what = AdapterInputKind(entry["kind"]), entry["dtype"], tuple(entry["dims"])
            parts = tuple(PackedPart(**part) for part in entry.get("parts", ()))
            return AdapterInput(entry["name"], entry["module"], *what, default, entry["base_has_default"], parts)

        return cls(
            tuple(map(spec, fields["inputs"])),
            tuple(map(spec, fields["outputs"])),
            tuple(map(adapter_input, fields["adapter_inputs"])),
            CacheLayout(fields["cache_layout"]) if fields.get("cache_layout") else None,
            tuple(map(spec, fields.get("optional_inputs", ()))),
            fields.get("adapter_inputs_required", False),
        )


def has_own_head(adapter_inputs: Iterable[AdapterInput]) -> bool:
    """Whether a base with these inputs answers by itself. An encoder's checkpoint has no classifier to do so with; that
    a module has no bias of its own is no lack."""
    return all(entry.base_has_default for entry in adapter_inputs if entry.kind is AdapterInputKind.WEIGHT)
