"""Where an export and its reference agree and where they part, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

# Names of the files that reproduce a failure.
SCRIPT, ARRAYS = "reproduce.py", "reproduce.npz"


@dataclass(frozen=True)
class ComparedValue:
    """One value of the graph against the tensor of PyTorch that it should hold, on one row.

    Attributes:
        graph: The graph's stem ("model", "encoder_model", …).
        module: The module's path in the base.
        what: "input" or "output" of the module, "base" (its output before the adapter), "lora_A" or "lora_B" (the
            products of its pair), "logits" and the like for an output of the model.
        value: The value's name in the graph.
        node, op_type: The node that gives it; empty for an input of the graph.
        exported_shape, reference_shape: As they are, before either is brought to the other's.
        error: Largest absolute difference over real positions; NaN where one side has numbers that are not finite,
            infinite where the sizes differ.
        error_relative: `error` over the largest absolute reference value.
        diverges: Whether that is more than rounding.
    """

    graph: str
    module: str
    what: str
    value: str
    node: str
    op_type: str
    exported_shape: tuple[int, ...]
    reference_shape: tuple[int, ...]
    error: float
    error_relative: float
    diverges: bool


@dataclass(frozen=True)
class LayerErrors:
    """The error of each module's output on one real row, in the order in which PyTorch computes them.

    Attributes:
        name: The adapter, the sum of adapters, or "base".
        row: Which row, in words.
        modules: The outputs (`what` is "output").
        not_seen: Modules with weights that the run calls and whose output is no value of the graph.
    """

    name: str
    row: str
    modules: tuple[ComparedValue, ...]
    not_seen: tuple[str, ...] = ()

    @property
    def worst(self) -> ComparedValue | None:
        """The output with the largest relative error; one that is NaN counts as larger than all."""
        finite = max(self.modules, key=lambda module: module.error_relative, default=None)
        return next((module for module in self.modules if module.error_relative != module.error_relative), finite)


@dataclass(frozen=True)
class Reproduction:
    """The files that show the difference without PyTorch, and what they show.

    Attributes:
        script, arrays: Paths relative to the export.
        output: The output that is compared.
        error: Largest absolute difference, as the script prints it.
        tolerance: What it may be, in the same units.
    """

    script: str
    arrays: str
    output: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class Divergence:
    """Where the first failing case parts from PyTorch.

    Attributes:
        case: The case's name.
        row: What was run, in words.
        limit: What `error_relative` may be and still be rounding.
        sentence: The finding, in one sentence; where nothing was found, why.
        graph, module, node, op_type, value: The first diverging node, the module that it belongs to in PyTorch, and the
            node's output; empty where nothing was found.
        reads: What the node reads.
        agreed: The last values before it that agree.
        between: How many nodes lie between those and the first value that is known to differ, itself counted; 1 where
            the node is known, 0 where nothing was found.
        compared: The intermediate tensors around it, in the order in which PyTorch computes them.
    """

    case: str
    row: str
    limit: float
    sentence: str
    graph: str = ""
    module: str = ""
    node: str = ""
    op_type: str = ""
    value: str = ""
    reads: tuple[str, ...] = ()
    agreed: tuple[str, ...] = ()
    between: int = 0
    compared: tuple[ComparedValue, ...] = ()
    reproduction: Reproduction | None = None

    @property
    def found(self) -> bool:
        return bool(self.node)
