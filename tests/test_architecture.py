"""The rules of the tree: imports run downwards, importing is light, files are short."""

from __future__ import annotations

import ast
import re
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
    assert "0 broken" in done.stdout and "8 kept" in done.stdout


def test_importing_the_package_imports_nothing_heavy():
    assert modules_after("import lora_export") & set(HEAVY) == set()


@pytest.mark.parametrize("module", ["contract", "base.recipe", "errors", "artifact", "verdict"])
def test_the_contract_and_the_manifest_need_the_standard_library_only(module):
    assert modules_after(f"import lora_export.{module}") & set(HEAVY) == set()


def test_the_runtime_needs_onnxruntime_and_numpy_only():
    found = modules_after("from lora_export import AdapterSession; import lora_export.runtime.generate")
    assert found & set(HEAVY) == {"onnxruntime", "numpy"}


def test_the_server_needs_onnxruntime_numpy_and_its_extra_only():
    found = modules_after("import lora_export.serve.server, lora_export.cli.main")
    assert found & set(HEAVY) == {"onnxruntime", "numpy", "click"}


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


ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def entries(room: Path) -> list[str]:
    """The files and rooms that a room's map names, in its order."""
    lines = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))).splitlines()
    words = [line.split() for line in lines if line.startswith("    ")]
    return [first for first, *_ in words if first.endswith((".py", "/"))]


def imported_by(room: Path) -> set[str]:
    """The rooms and shared values that the files of `room` import, rooms inside it aside."""
    own = (PACKAGE.name, *room.relative_to(PACKAGE).parts)
    is_part = len(own) > 2
    found = set()
    for path in room.glob("*.py") if is_part else room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] != PACKAGE.name:
                continue
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for parts in (name.split(".") for name in names):
                target = PACKAGE.parent.joinpath(*parts[:2])
                if tuple(parts[: len(own)]) == own or not (target.is_dir() or target.with_suffix(".py").exists()):
                    continue
                found.add(".".join(parts[1:3]) if is_part and parts[1] == own[1] else parts[1])
    return found


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(PACKAGE.parent).as_posix())
def test_every_room_has_a_map_of_all_that_is_in_it(room):
    files = {path.name for path in room.glob("*.py")} - {"__init__.py"}
    rooms = {f"{path.parent.name}/" for path in room.glob("*/__init__.py")}
    named = entries(room)
    assert set(named) == files | rooms and len(named) == len(set(named))


@pytest.mark.parametrize("room", ROOMS[1:], ids=lambda room: room.relative_to(PACKAGE.parent).as_posix())
def test_every_room_says_what_it_imports(room):
    text = " ".join(ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))).split())
    said = re.search(r"Imports ([^.]*(?:\.[a-z_]+[^.]*)*)\.$", text)[1]
    assert set(said.split(", ")) - {"nothing of this package"} == imported_by(room)


# The rooms whose functions take at most three arguments by position.
# Called by torch and by Jinja; and an operator of a graph, which is read as ONNX writes it.
AS_OTHERS_CALL = {"__torch_dispatch__", "tojson", "op", "_op"}


def test_more_than_three_arguments_are_given_by_name():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name in AS_OTHERS_CALL:
                continue
            is_command = path.parent.name == "cli" and node.decorator_list  # Click names what it gives
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
            if not is_command and len([name for name in names if name not in ("self", "cls")]) > 3:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert found == []
