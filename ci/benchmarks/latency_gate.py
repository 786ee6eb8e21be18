"""Benchmark: the latency gate itself. How often it fails equal graphs, and how often it finds a real slowdown.

    taskset -c 1 python ci/benchmarks/latency_gate.py --work /tmp/bench

One run is one measurement as `lora-export bench` makes it, through its own code, with an allowance of 1.02. In an
equal run one export is opened twice, so a FAIL is a false alarm. In a slowed run it is opened three times, as it is and
with 5 % and 10 % added: a FAIL is right. A slowdown is a busy wait behind each run of ONNX Runtime, of that share of
the processor's time that this very run took: of the clock's time, it would grow with whatever else wants the core. What
it is compared with is wrapped too, and waits for nothing. What simpler methods say of the same samples is recorded
beside it.

Every block ratio is kept, in ten thousandths. Run it pinned to a core, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import onnxruntime as ort
from naive_methods import verdicts as naive_verdicts
from random_models import LlamaShape, write_adapter, write_llama
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, provenance, table, target_table, write_json

from lora_export.artifact import read_manifest
from lora_export.bench.intervals import paired_ratio
from lora_export.bench.latency import ROUNDS, Candidate, Comparison, Race, measure
from lora_export.bench.results import Variant
from lora_export.bench.warm_up import RULE
from lora_export.bench.workloads import workload_inputs
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.verdict import Verdict

_MODEL = LlamaShape(2, 256, 704, heads=4, kv_heads=4, head_dim=64, vocab=1000, dtype="float32")
_SHAPE = (1, 16, 0)
_ALLOWANCE = 1.02
_BASE, _EQUAL = "base", "equal"
_SLOWDOWNS = {"5 % slower": 0.05, "10 % slower": 0.10}  # the share of a run's time that is added
_DETECTED = {"5 % slower": 0.98, "10 % slower": 1.0}  # targets: the least share of runs that FAIL
_MOST_FALSE_ALARMS = 0.01
_WRITE_EVERY = 10


class _Slowed:
    """An ONNX Runtime session whose runs take `share` longer, by a busy wait in proportion to each run's own time.

    Pinned to one core, ONNX Runtime runs in the thread that calls it, and that thread's time is the run's.
    """

    def __init__(self, session: ort.InferenceSession, share: float) -> None:
        self._session, self._share = session, share
        self.get_inputs, self.get_outputs, self.io_binding = session.get_inputs, session.get_outputs, session.io_binding

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        start = time.thread_time()
        self._session.run_with_iobinding(binding)
        now = time.thread_time()
        end = now + self._share * (now - start)
        while time.thread_time() < end:
            pass


def open_slowed(folder: Path, share: float) -> AdapterSession:
    """A session of the export whose runs take `share` longer."""
    opened = AdapterSession(folder, "cpu", stop_spinning=True)
    opened.runs = opened.runs.on(_Slowed(opened.session, share))
    return opened


@dataclass(frozen=True)
class Outcome:
    """One candidate of one run: the gate's verdict with what it is from, and whether each other method fails it.

    Attributes:
        candidate: "equal", or by how much it was slowed.
        warm_ups_cut: Warm-ups of the run that ended unsettled.
    """

    run: int
    candidate: str
    verdict: str
    median: float
    low: float
    high: float
    block_ratios: tuple[float, ...]
    others: Mapping[str, bool]
    warm_ups_cut: int


def one_run(folder: Path, number: int, shares: Mapping[str, float], blocks: int) -> list[Outcome]:
    """Measure as `bench` does: the export, and again with each of the `shares` added; just twice if there are none."""
    if shares:
        openers = {name: partial(open_slowed, folder, share) for name, share in {_BASE: 0.0, **shares}.items()}
    else:
        openers = dict.fromkeys((_BASE, _EQUAL), partial(AdapterSession, folder, "cpu", stop_spinning=True))
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    inputs = workload_inputs(read_manifest(folder).graphs, vocabulary, _SHAPE)
    candidates = [Candidate(name, name, name) for name in openers]
    comparisons = [Comparison(name, _BASE, _ALLOWANCE) for name in openers if name != _BASE]
    race = Race(_SHAPE, dict.fromkeys(openers, inputs), candidates, comparisons)
    (workload,) = measure(openers, [race], blocks=blocks)
    base, *others = workload.variants
    said = {each.name: other_methods(base, each) for each in others}
    cut = sum(not warm.settled for variant in workload.variants for warm in variant.warm_ups)
    return [
        Outcome(number, ratio.variant, str(ratio.verdict), ratio.median, ratio.low, ratio.high, ratio.block_ratios,
                said[ratio.variant], cut)
        for ratio in workload.ratios
    ]  # fmt: skip


def other_methods(base: Variant, variant: Variant) -> dict[str, bool]:
    """Whether each method other than the gate fails `variant`, on the same samples."""
    of_means = (replace(each, fastest_ms=each.samples_ms) for each in (variant, base))
    found = {"paired blocks of means": paired_ratio(*of_means, _ALLOWANCE).verdict is Verdict.FAIL}
    found |= naive_verdicts(base.samples_ms, variant.samples_ms, "means")
    return found | naive_verdicts(base.fastest_ms, variant.fastest_ms, "fastest runs")


def export_model(work: Path) -> Path:
    """A small random decoder with an adapter folded in; a run takes under a millisecond on one core."""
    base = write_llama(work / "gate" / "base", _MODEL)
    adapter = write_adapter(base.parent / "adapter", _MODEL.linears(), rank=8, base=base, task_type="CAUSAL_LM", seed=0)
    request = Request(str(base), ((str(adapter), None),), "merge", "text-generation", "float32", "cpu")
    export(request, ExportOptions(base.parent / "export", overwrite=True))
    return base.parent / "export"


def of(candidate: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.candidate == candidate]


def find_targets(outcomes: Sequence[Outcome]) -> list[Target]:
    """False alarms of equal graphs, and the detection of each slowdown."""
    found = []
    for candidate, least in {_EQUAL: None, **_DETECTED}.items():
        tried = of(candidate, outcomes)
        n_failed = sum(outcome.verdict == Verdict.FAIL for outcome in tried)
        share, most = n_failed / len(tried), _MOST_FALSE_ALARMS if least is None else 1.0
        met = share <= most and (least is None or share >= least)
        name = "false alarms: equal and FAIL" if least is None else f"detection: {candidate} and FAIL"
        detail = f"{n_failed} of {len(tried)} runs"
        found.append(Target(name, share, most, detail, "pass" if met else "fail", least))
    return found


def method_shares(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """By method, the share of runs that it fails for each candidate."""
    found: dict[str, dict[str, float]] = {}
    for candidate in (_EQUAL, *_DETECTED):
        tried = of(candidate, outcomes)
        gate = {"paired blocks of fastest runs (the gate)": sum(o.verdict == Verdict.FAIL for o in tried)}
        others = {method: sum(o.others[method] for o in tried) for method in tried[0].others}
        for method, n_failed in (gate | others).items():
            found.setdefault(method, {})[candidate] = n_failed / len(tried)
    return found


def to_json(environment: dict, blocks: int, outcomes: Sequence[Outcome], targets: Sequence[Target]) -> dict:
    """The results as JSON values; the ratios of a run are one line of ten thousandths."""
    raw = [
        f"{o.run} {o.candidate}: {o.verdict}; {' '.join(str(round(ratio * 1e4)) for ratio in o.block_ratios)}"
        for o in outcomes
    ]
    settings = {"allowance": _ALLOWANCE, "blocks": blocks, "rounds": ROUNDS, "warm-up": RULE}
    workload = {"model": asdict(_MODEL), "batch, sequence, past": " ".join(map(str, _SHAPE))}
    candidates = (_EQUAL, *_DETECTED)
    counts = {name: dict(Counter(outcome.verdict for outcome in of(name, outcomes))) for name in candidates}
    unsettled = sum({outcome.run: outcome.warm_ups_cut for outcome in outcomes}.values())
    head = {"benchmark": "latency gate", "environment": environment, "settings": settings | workload}
    summary = {"verdicts": counts, "share_failed_by_method": method_shares(outcomes), "warm_ups_cut": unsettled}
    shown = {"targets": [asdict(target) for target in targets]}
    return head | summary | shown | {"block_ratios_in_ten_thousandths": raw}


def markdown(environment: dict, outcomes: Sequence[Outcome], targets: Sequence[Target]) -> str:
    """The results as Markdown."""
    candidates = (_EQUAL, *_DETECTED)
    rows = [
        (method, *(f"{100 * shares[name]:.1f} %" for name in candidates))
        for method, shares in method_shares(outcomes).items()
    ]
    columns = ("method: share of runs that it fails", *candidates)
    return "\n\n".join([heading(environment), table(columns, rows), target_table(targets)])


_IN_README = (
    "paired blocks of fastest runs (the gate)",
    "paired blocks of means",
    "Mann-Whitney p < .05, means one after the other",
    "medians differ by 5 %, means one after the other",
)


def readme_table(found: dict) -> str:
    """From what the JSON holds: by method the share of runs that it fails, and what the gate left undecided."""
    candidates = (_EQUAL, *_DETECTED)
    shares = found["share_failed_by_method"]
    rows = [(name, *(f"{100 * shares[name][each]:.0f} %" for each in candidates)) for name in _IN_README]
    runs = {each: sum(found["verdicts"][each].values()) for each in candidates}
    undecided = ", ".join(f"{found['verdicts'][each].get('ambiguous', 0)} of {runs[each]}" for each in candidates)
    return table(("fails of runs that are", *candidates), rows) + f"\n\nThe gate left undecided: {undecided}.\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for the model and its export")
    parser.add_argument("--export", type=Path, help="time this export instead of a small random decoder's")
    parser.add_argument("--equal", type=int, default=200, help="runs with equal graphs")
    parser.add_argument("--slowed", type=int, default=100, help="runs with slowed graphs")
    parser.add_argument("--blocks", type=int, default=30, help="ABBA blocks of a run")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency-gate.json")
    return parser.parse_args()


def schedule(n_equal: int, n_slowed: int) -> list[Mapping[str, float]]:
    """What each run adds to the export, both kinds spread evenly: a machine that changes meanwhile changes for both."""
    order = [((number + 0.5) / n_equal, {}) for number in range(n_equal)]
    order += [((number + 0.5) / n_slowed, _SLOWDOWNS) for number in range(n_slowed)]
    return [shares for _, shares in sorted(order, key=lambda entry: entry[0])]


def main() -> int:
    """Measure, write the JSON, print the Markdown; 1 if a target is missed."""
    args = _arguments()
    environment = provenance()
    folder = args.export or export_model(args.work.resolve())
    planned, outcomes, started = schedule(args.equal, args.slowed), [], time.monotonic()
    for number, shares in enumerate(planned, 1):
        outcomes += one_run(folder, number, shares, args.blocks)
        if {outcome.candidate for outcome in outcomes} != {_EQUAL, *_SLOWDOWNS}:
            continue
        if number % _WRITE_EVERY == 0 or number == len(planned):
            # Now and then: an interrupted benchmark keeps what it has found.
            targets = find_targets(outcomes)
            write_json(args.out, to_json(environment, args.blocks, outcomes, targets))
            found = "; ".join(f"{target.name}: {target.detail}" for target in targets)
            seconds = (time.monotonic() - started) / number
            print(f"{number} of {len(planned)} at {seconds:.1f} s: {found}", file=sys.stderr, flush=True)
    print(markdown(environment, outcomes, targets))
    if args.out == RESULTS / "latency-gate.json":
        write_into_readme("latency_gate", readme_table(json.loads(args.out.read_text(encoding="utf-8"))))
    return int(any(target.verdict == "fail" for target in targets))


if __name__ == "__main__":
    sys.exit(main())
