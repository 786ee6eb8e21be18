"""Print what the demo found, from the reports that its commands wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(out: Path) -> None:
    """Print the table of adapters, the latencies and where the reports lie.

    Args:
        out: The demo's folder, with `served/` and `topic-merged/` exported and checked.
    """
    served, merged = out / "served", out / "topic-merged"
    check = json.loads((served / "reports/check.json").read_text())
    bench = json.loads((served / "reports/bench.json").read_text())
    cases = {case["name"]: case for case in check["cases"] if case["group"] == "adapter"}
    sizes = check["subject"]["n_bytes"]
    print(f"{'':<10} {'parity':>13} {'':>8} {'accuracy in':>10} {'accuracy in':>13} {'bytes':>10}")
    print(f"{'adapter':<10} {'error':>13} {'effect':>8} {'PyTorch':>11} {'ONNX Runtime':>13} {'on disk':>10}")
    for name, case in cases.items():
        size = sizes[f"adapters/{name}.onnx_adapter"]
        accuracies = f"{case['accuracy']['reference']:>11.1%} {case['accuracy']['exported']:>13.1%}"
        print(f"{name:<10} {case['largest_error']:>13.1e} {case['largest_effect']:>8.2f} {accuracies} {size:>10,}")
    for workload in bench["workloads"]:
        ratios = {ratio["variant"]: ratio for ratio in workload["ratios"]}
        print(f"\nlatency at {workload['name']}:")
        for variant in workload["variants"]:
            ratio = ratios.get(variant["name"])
            compared = f"{ratio['median']:.3f} × base  [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else ""
            print(f"  {variant['name']:<22} {variant['median_ms']:>8.2f} ms   {compared}")
    swap = {entry["name"]: entry["median_us"] for entry in bench["swaps"]}
    print(f"\nchanging the adapter: {swap['bound']:.0f} µs held, {swap['loaded']:.0f} µs from its file")
    shared = sum(size for name, size in sizes.items() if name.startswith("model.onnx"))
    adapters = sum(size for name, size in sizes.items() if name.startswith("adapters/"))
    alone = sum(path.stat().st_size for path in merged.glob("model.onnx*"))
    print(f"on disk: {shared:,} bytes for the graph and {adapters:,} for its {len(cases)} adapters;")
    print(f"         {alone:,} for each merged graph, {len(cases) * alone:,} for {len(cases)}")
    print(f"\nreports: {served / 'reports/check.html'}\n         {served / 'reports/bench.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
