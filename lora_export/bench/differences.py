"""How far the outputs of this export and of the other lie apart on the same inputs: whether they are one model.

Two graphs of one model with the same adapter differ by rounding. The base and the served variant are both compared:
what another tool made of the base is near the one, what it made of the merged weights near the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_export.bench.budget import AGAINST
from lora_export.bench.latency import Candidate, Inputs, Race, Session, graph_session
from lora_export.bench.results import Difference
from lora_export.contract import GATE_INPUT
from lora_export.errors import InputRefused, LoraExportError
from lora_export.runtime.arrays import run_bound, to_ort_value
from lora_export.verdict import Verdict

# Above this share of the largest value, the graphs are of two models, or of other adapters.
LIKENESS = 0.01
Outputs = Mapping[str, np.ndarray]


def compared(race: Race) -> tuple[Candidate, ...]:
    """The candidates of a race whose outputs are compared with the other's: the base and the one of the ratio."""
    served = next(each.variant for each in race.comparisons if each.reference == AGAINST)
    return tuple(each for each in race.candidates if each.name in ("base", served))


def outputs_of(session: Session, candidate: Candidate, inputs: Inputs, *, where: str) -> Outputs:
    """All outputs of one run but the cache, by name.

    Raises:
        InputRefused: ONNX Runtime cannot run the graph on these inputs; `where` says which.
    """
    found: dict[str, np.ndarray] = {}
    for graph, feeds in inputs.items():
        single = graph_session(session, graph)
        names = [value.name for value in single.session.get_outputs() if not value.name.startswith("present")]
        own = {value.name for value in single.session.get_inputs()}
        binding = single.session.io_binding()
        for name in names:
            binding.bind_output(name)
        values = {name: to_ort_value(array, single.provider) for name, array in feeds.items() if name in own}
        if (gate := single.bank.required_gate) is not None:
            values.setdefault(GATE_INPUT, to_ort_value(gate, single.provider))
        single.bind_adapters(binding, candidate.adapters, len(next(iter(feeds.values()))))
        try:
            found |= run_bound(single.session, binding, values, names=names)
        except LoraExportError:
            raise
        except Exception as error:  # ONNX Runtime's have no base of their own
            raise InputRefused(
                "ONNX Runtime cannot run the graph on this bench's inputs",
                where=where,
                found=str(error),
                next_step="compare graphs of the same model; name shapes that both take (--shape)",
            ) from error
    return found


def difference(workload: str, variant: str, *, ours: Outputs, theirs: Outputs, allowance: float | None) -> Difference:
    """The largest difference of the outputs that both have; of the first of each where no name is the same."""
    shared = [(name, name) for name in ours if name in theirs] or [(next(iter(ours)), next(iter(theirs)))]
    largest, scale, names = None, None, []
    for own, other in shared:
        pair = _aligned(ours[own], theirs[other])
        if pair is None:
            continue
        here, there = (array.astype(np.float64) for array in pair)
        with np.errstate(invalid="ignore"):  # equal infinities
            error = np.where(here == there, 0.0, np.abs(here - there)).max(initial=0.0)
        names.append(own if own == other else f"{own} and {other}")
        largest = float(error if largest is None else np.maximum(largest, error))
        scale = max(scale or 0.0, float(np.abs(here).max(initial=0.0)))
    share = None if largest is None else largest / scale if scale else 0.0 if largest == 0 else np.inf
    return Difference(workload, variant, tuple(names), largest, share, allowance, _verdict(share, allowance))


def _aligned(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Both in one shape: of a graph that gives the last token only, that token of the other; None if they have none."""
    if ours.ndim == theirs.ndim == 3 and 1 in (ours.shape[1], theirs.shape[1]):
        ours, theirs = ours[:, -1:], theirs[:, -1:]
    return (ours, theirs) if ours.shape == theirs.shape else None


def _verdict(share: float | None, allowance: float | None) -> Verdict:
    if allowance is None:
        return Verdict.NOT_GATED
    # What cannot be compared keeps no allowance, and neither does NaN.
    return Verdict.PASS if share is not None and share <= allowance else Verdict.FAIL


def unlike(differences: Sequence[Difference]) -> tuple[str, ...]:
    """A note where the other graph is near none of the variants that it is compared with."""
    notes = []
    for workload in dict.fromkeys(each.workload for each in differences):
        found = [each for each in differences if each.workload == workload]
        if any(each.share is not None and each.share <= LIKENESS for each in found):
            continue
        shares = ", ".join(
            f"{each.variant} {'not comparable' if each.share is None else f'{each.share:.1%}'}" for each in found
        )
        notes.append(
            f"Another model? At {workload} the other's outputs differ from this export's by more than {LIKENESS:.0%} "
            f"of their largest value ({shares}): its latency may be that of other work."
        )
    return tuple(notes)
