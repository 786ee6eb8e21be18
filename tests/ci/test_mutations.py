"""`check` catches damaged exports: a few cells of `ci/benchmarks/mutations.py`, or all with `pytest --all-mutations`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mutation_results
import mutations
import numpy as np
import pytest
import sound_exports
from adapter_options import OPTIONS
from adapter_values import read_trained
from architectures import CATALOGUE, make_base
from click.testing import CliRunner
from damages import DAMAGES
from readme_tables import table_in_readme
from stored_tensors import adapter_tensors, replace_weights
from subjects import ARCHITECTURES, Subject, base_arrays, checked, export_subject, subjects
from trained_adapters import make_adapter
from wrong_exports import write_values

from lora_export.artifact import ExportKind
from lora_export.check.results import ParityCase

BY_NAME = {option.name: option for option in OPTIONS}


def subject(architecture: str, option: str, dtype: str, kind: str) -> Subject:
    return Subject(architecture, BY_NAME[option], dtype, ExportKind(kind))


# Subjects, and the damages that are done to them: each task but the encoder-decoders', both dtypes, both kinds.
FEW = {
    ("BERT, features", "lora", "float32", "dynamic"): ("alpha 1 % off", "two adapters swapped", "padding read"),
    ("BERT, features", "modules_to_save", "float32", "merged"): ("head's bias missing",),
    ("BERT", "dora", "float32", "merged"): ("DoRA's magnitude ignored", "DoRA's gain not on B"),
    ("BERT", "bias", "float32", "merged"): ("trained biases missing",),
    ("BERT", "embedding", "float32", "merged"): ("embedding's pair missing",),
    ("ViT", "lora", "float16", "merged"): ("A transposed", "a weight from another layer", "adapter dropped"),
    ("ViT", "lora", "float16", "dynamic"): ("alpha 1 % off", "overflow of x A", "a row reads its neighbour's adapter"),
    ("ViT", "rank_pattern", "float32", "dynamic"): ("rank and alpha patterns ignored", "one module dropped"),
    ("Llama", "alora", "float32", "dynamic"): ("gate ignored", "gate one token late"),
    ("Llama", "lora", "float32", "merged"): ("cache read one short", "positions off by one after a cache"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "damaged" in metafunc.fixturenames:
        every = [(of, ()) for of in subjects(ARCHITECTURES, ("float32", "float16"))]
        few = [(subject(*key), names) for key, names in FEW.items()]
        chosen = every if metafunc.config.getoption("--all-mutations") else few
        ids = [f"{of.architecture}-{of.option.name}-{of.dtype}-{of.kind}" for of, _ in chosen]
        metafunc.parametrize("damaged", chosen, ids=ids)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, _silent_libraries):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_base(CATALOGUE[name], tmp_path_factory.mktemp("mutations") / "base")
        return made[name]

    return get


def test_a_damage_is_caught(damaged, bases, tmp_path):
    of, names = damaged
    damages = [damage for damage in mutation_results.EVERY if not names or damage.name in names]
    cells = list(mutations.run_subject(of, damages, bases(of.architecture), tmp_path))
    assert [cell for cell in cells if not cell.caught] == []
    assert cells and (not names or {cell.damage for cell in cells} == set(names))
    assert all(cell.measures for cell in cells)


# The suite tells the truth: what writes damages writes nothing else, and what is missed is not taken for caught.


@pytest.mark.parametrize(("option", "kind"), [("dora", "merged"), ("dora", "dynamic"), ("lora", "dynamic")])
def test_right_values_written_over_an_export_change_nothing(option, kind, bases, tmp_path):
    """The formulas in NumPy are those of the export, so a damage of them is the only thing that is wrong."""
    of = subject("ViT", option, "float32", kind)
    adapter = make_adapter(of.base, of.option, bases("ViT"), 3, tmp_path / "adapter")
    export_subject(of, bases("ViT"), [adapter], tmp_path / "out")
    trained = read_trained(adapter, base_arrays(of, bases("ViT")), conv1d=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.onnx*")}
    assert not write_values(tmp_path / "out", (trained,), (replace(trained, rank=trained.rank),))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.onnx*")}
    if kind == "dynamic":
        stored = adapter_tensors(tmp_path / "out", "adapters/adapter.onnx_adapter")
        for name, value in trained.inputs().items():
            np.testing.assert_allclose(stored[name], value, rtol=1e-6, atol=1e-7)


def test_a_weight_that_is_stored_nowhere_is_no_damage(bases, tmp_path):
    of = subject("ViT", "lora", "float32", "merged")
    export_subject(of, bases("ViT"), [], tmp_path / "out")
    with pytest.raises(LookupError, match=r"weights of shapes \[\(64, 64\)\] are stored nowhere"):
        replace_weights(tmp_path / "out", [(np.ones((64, 64), np.float32), np.zeros((64, 64), np.float32))])


def test_a_damage_that_is_missed_is_told_and_fails_the_run(monkeypatch, tmp_path):
    """A check that judges the sound export, whatever it is given."""
    sound = []

    def blind(folder: Path):
        if not sound or folder.name != "damaged":
            sound[:] = [checked(folder)]
        return sound[0]

    monkeypatch.setattr(mutations, "checked", blind)
    done = CliRunner().invoke(mutations.main, ["--architecture", "vit", "--damage", "patterns ignored"])
    assert done.exit_code == 1
    assert (
        done.output.count("MISSED") == 8 and "| rank and alpha patterns ignored | 0 of 2 | 0 of 2 |  |" in done.output
    )


def test_an_export_that_fails_before_it_is_damaged_proves_nothing(bases, tmp_path, monkeypatch):
    of = subject("ViT", "lora", "float32", "merged")
    monkeypatch.setattr(mutations, "checked", lambda folder: mutations.LoraExportError("no"))
    with pytest.raises(RuntimeError, match=r"the sound export of .* fails, so nothing is proven"):
        list(mutations.run_subject(of, DAMAGES, bases("ViT"), tmp_path))


def test_a_failure_of_an_unknown_measure_must_be_named():
    case = ParityCase("a", "adapter", "b", 1, failures=("it is purple",))
    with pytest.raises(LookupError, match="name the measure of this failure in _MEASURES: it is purple"):
        list(mutation_results.measures_of(case))


def test_a_sound_export_is_the_same_for_a_seed_and_passes(bases, tmp_path):
    of = subject("ViT", "lora", "float32", "dynamic")
    first, second = (sound_exports.sound_export(of, 7, bases("ViT"), tmp_path / name) for name in "ab")
    assert first.passed and first.share_used <= 1
    assert replace(first, seconds=0) == replace(second, seconds=0)
    other = sound_exports.sound_export(of, 8, bases("ViT"), tmp_path / "c")
    assert (other.ranks, other.strength) != (first.ranks, first.strength)


def test_the_result_is_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(mutation_results, "RESULT", tmp_path / "mutations.json")
    cell = mutations.Cell(
        "A transposed", "lora", "ViT", "image-classification", "float32", "merged", "a", ("error",), None, 1e-6, 0.1
    )
    entry = sound_exports.SoundExport(0, "ViT", "lora", "float32", "merged", (3,), (8,), 0.1, 5.0, 0.1, "", 0.1)
    mutation_results.write_result([cell, replace(cell, case="", measures=())], [entry], {"bfloat16": "no kernel"})
    cells, sound = mutation_results.read_result()
    assert cells == [cell, replace(cell, case="", measures=())] and sound == [entry]
    table = mutation_results.markdown(cells, sound)
    assert table.splitlines()[2:] == [
        "| A transposed | 1 of 2 | error |", "| all | 1 of 2 | |", "", "Of 1 sound exports 0 failed.",
    ]  # fmt: skip


def test_a_part_is_recorded_among_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(mutation_results, "RESULT", tmp_path / "mutations.json")
    where = ("lora", "ViT", "image-classification", "float32", "merged")
    missed, other = (mutations.Cell(name, *where, "", (), 1.0, 1.0, 0.1) for name in ("A transposed", "B transposed"))
    caught = replace(missed, case="a", measures=("error",))
    assert mutation_results.among_recorded([missed], []) == ([missed], [])
    mutation_results.write_result([missed, other], [], {})
    assert mutation_results.among_recorded([caught], []) == ([caught, other], [])


def test_the_docs_have_the_records_table():
    assert table_in_readme("mutations") == mutation_results.markdown(*mutation_results.read_result())


def test_the_record_has_every_damage_and_nothing_missed():
    cells, sound = mutation_results.read_result()
    assert {cell.damage for cell in cells} == {damage.name for damage in mutation_results.EVERY}
    assert [cell for cell in cells if not cell.caught] == []
    assert len(sound) == mutations.N_SOUND and all(entry.passed for entry in sound)
