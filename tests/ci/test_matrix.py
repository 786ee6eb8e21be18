"""Architectures by adapter options: some cells of `ci/benchmarks/matrix.py`, or all with `pytest --whole-matrix`."""

from __future__ import annotations

from pathlib import Path

import matrix
import pytest
from adapter_options import MERGED, OPTIONS, REFUSED, SERVED, AdapterOption, lora
from architectures import make_base
from model_types import model_type_table, model_types
from readme_tables import table_in_readme

from lora_export.errors import InputRefused

FEW = {
    "BERT, features": ("lora", "rank_pattern", "modules_to_save"),
    "Mixtral": ("lora", "all linear"),
    "CLIP": ("lora",),
    "Whisper": ("trainable_tokens",),  # of an embedding that only its head shares
}
BY_NAME = {option.name: option for option in OPTIONS}


def test_the_record_has_every_cell_as_the_table_expects_it():
    cells = matrix.read_result()
    applying = {(name, option.name) for name in matrix.ALL for option in OPTIONS if matrix.applies(option, name)}
    assert {(cell.architecture, cell.option, cell.mode) for cell in cells} == {
        (*pair, mode) for pair in applying for mode in matrix.MODES
    }
    assert [(c.architecture, c.option, c.mode, c.found) for c in cells if not c.as_expected] == []


def test_the_docs_have_the_records_table():
    assert table_in_readme("matrix") == matrix.summary(matrix.read_result())


def test_the_docs_have_every_model_type_by_task():
    table = model_type_table(matrix.read_result(), matrix.ALL)
    assert table_in_readme("model_types") == table
    rows = {tuple(line.split(" | ")[:2]): line for line in table.splitlines()}
    assert "A mamba base keeps a state beside keys and values" in rows["| `mamba`", "text-generation"]
    assert rows["| `gpt2`", "text-generation"].endswith("| 14 of 15 | 14 of 15 | `merge`: alora; `dynamic`: IA3 |")
    assert len(set(model_types(matrix.ALL).values())) >= 80


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole-matrix")
        chosen = {name: tuple(BY_NAME) for name in matrix.ALL} if whole else FEW
        cells = [
            pytest.param((name, BY_NAME[option]), id=f"{name}-{option}")
            for name, options in chosen.items()
            for option in options
            if matrix.applies(BY_NAME[option], name)
        ]
        metafunc.parametrize("cell", cells)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, _silent_libraries):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_base(matrix.ALL[name], tmp_path_factory.mktemp("matrix") / "base")
        return made[name]

    return get


def test_a_cell_becomes_what_the_table_says(cell, bases, tmp_path):
    name, option = cell
    for found in matrix.run_option(name, option, bases(name), tmp_path):
        assert found.as_expected, f"{found.mode}: {found.found} instead of {found.expected}: {found.message}"
        if found.found != REFUSED:
            assert found.cases > 0 and found.smallest_effect > 10 * found.largest_error


# A cell tells the truth: what fails, what is refused without its name, and what breaks are not taken for a pass.


BERT = "BERT, features"


def cells_of(option: AdapterOption, bases, folder: Path) -> dict[str, matrix.Cell]:
    return {cell.mode: cell for cell in matrix.run_option(BERT, option, bases(BERT), folder)}


def test_a_refusal_that_does_not_name_the_option_is_no_refusal(bases, tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise InputRefused("Something else is wrong", where="elsewhere")

    monkeypatch.setattr(matrix, "export", refuse)
    option = AdapterOption("lora", lora, REFUSED, REFUSED, "use_magic")
    for cell in cells_of(option, bases, tmp_path / "a").values():
        assert (cell.found, cell.as_expected) == ("broken", False)
        assert cell.message.startswith("InputRefused: Something else is wrong")
    named = AdapterOption("lora", lora, REFUSED, REFUSED, "Something else")
    assert all(cell.found == REFUSED for cell in cells_of(named, bases, tmp_path / "b").values())


def test_what_breaks_is_told_and_does_not_end_the_table(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "export", lambda *args: 1 / 0)
    found = cells_of(BY_NAME["lora"], bases, tmp_path)
    assert [(cell.found, cell.message) for cell in found.values()] == [
        ("broken", "ZeroDivisionError: division by zero")
    ] * 2


def test_a_failed_gate_is_a_failed_cell(bases, tmp_path, monkeypatch):
    """The merged export forgets its adapter."""
    original = matrix.export

    def forget(request, options):
        original(request, options)
        if request.mode == "merge":
            bare = options.out.with_name("bare")
            original(type(request)(request.base, (), "merge"), type(options)(bare))
            (options.out / "model.onnx.data").write_bytes((bare / "model.onnx.data").read_bytes())

    monkeypatch.setattr(matrix, "export", forget)
    found = cells_of(BY_NAME["lora"], bases, tmp_path)
    assert (found["merge"].found, found["merge"].expected) == ("failed", MERGED)
    assert "rank-3: the error is" in found["merge"].message
    assert found["dynamic"].found == "failed" and "merged rank-3" in found["dynamic"].message


def test_the_table_shows_errors_refusals_and_surprises():
    def cell(option: str, mode: str, expected: str, found: str, error: float | None = None) -> matrix.Cell:
        return matrix.Cell("BERT", option, mode, expected, found, 1 if error else 0, error, 1.0 if error else None)

    table = matrix.markdown(
        [
            cell("lora", "merge", MERGED, MERGED, 1e-6),
            cell("lora", "dynamic", SERVED, SERVED, 2e-6),
            cell("dora", "merge", REFUSED, REFUSED),
            cell("dora", "dynamic", REFUSED, SERVED, 3e-6),
        ]
    )
    assert table.splitlines() == [
        "| | lora | dora |",
        "|---|---|---|",
        "| BERT | 1e-06, 2e-06 | refused, **dynamic served** |",
    ]


def test_a_part_is_recorded_among_the_rest_in_the_tables_order(tmp_path, monkeypatch):
    def cell(name: str, option: str, cases: int) -> matrix.Cell:
        return matrix.Cell(name, option, "merge", MERGED, MERGED, cases, 1e-6, 1.0)

    monkeypatch.setattr(matrix, "RESULT", tmp_path / "matrix.json")
    whole = matrix.recorded([cell("ViT", "lora", 1), cell("BERT", "rslora", 2)], keep_others=False)
    matrix.write_json(matrix.RESULT, {"cells": whole})
    part = matrix.recorded([cell("ViT", "lora", 3), cell("BERT", "lora", 4)], keep_others=True)
    found = [(entry["architecture"], entry["option"], entry["cases"]) for entry in part]
    assert found == [("BERT", "lora", 4), ("BERT", "rslora", 2), ("ViT", "lora", 3)]
    assert len(matrix.recorded([cell("ViT", "lora", 3)], keep_others=False)) == 1
