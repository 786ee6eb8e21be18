"""What both benchmarks share: where a result was obtained, targets with their verdicts, JSON files, Markdown tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_export.environment import environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """A number that must not exceed `limit` (nor fall below `lower`, where that is given).

    Attributes:
        detail: What the number was computed from, in words.
        verdict: "pass", "fail", or "ambiguous" where the noise covers the limit.
    """

    name: str
    value: float
    limit: float
    detail: str
    verdict: str
    lower: float | None = None


def host_kind() -> str:
    """A short name of this kind of machine for file names, e.g. `x86_64-2cores`."""
    return f"{platform.machine()}-{len(os.sched_getaffinity(0))}cores"


def provenance(provider: str = "cpu") -> dict:
    """This machine, its software and its load now, as JSON values; memory in bytes."""
    found = asdict(environment(provider, "asked for", {}))
    found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["load_average_at_start"] = os.getloadavg()
    found["commit"] = _commit()
    return found


def _commit() -> str:
    """The commit of this checkout, with "+ changes" if the package differs from it; "" outside of git."""
    git = ("git", "-C", str(Path(__file__).parents[2]))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "lora_export"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head} + changes" if changed else head


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def target_table(targets: Sequence[Target]) -> str:
    """The targets as a Markdown table."""
    rows = []
    for target in targets:
        limit = f"≤ {target.limit:g}" if target.lower is None else f"{target.lower:g} to {target.limit:g}"
        rows.append((target.name, f"{target.value:.3f}", limit, target.detail, target.verdict))
    return table(("target", "measured", "limit", "from", "verdict"), rows)


def heading(environment: dict) -> str:
    """One line of Markdown: machine, versions, date, load."""
    versions = environment["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "onnxruntime"))
    memory = f"{environment['memory_bytes'] / 2**30:.0f} GiB"
    load = f"load average {environment['load_average_at_start'][0]:.2f} at the start"
    cpu = f"{environment['cpu']}, {environment['n_cores']} cores, {memory}"
    return f"{cpu}; Python {environment['python']}, {named}; {environment['started_at']}; {load}."
