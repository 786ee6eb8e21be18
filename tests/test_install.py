"""README's install line, without pins, and its commands with nothing else installed.

An environment made anew takes two minutes, most of them to copy what the tests' own has already. So pip resolves the
line anew, and where it comes to the very versions that are installed here, the package's wheel runs on those, with all
else that is installed here hidden. Where it comes to others, they are installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Imported by Python at its start: no module of another distribution than these can be found.
HIDE_OTHERS = """
import importlib.metadata, re, sys
kept = {kept!r}
for module, owners in importlib.metadata.packages_distributions().items():
    if not any(re.sub("[-_.]+", "-", owner).lower() in kept for owner in owners):
        sys.modules[module] = None
"""


def test_the_documented_install_exports_a_decoder_and_an_encoder(bases, adapters, tmp_path):
    install = re.search(r"^    (pip install \.) ", README, re.MULTILINE)[1]
    source = tmp_path / "clone"
    shutil.copytree(ROOT / "lora_export", source / "lora_export", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "LORA_EXPORT_CACHE": str(tmp_path / "c"),
        "PIP_COMPILE": "0",  # Python compiles what it imports, a tenth of what is installed
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
    }

    def does(command: str) -> str:
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, cwd=source, env=environment, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    does(f"pip wheel --quiet --no-deps --wheel-dir {tmp_path} .")
    (wheel,) = tmp_path.glob("*.whl")
    does(f"{install.removesuffix('.')} {wheel} --quiet --dry-run --ignore-installed --report {tmp_path / 'report'}")
    resolved = {
        canonicalize_name(entry["metadata"]["name"]): entry["metadata"]["version"]
        for entry in json.loads((tmp_path / "report").read_text(encoding="utf-8"))["install"]
    }
    if are_installed_here(resolved):
        does(f"pip install --quiet --no-deps --target {tmp_path / 'site'} {wheel}")
        (tmp_path / "start").mkdir()
        hide = HIDE_OTHERS.format(kept={str(name) for name in resolved})
        (tmp_path / "start" / "sitecustomize.py").write_text(hide, encoding="utf-8")
        environment["PYTHONPATH"] = f"{tmp_path / 'site'}:{tmp_path / 'start'}"
        environment["PATH"] = f"{tmp_path / 'site' / 'bin'}:{environment['PATH']}"
    else:
        venv.create(tmp_path / "venv", with_pip=True)
        environment["PATH"] = f"{tmp_path / 'venv' / 'bin'}:{environment['PATH']}"
        does(f"{install} --quiet")
    with pytest.raises(AssertionError, match=r"No module named 'pytest'|import of pytest halted"):
        does("python -c 'import pytest'")
    assert str(tmp_path) in does("python -c 'import lora_export; print(lora_export.__file__)'")
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


def are_installed_here(resolved: Mapping[str, str]) -> bool:
    """Whether this environment has exactly the `resolved` versions, beside others; lora-export apart."""
    here = {canonicalize_name(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    return all(here.get(name) == version for name, version in resolved.items() if name != "lora-export")
