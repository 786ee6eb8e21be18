"""Parity with unmerged PEFT by the tool's own `check`, and its `bench`, from the command line: every real export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu.bundle import restore
from gpu.models import DTYPES
from gpu.stage import Stage

KINDS = ("minilm-merged", "minilm-dynamic", "decoder-merged", "decoder-dynamic")


def run(stage: Stage) -> dict:
    """The verdict and the measures of every check; a bench of the float16 exports."""
    found: dict = {"checks": {}, "benches": {}}
    for dtype in DTYPES:
        for kind in KINDS:
            name = f"{kind}-{dtype}"
            if not (stage.bundle / "exports" / name).exists():
                continue
            folder = restore(stage.bundle, name, stage.work)
            code, text = _lora_export(stage, "check", folder, [])
            report = _read(folder / "reports" / "check.json")
            found["checks"][name] = {"exit_code": code, "output": text, "report": report}
            stage.say(f"check {name}: exit {code}", ["  " + line for line in text.splitlines()[-14:]])
            stage.save(found)
    for kind in KINDS[1::2]:
        folder = restore(stage.bundle, f"{kind}-float16", stage.work)
        code, text = _lora_export(stage, "bench", folder, ["--blocks", str(stage.blocks)])
        report = _read(folder / "reports" / "bench.json")
        found["benches"][kind] = {"exit_code": code, "output": text, "report": report}
        stage.say(f"bench {kind}-float16: exit {code}", ["  " + line for line in text.splitlines()[-30:]])
        stage.save(found)
    return found


def _lora_export(stage: Stage, command: str, folder: Path, options: list[str]) -> tuple[int, str]:
    sources = stage.bundle / "sources"
    manifest = json.loads((folder / "lora_export.json").read_text())
    base = "minilm" if folder.name.startswith("minilm") else "tiny-llama"
    options = [*options, "--base", str(sources / base), "--provider", stage.provider]
    for record in manifest["adapters"]:
        options += ["--adapter", f"{record['name']}={sources / record['name']}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_export.cli.main", command, str(folder), *options],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None
