"""The exported graphs' contracts: their inputs, their outputs, and the optional inputs that carry adapters.

Most tasks export one graph, `model`. Encoder-decoder tasks export three, named as Optimum names them: the encoder, the
decoder's first step, which also makes the cross-attention's keys and values, and its later steps, which read them.

Written into the manifest by an export; pack, check, the runtime and `add` read it from there and nowhere else.
Standard library only: a host without torch, onnx or PEFT reads it too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

Dim = int | str

# Stems of the graphs' files.
SINGLE = "model"
ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"


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
    """What an adapter input holds; the shape each kind has is given with it."""

    # [rows, in_features, rank]; of an embedding [rows, vocabulary, rank], of a convolution in_channels·∏kernel features
    LORA_A = "lora_A"
    LORA_B = "lora_B"  # [rows, rank, out_features], the scale (and DoRA's gain) folded in
    GAIN = "lora_magnitude"  # [rows, 1, out_features], DoRA's m / ‖W + s·B·A‖, which multiplies W x
    WEIGHT = "weight"  # [rows, in_features, out_features], a whole replaced Linear
    BIAS = "bias"  # [rows, 1, out_features], in place of the module's own
    TOKEN_IDS = "token_ids"  # [rows, n_tokens], int64, tokens whose embedding changes; -1 is none
    TOKEN_DELTA = "token_delta"  # [rows, n_tokens, embedding_dim], what is added to it
    GATE = "lora_gate"  # [rows, sequence or 1, 1], which multiplies x A of gated modules: 1 active, 0 not


# The one gate of a graph: an adapter is active for the same tokens in all its modules.
GATE_INPUT = str(AdapterInputKind.GATE)


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
    """One optional input `[rows, …]` of a dynamic graph; `rows` is 1 or the batch size.

    Attributes:
        name: The input's name, `<module>.lora_A.weight` and so on.
        module: The path of the module in the base model, the name that PEFT uses; empty for the gate, which is for all.
        default: The stored default of a replaced Linear or bias; None where it is a constant: a pair of rank 0, a gain
            or gate of 1, no tokens, zeros as the bias of a module without one.
        base_has_default: Whether the default is the base checkpoint's own tensor; False when the checkpoint has no
            such tensor (an encoder without a head) and the default is zeros.
    """

    name: str
    module: str
    kind: AdapterInputKind
    dtype: str
    dims: tuple[Dim, ...]
    default: StoredDefault | None = None
    base_has_default: bool = True


@dataclass(frozen=True)
class GraphContract:
    """Everything a host must know to run one graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    adapter_inputs: tuple[AdapterInput, ...] = ()

    def of_module(self, module: str) -> dict[AdapterInputKind, AdapterInput]:
        """The adapter inputs of `module` by kind; empty if the graph has none there."""
        return {entry.kind: entry for entry in self.adapter_inputs if entry.module == module}

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that adapters may touch, in graph order, each once."""
        return tuple(dict.fromkeys(entry.module for entry in self.adapter_inputs if entry.module))

    @property
    def gate(self) -> AdapterInput | None:
        """The gate; None where every adapter is active for all tokens."""
        return next((entry for entry in self.adapter_inputs if entry.kind is AdapterInputKind.GATE), None)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> GraphContract:
        def spec(entry: dict) -> TensorSpec:
            return TensorSpec(entry["name"], entry["dtype"], tuple(entry["dims"]))

        def adapter_input(entry: dict) -> AdapterInput:
            stored = entry["default"]
            default = stored and StoredDefault(tuple(stored["shape"]), stored["offset"], stored["length"])
            return AdapterInput(
                entry["name"],
                entry["module"],
                AdapterInputKind(entry["kind"]),
                entry["dtype"],
                tuple(entry["dims"]),
                default,
                entry["base_has_default"],
            )

        return cls(
            tuple(map(spec, fields["inputs"])),
            tuple(map(spec, fields["outputs"])),
            tuple(map(adapter_input, fields["adapter_inputs"])),
        )
