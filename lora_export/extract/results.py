"""What `extract` found, as frozen values. Renderers only read them."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModuleResult:
    """One LoRA pair.

    Attributes:
        shape: Of the weight, as stored.
        rank: Of the pair; `full_rank` is the most that it could have.
        norm: `‖ΔW‖_F`.
        error: `‖ΔW − BA‖_F / ‖ΔW‖_F`, measured on the factors as stored.
        curve: Relative error for rank 0, 1, …, as far as singular values are known; where all are, not below the
            rounding of float32, measured on the factors of full rank.
        complete: Whether all singular values are known.
    """

    module: str
    kind: str  # "linear" or "embeddings"
    shape: tuple[int, int]
    rank: int
    full_rank: int
    norm: float
    error: float
    curve: tuple[float, ...]
    complete: bool

    def error_at(self, rank: int) -> float:
        """The relative error at `rank`, at most the last one known."""
        return self.curve[min(rank, len(self.curve) - 1)]


@dataclass(frozen=True)
class WholeResult:
    """A module saved whole."""

    module: str
    why: str
    n_elements: int


@dataclass(frozen=True)
class LeftOut:
    """A parameter that differs and stays the base's: `change` is `‖ΔW‖_F / ‖W0‖_F`, None of a base's zeros."""

    parameter: str
    kind: str
    change: float | None


@dataclass(frozen=True)
class ExtractReport:
    """Everything `extract` found.

    Attributes:
        asked: The rank or the energy that was asked for.
        base, tuned: Folders, and their sha256 by file name.
        wholes: Modules saved whole: exact.
        biases: Whether biases are carried beside the pairs: exact to float32.
        n_equal: Tensors that do not differ.
    """

    folder: str
    asked: str
    task: str
    base: str
    tuned: str
    sha256: dict[str, dict[str, str]]
    modules: tuple[ModuleResult, ...]
    wholes: tuple[WholeResult, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    biases: bool
    n_equal: int
    n_tensors: int
    n_parameters: int
    n_parameters_tuned: int
    n_bytes: int
    n_bytes_tuned: int
    versions: dict[str, str]
    started_at: str  # ISO 8601, UTC
    seconds: float
    schema: int = 1

    @property
    def error(self) -> float:
        """The relative error over all pairs together: `sqrt(Σ‖ΔW − BA‖²) / sqrt(Σ‖ΔW‖²)`."""
        total = math.fsum(module.norm**2 for module in self.modules)
        remaining = math.fsum((module.error * module.norm) ** 2 for module in self.modules)
        return math.sqrt(remaining / total) if total else 0.0

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks at which every module's curve is known, or that are its full rank: 0 to the last such one."""
        most = max((len(module.curve) - 1 for module in self.modules), default=0)
        known = min((len(m.curve) - 1 for m in self.modules if not m.complete), default=most)
        return tuple(range(known + 1))

    def median_curve(self) -> tuple[float, ...]:
        """The median over modules of the relative error, at `ranks`."""
        return tuple(statistics.median(module.error_at(rank) for module in self.modules) for rank in self.ranks)

    def worst_curve(self) -> tuple[float, ...]:
        """The largest over modules of the relative error, at `ranks`."""
        return tuple(max(module.error_at(rank) for module in self.modules) for rank in self.ranks)

    def to_dict(self) -> dict:
        curves = {"rank": self.ranks, "median": (), "worst": ()}
        if self.modules:
            curves |= {"median": self.median_curve(), "worst": self.worst_curve()}
        return asdict(self) | {"report": "extract", "error": self.error, "curves": curves}
