"""The rules of the tree: imports run downwards, importing is light, files are short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lora_export

PACKAGE = Path(lora_export.__file__).parent
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "safetensors",
    "click",
)


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_import_contracts_are_kept():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout and "3 kept" in done.stdout


def test_importing_the_package_imports_nothing_heavy():
    assert modules_after("import lora_export") & set(HEAVY) == set()


@pytest.mark.parametrize("module", ["contract", "recipe", "errors", "artifact"])
def test_the_contract_and_the_manifest_need_the_standard_library_only(module):
    assert modules_after(f"import lora_export.{module}") & set(HEAVY) == set()


def test_the_runtime_needs_onnxruntime_and_numpy_only():
    found = modules_after("from lora_export import AdapterSession; import lora_export.runtime.generate")
    assert found & set(HEAVY) == {"onnxruntime", "numpy"}


def test_public_names_are_there():
    for name in lora_export.__all__:
        assert getattr(lora_export, name) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lora_export.nothing


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert not text or text.startswith('"""')


def test_the_map_in_the_docstring_names_what_exists():
    for line in lora_export.__doc__.splitlines():
        words = line.split()
        if line.startswith("    ") and words and (words[0].endswith((".py", "/"))):
            assert (PACKAGE / words[0]).exists(), words[0]
