"""The stages of a GPU run in their order.

    python -m gpu.plan --list
    python -m gpu.plan --owed
    python -m gpu.plan [STAGE…] --bundle BUNDLE --work WORK

A stage runs in a process of its own, at most eight minutes, and writes its file as it goes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from results import RESULTS

_SECONDS = 480


@dataclass(frozen=True)
class StageEntry:
    """A stage: its name, expected minutes on a data centre's GPU, and what it answers.

    Attributes:
        of_exports: Whether it measures exports, and so is owed again when their graphs change.
    """

    name: str
    minutes: float
    answers: str
    of_exports: bool = True


STAGES = (
    StageEntry("provider", 1, "the open questions: rank 0, operand rank, LoraAdapter's copies, CUDA graph, placement"),
    StageEntry("parity", 5, "check and bench of the demo's exports: float32 without TF32, float16, bfloat16"),
    StageEntry("table1", 5, "the LoRA paper's table 1: GPT-2 medium, with PyTorch beside it"),
    StageEntry("decode", 4, "a step of the 1.24 B Llama shape, with GenAI's builder and PyTorch beside it"),
    StageEntry("swaps", 1, "a swap, and a new composition of 32 rows"),
    StageEntry("captured", 2, "AdapterSession with a CUDA graph beside one without: outputs, swaps, steps"),
    StageEntry("peers", 2, "an encoder beside ONNX Runtime's own optimizer"),
    StageEntry("pairs", 2, "a linear with its pair in the forms that a graph could hold", of_exports=False),
    StageEntry("attention", 2, "one attention in five forms", of_exports=False),
)


def owed() -> dict[str, str]:
    """The stages without a result of a CUDA device, or with one of older graphs, and why."""
    found = {}
    for stage in STAGES:
        path = RESULTS / f"gpu-{stage.name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("environment", {}).get("provider") != "cuda":
            found[stage.name] = "no result of a GPU"
        elif stage.of_exports and (why := _is_older(known.get("bundle_commit", ""))):
            found[stage.name] = why
    return found


def _is_older(commit: str) -> str:
    """Why a result of exports made at `commit` is not one of today's graphs; empty where it is, or git is not there."""
    command = ["git", "rev-list", "--count", f"{commit}..HEAD", "--", "lora_export/graph"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    if done.returncode:
        return f"its exports were made at {commit[:7] or 'no commit'}, which this history lacks"
    return f"{done.stdout.strip()} changes of the graphs since its exports were made" if int(done.stdout) else ""


def run_stage(name: str, given: argparse.Namespace) -> int:
    """Run one stage in this process; the exit code: 1 if it found a failed check, 4 if the provider is not usable."""
    from gpu.stage import Stage
    from lora_export.errors import EnvironmentUnusable
    from lora_export.runtime.session import choose_provider

    torch_device = ""
    if not given.no_torch and all(importlib.util.find_spec(each) for each in ("torch", "transformers", "peft")):
        import torch

        torch_device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        choose_provider(given.provider)
    except EnvironmentUnusable as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    stage = Stage(
        name=name,
        bundle=given.bundle,
        work=given.work,
        results=given.results,
        provider=given.provider,
        blocks=given.blocks,
        small=given.small,
        torch_device=torch_device,
    )
    given.work.mkdir(parents=True, exist_ok=True)
    found = importlib.import_module(f"gpu.{name}_stage").run(stage)
    stage.save(found)
    return int(any(check["exit_code"] for check in found.get("checks", {}).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", choices=[*(stage.name for stage in STAGES), []])
    parser.add_argument("--list", action="store_true", help="the stages, their minutes, and what each answers")
    parser.add_argument(
        "--owed", action="store_true", help="the stages without a result of a GPU, or of today's graphs"
    )
    parser.add_argument("--bundle", type=Path, help="what `ci/gpu prepare` made")
    parser.add_argument("--work", type=Path, default=Path("/tmp/lora-export-gpu"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--provider", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="the bundle was made with --small")
    parser.add_argument("--no-torch", action="store_true", help="leave out what needs PyTorch")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.list:
        for stage in STAGES:
            print(f"{stage.name:10} {stage.minutes:3g} min  {stage.answers}")
        return
    if given.owed:
        print("\n".join(f"{name:10} {why}" for name, why in owed().items()) or "nothing")
        return
    if given.bundle is None:
        parser.error("--bundle is missing")
    if given.here:
        sys.exit(run_stage(given.stages[0], given))
    codes = {}
    for name in given.stages or [stage.name for stage in STAGES]:
        command = [sys.executable, "-m", "gpu.plan", name, "--here", *_options(given)]
        try:
            code = subprocess.run(command, check=False, timeout=_SECONDS, cwd=Path(__file__).parents[1]).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: cut off after {_SECONDS} s; what it found until then is kept", file=sys.stderr)
            code = 124
        if code:
            codes[name] = code
        if code == 4:
            break
    if codes:
        print(f"failed: {', '.join(f'{name} ({code})' for name, code in codes.items())}", file=sys.stderr)
    sys.exit(max(codes.values(), default=0))


def _options(given: argparse.Namespace) -> list[str]:
    paths = {name: str(getattr(given, name).resolve()) for name in ("bundle", "work", "results")}
    options = [f"--{name}={value}" for name, value in (paths | {"provider": given.provider}).items()]
    flags = [f"--{name.replace('_', '-')}" for name in ("small", "no_torch") if getattr(given, name)]
    return [*options, f"--blocks={given.blocks}", *flags]


if __name__ == "__main__":
    main()
