"""README's install line, without pins, in a fresh environment. A file of its own, so that a worker of its own runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_documented_install_exports_a_decoder_and_an_encoder(bases, adapters, tmp_path):
    """README's own line, without pins, in a fresh environment; then its commands with nothing else installed."""
    install = re.search(r"^    (pip install \.) ", README, re.MULTILINE)[1]
    source = tmp_path / "clone"
    shutil.copytree(ROOT / "lora_export", source / "lora_export", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(tmp_path / "venv", with_pip=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "PATH": f"{tmp_path / 'venv' / 'bin'}:{environment['PATH']}",
        "LORA_EXPORT_CACHE": str(tmp_path / "c"),
        "PIP_COMPILE": "0",  # Python compiles what it imports, a tenth of what is installed
    }

    def does(command: str) -> str:
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, cwd=source, env=environment, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    does(f"{install} --quiet")
    for base, adapter, mode in (("llama", "chat", "dynamic"), ("bert", "topic", "merge")):
        does(f"lora-export {mode} {bases[base]} {adapters[adapter]} --provider cpu -o {tmp_path / base}")
    found = json.loads(does(f"lora-export run {tmp_path / 'llama'} --adapter chat hello --max-new-tokens 2 --json"))
    assert len(found["results"][0]["tokens"]) <= 2
    assert "LABEL_" in does(f"lora-export run {tmp_path / 'bert'} hello")
    assert (
        does("lora-export --version")
        .strip()
        .endswith(json.loads((tmp_path / "bert/lora_export.json").read_text())["versions"]["lora-export"])
    )
