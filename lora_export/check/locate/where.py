"""Where an export differs: the error by layer, and the first diverging node of the first failing case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_export.check.divergence_results import ComparedValue, Divergence, LayerErrors
from lora_export.check.judge.tolerances import Tolerances
from lora_export.check.locate.divergence import locate
from lora_export.check.locate.probe import Probe, Seen, look
from lora_export.check.locate.reproduction import reproduction
from lora_export.check.results import ParityCase


@dataclass
class Where:
    """Collects, while the cases run.

    Attributes:
        limits: The check's tolerances: what is rounding in the outputs is rounding inside.
        folder: The export under check.
    """

    limits: Tolerances
    folder: Path
    layers: list[LayerErrors] = field(default_factory=list)
    divergence: Divergence | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        return self.limits.features

    def measure(self, name: str, case: ParityCase, probes: Iterable[Probe]) -> None:
        """Take the error by layer of adapter `name` on the first probe, and the first failing case's divergence.

        Args:
            probes: Ways to look at the case's worst row, the cheapest first; made when they are needed.
        """
        probes = iter(probes)
        seen = look(next(probes), self.limit)
        self.layers.append(seen.layer_errors(name))
        self._locate(case, seen, probes)

    def find(self, case: ParityCase, probes: Callable[[], Iterable[Probe]]) -> None:
        """Take the divergence, if `case` is the first that fails."""
        if case.passed or self.divergence is not None:
            return
        probes = iter(probes())
        self._locate(case, look(next(probes), self.limit), probes)

    def cannot(self, case: ParityCase, why: str) -> None:
        """Say why a failing case is not looked into, if it is the first that fails."""
        if not case.passed and self.divergence is None:
            self.divergence = Divergence(case.name, "", self.limit, why)

    def _locate(self, case: ParityCase, seen: Seen, more: Iterable[Probe]) -> None:
        if case.passed or self.divergence is not None:
            return
        last = seen
        for last in itertools.chain([seen], (look(probe, self.limit) for probe in more)):
            if last.differs:
                break
        else:
            worst = last.layer_errors("").worst
            self.divergence = Divergence(case.name, last.probe.described, self.limit, _nothing(case, worst))
            return
        self.divergence = self._reproduced(locate(last, case.name), last)

    def _reproduced(self, divergence: Divergence, seen: Seen) -> Divergence:
        differing = [graph for graph in seen.graphs if any(output.diverges for output in graph.outputs)]
        graph = next((graph for graph in differing if graph.stem == divergence.graph), differing[0])
        is_this = graph.run.session.folder.resolve() == self.folder.resolve()
        limit = self.limits.features if self.limits.error is None else self.limits.error
        made = reproduction(graph, divergence, limit, is_this_export=is_this)
        if made is None:
            return divergence
        shown, self.files = made
        return replace(divergence, reproduction=shown)


def _nothing(case: ParityCase, worst: ComparedValue | None) -> str:
    largest = "" if worst is None else f" (largest relative error {worst.error_relative:.1e}, {worst.module})"
    return (
        f"On the row with the largest error every module agrees with PyTorch{largest}, with intermediate values as "
        f"outputs of the graph; the case failed because {'; '.join(case.failures)}."
    )
