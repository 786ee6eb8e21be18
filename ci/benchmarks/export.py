"""Benchmark: what an export takes, against the same job done with PEFT and Transformers' exporter, and against `cp`.

    python ci/benchmarks/export.py --work /tmp/bench --verify

Four jobs run in turn, `--repeat` times: this package with an empty graph cache ("cold"), with the graph that the cold
run cached ("cached"), the peer (`PeftModel.merge_and_unload`, `OnnxExporter`, save), and `cp` of the weight file. Every
run is an interpreter of its own, start and imports included. Inputs are in the page cache, outputs are deleted and
the disk is synchronized between runs. Ratios are taken within a round, so a slow minute slows both sides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from processes import run_measured
from random_models import LlamaShape, write_adapter, write_llama
from readme_tables import write_into_readme
from results import RESULTS, Target, heading, host_kind, provenance, table, target_table, write_json

_JOBS = {"cold": "ours, cold", "cached": "ours, cached graph", "peer": "peer", "cp": "cp of the weights"}
_SCRIPT = Path(__file__).with_name("export_jobs.py")
# The peer rounds merged weights to float16 as we do; what is left is the order of float16 sums in two fused graphs.
_AGREEMENT = 1e-2


@dataclass(frozen=True)
class Sample:
    """One run: wall seconds, peak anonymous bytes, bytes written, seconds by stage, 1-minute load before it."""

    job: str
    round: int
    seconds: float
    peak_bytes: int
    output_bytes: int
    n_memory_samples: int
    stages: dict[str, float]
    load_before: float


class Bench:
    """Runs jobs on one base and adapter under `work`."""

    def __init__(self, work: Path, shape: LlamaShape) -> None:
        name = "-".join(str(value) for value in asdict(shape).values())
        self._folder = work / f"llama-{name}"
        self.base = write_llama(self._folder / "base", shape)
        self.adapter = write_adapter(
            self._folder / "adapter", shape.linears(), rank=16, base=self.base, task_type="CAUSAL_LM", seed=1
        )

    def out(self, job: str) -> Path:
        return self._folder / f"out-{job}"

    def run(self, job: str, index: int) -> Sample:
        """Run `job` once; its output stays until `clear`."""
        cache = self._folder / "graph-cache"
        if job == "cold":
            shutil.rmtree(cache, ignore_errors=True)
        self.clear(job)
        os.sync()
        _read_through(self.base, self.adapter)
        load = os.getloadavg()[0]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "LORA_EXPORT_CACHE": str(cache)}
        usage = run_measured(self._command(job), os.environ | offline)
        written = sum(path.stat().st_size for path in _files(self.out(job)))
        print(f"  {index} {job}: {usage.seconds:.1f} s, {usage.peak_bytes / 1e6:.0f} MB", file=sys.stderr, flush=True)
        return Sample(
            job, index, usage.seconds, usage.peak_bytes, written, usage.n_samples, usage.report, load
        )  # fmt: skip

    def _command(self, job: str) -> list[str]:
        out = self.out(job)
        if job == "cp":  # a copy-on-write file system would copy nothing
            return ["cp", "--reflink=never", str(self.base / "model.safetensors"), str(out)]
        kind = "peer" if job == "peer" else "ours"
        return [sys.executable, str(_SCRIPT), kind, str(self.base), str(self.adapter), str(out)]

    def agree(self) -> dict:
        """Compare the logits of the last cached and peer outputs on ONNX Runtime's CPU provider."""
        command = [
            sys.executable,
            str(_SCRIPT),
            "agree",
            str(self.base),
            str(self.out("cached")),
            str(self.out("peer")),
        ]
        return run_measured(command, os.environ).report

    def clear(self, *jobs: str) -> None:
        """Delete the outputs of `jobs`."""
        for job in jobs:
            shutil.rmtree(self.out(job), ignore_errors=True)
            self.out(job).unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _read_through(*folders: Path) -> None:
    """Read all files, so that every run finds them in the page cache."""
    for path in (file for folder in folders for file in _files(folder)):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in _files(folder):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def run_rounds(bench: Bench, n_rounds: int, *, verify: bool) -> tuple[list[Sample], bool, dict | None]:
    """`(samples, whether cold and cached outputs are byte-identical in every round, agreement with the peer)`."""
    samples, identical, agreement = [], True, None
    for index in range(n_rounds):
        samples += [bench.run("cold", index), bench.run("cached", index)]
        identical &= _digests(bench.out("cold")) == _digests(bench.out("cached"))
        bench.clear("cold")
        samples.append(bench.run("peer", index))
        if verify and index == n_rounds - 1:
            agreement = bench.agree()
        bench.clear("cached", "peer")
        samples.append(bench.run("cp", index))
        bench.clear("cp")
    return samples, identical, agreement


def ratios(samples: list[Sample], job: str, against: str, measure: str) -> list[float]:
    """`job / against` of an attribute of the samples, round by round."""
    values = {(s.job, s.round): getattr(s, measure) for s in samples}
    return [value / values[against, index] for (name, index), value in values.items() if name == job]


def find_targets(samples: list[Sample], doubled: Sample | None) -> list[Target]:
    """The targets with what was measured: medians of the rounds' ratios."""
    compared = [
        ("cold export / peer, time", "cold", "seconds", 0.5),
        ("cached export / peer, time", "cached", "seconds", 0.15),
        ("cold export / peer, peak anonymous memory", "cold", "peak_bytes", 0.25),
    ]
    found = []
    for name, job, measure, limit in compared:
        each = ratios(samples, job, "peer", measure)
        value = statistics.median(each)
        detail = "median of " + ", ".join(f"{ratio:.3f}" for ratio in each)
        found.append(Target(name, value, limit, detail, "pass" if value <= limit else "fail"))
    if doubled is not None:
        value = doubled.peak_bytes / statistics.median(s.peak_bytes for s in samples if s.job == "cold")
        verdict = "pass" if value <= 1.2 else "fail"
        found.append(Target("peak anonymous memory, twice the layers", value, 1.2, "one run / median", verdict))
    return found


def export_table(result: dict) -> str:
    """The jobs' medians, and the range of each ratio over the rounds."""
    samples, rows = [Sample(**each) for each in result["samples"]], []
    names = {
        "cold": "`merge`, nothing cached", "cached": "`merge`, graph cached", "peer": "PEFT + exporter + save",
        "cp": "`cp` of the weight file",
    }  # fmt: skip
    for job, name in names.items():
        mine, relative = [s for s in samples if s.job == job], ratios(samples, job, "peer", "seconds")
        seconds, peak = (statistics.median(getattr(s, what) for s in mine) for what in ("seconds", "peak_bytes"))
        of_peer = f"{statistics.median(relative):.2f} × ({min(relative):.2f} to {max(relative):.2f})"
        rows.append(
            (name, f"{seconds:.1f}", "1" if job == "peer" else of_peer, "–" if job == "cp" else f"{peak / 1e6:,.0f} MB")
        )
    columns = ("", "seconds", "of the peer's", "peak anonymous memory")
    doubled = next(each["value"] for each in result["targets"] if each["name"].endswith("twice the layers"))
    said = f"With twice the layers the peak memory of `merge` was {doubled:.2f} ×."
    return f"{textwrap.fill(heading(result['environment']), 120)}\n\n{table(columns, rows)}\n\n{said}\n"


def markdown(result: dict, samples: list[Sample], targets: list[Target]) -> str:
    """The results as Markdown."""
    rows = []
    for job, label in _JOBS.items():
        mine = [s for s in samples if s.job == job]
        seconds, peak = [s.seconds for s in mine], statistics.median(s.peak_bytes for s in mine)
        relative = statistics.median(ratios(samples, job, "peer", "seconds"))
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        memory = f"{peak / 1e6:,.0f}" if job != "cp" else "–"
        row = (label, f"{statistics.median(seconds):.1f}", spread, f"{relative:.3f}×", memory)
        rows.append((*row, f"{mine[-1].output_bytes / 1e6:,.0f}"))
    columns = ("job", "seconds, median", "from, to", "of the peer's", "peak anonymous MB", "written MB")
    parts = [heading(result["environment"]), _subject(result), table(columns, rows), _stages(samples)]
    parts.append(target_table(targets))
    same = "are" if result["identical"] else "ARE NOT"
    parts.append(f"Cold and cached outputs {same} byte-identical.")
    if found := result["agreement"]:
        parts.append(f"Logits of ours and the peer's differ by {found['relative_error']:.1e} of the largest.")
    return "\n\n".join(parts)


def _subject(result: dict) -> str:
    shape = result["shape"]
    return (
        f"{result['n_parameters'] / 1e9:.2f} B parameters ({shape['layers']} layers, hidden {shape['hidden']}, "
        f"vocabulary {shape['vocab']}, {shape['dtype']}), LoRA r = 16 on all linears, {result['rounds']} rounds."
    )


def _stages(samples: list[Sample]) -> str:
    rows = []
    for job in ("cold", "cached", "peer"):
        mine = [s.stages for s in samples if s.job == job]
        medians = {stage: statistics.median(s[stage] for s in mine) for stage in mine[0]}
        rows.append((_JOBS[job], ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in medians.items())))
    return table(("job", "seconds by stage, medians"), rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for models and outputs; models there are reused")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--verify", action="store_true", help="compare our logits with the peer's")
    parser.add_argument("--no-doubled", action="store_true", help="leave out the run with twice the layers")
    parser.add_argument("--out", type=Path, default=RESULTS / f"export-{host_kind()}.json")
    sizes = {"layers": 16, "hidden": 2048, "mlp": 8192, "heads": 32, "kv-heads": 8, "head-dim": 64, "vocab": 128256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> int:
    """Measure, write the JSON, print the Markdown; 1 if a target or a check failed."""
    args = _arguments()
    sizes = (args.layers, args.hidden, args.mlp, args.heads, args.kv_heads, args.head_dim, args.vocab)
    shape = LlamaShape(*sizes, dtype="float16")
    environment = provenance()
    bench = Bench(args.work.resolve(), shape)
    samples, identical, agreement = run_rounds(bench, args.repeat, verify=args.verify)
    doubled = None
    if not args.no_doubled:
        larger = Bench(args.work.resolve(), replace(shape, layers=2 * shape.layers))
        doubled = larger.run("cold", 0)
        larger.clear("cold")
    targets = find_targets(samples, doubled)
    result = {"benchmark": "export", "environment": environment, "shape": asdict(shape), "rounds": args.repeat}
    result |= {"n_parameters": shape.n_parameters, "identical": identical, "agreement": agreement}
    result |= {"samples": [asdict(s) for s in samples], "doubled": asdict(doubled) if doubled else None}
    result |= {"targets": [asdict(target) for target in targets]}
    write_json(args.out, result)
    if doubled is not None and args.out.parent == RESULTS:
        write_into_readme("export", export_table(json.loads(args.out.read_text(encoding="utf-8"))))
    print(markdown(result, samples, targets))
    agrees = agreement is None or agreement["relative_error"] <= _AGREEMENT
    return 0 if identical and agrees and all(target.verdict == "pass" for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
