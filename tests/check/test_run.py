"""`check` passes what is right, and catches every way of being wrong that a converter is known for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from stored_tensors import adapter_tensors, change_weight, write_adapter_tensors

from lora_export.artifact import sha256_of
from lora_export.check import run
from lora_export.check.context import CheckOptions
from lora_export.check.results import CheckReport
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.verdict import Verdict

Tensors = dict[str, np.ndarray]
SOUND = [
    "llama-dynamic", "llama-merged", "llama-voice", "gpt2-dynamic", "bert-dynamic", "bert-merged",
    "classifier-dynamic", "tagger-dynamic", "features-dynamic", "albert-dynamic", "vit-dynamic", "llama-f16",
]  # fmt: skip


def checked(folder: Path, **options: object) -> CheckReport:
    return check(folder, SourceOverrides(), CheckOptions(provider="cpu", **options))[0]


def groups(report: CheckReport) -> set[str]:
    return {case.group for case in report.cases}


@pytest.mark.parametrize("name", SOUND)
def test_sound_exports_pass_every_case(name, exports, own):
    report = checked(own(exports[name]))
    assert report.verdict is Verdict.PASS, [(case.name, case.failures) for case in report.cases if case.failures]
    expected = {"adapter"}
    if "merged" not in name:
        expected |= {"base", "rows", "sequence"}
    if name.split("-")[0] in ("llama", "gpt2"):
        expected |= {"decoding"}
    assert groups(report) == expected
    for case in report.cases:
        if case.group == "adapter" and case.largest_effect is not None:
            share = case.measured("effect_share")
            assert abs(share.value - 1) <= share.limit < 0.1


def test_a_dynamic_export_is_compared_with_a_merged_one(exports, own):
    report = checked(own(exports["llama-dynamic"]), merged=exports["llama-sum"])
    case = next(case for case in report.cases if case.group == "merged-dynamic")
    assert case.passed and case.name == "merged chat + code"


def test_a_weighted_sum_is_compared_with_the_same_blend(exports, own, bases, adapters, tmp_path):
    chosen = tuple((str(adapters[name]), name) for name in ("chat", "code"))
    request = Request(str(bases["llama"]), chosen, "merge", weights=(0.7, 0.3))
    export(request, ExportOptions(tmp_path / "sum"))
    report = checked(own(exports["llama-dynamic"]), merged=tmp_path / "sum")
    case = next(case for case in report.cases if case.group == "merged-dynamic")
    assert case.passed, case.failures


def test_a_merged_export_is_not_compared_with_another(exports, own):
    with pytest.raises(UsageProblem, match="compares a merged export with a dynamic one"):
        checked(own(exports["llama-merged"]), merged=exports["llama-sum"])


def test_two_rows_are_enough_for_a_decoder(exports, own, tmp_path):
    (tmp_path / "rows.txt").write_text("def f(x):\nReturn a new list of the items.\n")
    report = checked(own(exports["llama-dynamic"]), data={None: tmp_path / "rows.txt"})
    assert report.verdict is Verdict.PASS, [(case.name, case.failures) for case in report.cases if case.failures]


def test_an_export_with_targets_and_no_adapter_is_checked(exports, own):
    report = checked(own(exports["classifier-targets"]))
    assert report.verdict is Verdict.PASS and "base" in groups(report)


def test_rows_are_counted_where_they_are_flattened(exports, own):
    found = {case.name: case.n_rows for case in checked(own(exports["classifier-dynamic"])).cases}
    names = list(found)
    assert found["8 mixed rows"] == found["8 mixed rows alone"] == 8
    sequence = next(name for name in names if " → " in name)
    assert found[sequence] == 8 * len(sequence.split(" → "))


def test_one_adapter_is_changed_for_none_and_back(exports, own):
    names = {case.name for case in checked(own(exports["features-dynamic"])).cases}
    assert "features → none → features" in names and not any("features → features" in name for name in names)


def test_a_crash_in_the_last_case_loses_nothing_that_was_compared(exports, own, monkeypatch):
    def raises(examination):
        raise RuntimeError("the session fell over")

    monkeypatch.setattr(run, "sequence_case", raises)
    folder = own(exports["classifier-dynamic"])
    with pytest.raises(RuntimeError, match="the session fell over"):
        checked(folder)
    stored = json.loads((folder / "reports/check.json").read_text())
    assert (stored["partial"], stored["stopped"]) == (True, "RuntimeError: the session fell over")
    assert stored["verdict"] == "ambiguous" and "8 mixed rows" in {case["name"] for case in stored["cases"]}
    for suffix in ("html", "md", "junit.xml"):
        text = (folder / f"reports/check.{suffix}").read_text()
        assert "Partial report: stopped by RuntimeError: the session fell over." in text
    assert '<error type="stopped"' in text


def test_a_crash_before_anything_was_compared_leaves_an_earlier_report(exports, own, monkeypatch):
    folder = own(exports["classifier-merged"])
    checked(folder)
    before = (folder / "reports/check.json").read_bytes()
    monkeypatch.setattr(run.Examination, "judge_alone", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checked(folder)
    assert (folder / "reports/check.json").read_bytes() == before


def test_labelled_data_gives_accuracies(exports, own, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"text {n}", "label_id": n % 3}) + "\n" for n in range(12)))
    report = checked(own(exports["bert-dynamic"]), data={"topic": data}, n_rows=8)
    case = next(case for case in report.cases if case.name == "topic")
    assert case.n_rows == 8
    assert case.accuracy.reference == case.accuracy.exported
    assert any(str(data) in line for line in report.data)


def test_a_label_beyond_an_adapter_s_classes_is_refused_before_any_work(exports, own, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a", "label_id": 3}\n')
    folder = own(exports["bert-dynamic"])
    with pytest.raises(InputRefused, match="none of the head's classes"):
        checked(folder, data={"topic": data})  # it has three
    data.write_text('{"text": "a", "label_id": 4}\n')
    assert checked(folder, data={"kind": data}).verdict is Verdict.PASS  # it has five


def test_data_for_an_adapter_that_is_not_there_is_refused(exports, own, tmp_path):
    (tmp_path / "rows.txt").write_text("a\n")
    with pytest.raises(UsageProblem, match="has no adapter 'topics'"):
        checked(own(exports["bert-dynamic"]), data={"topics": tmp_path / "rows.txt"})


def test_a_base_or_adapter_that_changed_is_refused(exports, own, adapters, bases):
    folder = own(exports["classifier-dynamic"])
    with pytest.raises(InputRefused, match="This adapter is not the one that was exported"):
        check(folder, SourceOverrides(None, {"plain": str(adapters["shades"])}), CheckOptions(provider="cpu"))
    with pytest.raises(InputRefused, match="This base is not the one that was exported"):
        check(folder, SourceOverrides(str(bases["tagger"])), CheckOptions(provider="cpu"))
    with pytest.raises(UsageProblem, match="The export has no adapter 'nobody'"):
        check(folder, SourceOverrides(None, {"nobody": str(adapters["shades"])}), CheckOptions(provider="cpu"))


def test_reports_are_written_beside_the_export(exports, own):
    folder = own(exports["classifier-merged"])
    report, files = check(folder, SourceOverrides(), CheckOptions(provider="cpu"))
    assert {path.relative_to(folder).as_posix() for path in files.values()} == {
        "reports/check.html", "reports/check.json", "reports/check.junit.xml", "reports/check.md",
    }  # fmt: skip
    stored = json.loads(files["json"].read_text())
    assert stored["verdict"] == report.verdict == "pass"
    assert stored["subject"]["graph_sha256"] == sha256_of(folder / "model.onnx")


# `ci/benchmarks/mutations.py` damages exports in every known way; here are a few that it has no row for.


def one(tensors: Tensors, ending: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(ending))


def zero_the_pairs(tensors: Tensors) -> None:
    for key in tensors:
        if key.endswith("lora_B.weight"):
            tensors[key] = tensors[key] * 0


def shift_the_bias(tensors: Tensors) -> None:
    tensors["classifier.bias"] += np.float32([0.01, 0, 0])


def negate_one(tensors: Tensors) -> None:
    tensors[one(tensors, "lora_B.weight")] *= -1


@pytest.mark.parametrize("mutate", [zero_the_pairs, shift_the_bias, negate_one])
def test_a_mutated_adapter_is_caught(mutate, exports, own):
    folder = own(exports["bert-dynamic"])
    file = "adapters/topic.onnx_adapter"
    tensors = adapter_tensors(folder, file)
    mutate(tensors)
    write_adapter_tensors(folder, file, tensors)
    report = checked(folder)
    assert report.verdict is Verdict.FAIL
    failed = {case.name for case in report.cases if not case.passed}
    assert "topic" in failed and "kind" not in failed, failed


def test_swapped_adapter_files_are_caught(exports, own):
    folder = own(exports["llama-dynamic"])
    files = [f"adapters/{name}.onnx_adapter" for name in ("chat", "code")]
    tensors = [adapter_tensors(folder, file) for file in files]
    for file, others in zip(files, reversed(tensors), strict=True):
        write_adapter_tensors(folder, file, others)
    failed = {case.name for case in checked(folder).cases if not case.passed}
    assert {"chat", "code", "8 mixed rows", "chat: padded on the left", "chat: cached steps"} <= failed
    assert "base" not in failed


def test_a_graph_that_lost_its_adapter_is_caught(exports, own):
    """A merged export whose weights are the base's: numbers near to right, the adapter gone."""
    folder = own(exports["llama-merged"])
    (folder / "model.onnx.data").write_bytes((exports["llama-base"] / "model.onnx.data").read_bytes())
    report = checked(folder)
    assert report.verdict is Verdict.FAIL
    assert any(case.group == "adapter" and not case.passed for case in report.cases)


@pytest.mark.parametrize("name", ["classifier.bias", "bert.embeddings.word_embeddings.weight"])
def test_a_wrong_base_weight_is_caught(name, exports, own):
    folder = own(exports["classifier-dynamic"])
    change_weight(folder, "model", name, lambda w: w + np.float32(0.05) * (np.arange(w.size) % 3 == 0).reshape(w.shape))
    failed = {case.name for case in checked(folder).cases if not case.passed}
    assert "base" in failed
