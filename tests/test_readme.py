"""README says what is true: its table is the code's, its commands and options exist, its Python runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import click
import numpy as np
import pytest

from lora_export.adapters.support import markdown_table
from lora_export.check.judge.tolerances import markdown_table as gates_table
from lora_export.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def test_support_table_is_the_one_that_drives_the_refusals():
    between = README.split("support, held by a test -->\n")[1].split("<!-- end of support table -->")[0]
    assert between == markdown_table()


def test_gates_are_those_that_check_uses():
    between = README.split("tolerances, held by a test -->\n")[1].split("<!-- end of gates -->")[0]
    assert between == gates_table()


def test_every_command_is_named_and_every_named_command_exists():
    named = set(re.findall(r"lora-export ([a-z]+)\b", README))
    assert named == set(main.commands)


@pytest.mark.parametrize("line", re.findall(r"^ *(lora-export [a-z]+ .*--.*)$", README, re.MULTILINE))
def test_options_in_command_lines_exist(line):
    words = line.split("#")[0].split()
    used = {word.split("=")[0] for word in words if word.startswith("-")}
    assert used <= options_of(main.commands[words[1]]), line


def test_options_in_prose_exist():
    every = {option for command in main.commands.values() for option in options_of(command)} | {"--help"}
    prose = re.sub(r"^(    |```).*$", "", README, flags=re.MULTILINE)
    assert set(re.findall(r"`(--[a-z-]+)", prose)) <= every


def test_scripts_that_readme_names_exist():
    for script in set(re.findall(r"\bci/[\w/-]+(?:\.\w+)?", README)):
        assert (ROOT / script).exists(), script


def test_exit_codes_are_those_of_the_errors():
    from lora_export.errors import EnvironmentUnusable, InputRefused, UsageProblem

    for code, error in ((2, UsageProblem), (3, InputRefused), (4, EnvironmentUnusable)):
        assert error.exit_code == code
        assert re.search(rf"\b{code} (usage|input refused|environment)", README)


def test_no_placeholder_is_left():
    assert not re.findall(r"\b(FIGURES|SUPPORT_TABLE|ARCHITECTURES|TODO)\b", README)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_runs(block, exports, own, tmp_path):
    """README's Python, on an export whose adapters have the names that it uses."""
    if "Seq2SeqSession" in block:
        folder = exports["bart-dynamic"]
        block = block.replace('"translator"', f'"{folder}"').replace('"legal"', '"bart-all"')
        script = f"""import numpy as np
targets = np.array([[2, 5], [2, 6]])
inputs = {{"input_ids": np.array([[1, 5, 2], [1, 6, 2]]), "attention_mask": np.ones((2, 3), np.int64)}}
{block}
assert logits.shape == (2, 2, 260) and len(tokens) == 2
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return
    folder = own(exports["bert-dynamic"])
    (folder / "new.onnx_adapter").write_bytes((folder / "adapters/topic.onnx_adapter").read_bytes())
    ids = np.array([[2, 5, 6, 3], [2, 7, 3, 0], [2, 9, 8, 3]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = block.replace('"served', f'"{folder}').replace("path/to", str(folder))
    script = f"import numpy as np\ninputs = dict(np.load({str(tmp_path / 'inputs.npz')!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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
