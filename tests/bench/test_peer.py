"""Graphs of other tools beside an export: fed by their inputs' names, or refused by them before any timing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lora_export.bench.differences import difference, unlike
from lora_export.bench.plan import BenchOptions, BenchPlan, plan_bench
from lora_export.bench.run import _race
from lora_export.contract import CacheLayout
from lora_export.errors import InputRefused
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import bench
from lora_export.report.text import render_bench_text
from lora_export.verdict import Verdict

INT, INT32, FLOAT = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT
TEXT = {"input_ids": (INT, ["rows", "tokens"]), "attention_mask": (INT, ["rows", "tokens"])}
PAST = {
    f"past_key_values.{i}.{kind}": (FLOAT, ["rows", 2, "past", "size"]) for i in (0, 1) for kind in ("key", "value")
}


def another_tools(export: Path, folder: Path, *without: str) -> Path:
    """The graph of an export as another tool leaves it: no manifest."""
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns("lora_export.json", "reports", *without))
    return folder


def graph_with(inputs: Mapping[str, tuple], path: Path) -> Path:
    """A file whose graph takes `inputs` and gives its first as floats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()]
    first = next(iter(inputs))
    node = helper.make_node("Cast", [first], ["logits"], to=FLOAT)
    output = helper.make_tensor_value_info("logits", FLOAT, inputs[first][1])
    graph = helper.make_graph([node], "other", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def planned(export: Path, against: Path, *shapes, **options) -> BenchPlan:
    return plan_bench(export, BenchOptions("cpu", shapes or [(2, 4, 0)], against=against, **options))


def test_a_decoder_of_another_tool_is_timed_in_the_same_blocks(exports, own, tmp_path, short_timing):
    """Its ratio, its memory, its operators and its outputs are in the report; the budget can hold the last to a gate."""
    export = own(exports["llama-merged"])
    other = another_tools(exports["llama-merged"], tmp_path / "builder")
    (tmp_path / "budget.toml").write_text("[difference]\nagainst = 1e-4\n", encoding="utf-8")
    options = BenchOptions("cpu", [(2, 1, 4)], blocks=6, against=other, budget=tmp_path / "budget.toml")
    report, files = bench(export, SourceOverrides(), options)
    (workload,) = report.workloads
    assert [(r.variant, r.against) for r in workload.ratios if r.against == "against"] == [
        ("merged", "against"), ("base", "against"),
    ]  # fmt: skip
    assert all(len(r.block_ratios) == 6 and r.low <= r.median <= r.high for r in workload.ratios)
    assert {m.variant for m in report.memory} == {"base", "merged", "against"}
    assert {p.session for p in report.placements} == {"base", "export", "against"}
    base, merged = report.differences
    assert (base.variant, merged.variant, merged.outputs) == ("base", "merged", ("logits",))
    assert merged.largest == 0 and merged.verdict is Verdict.PASS and report.verdict is Verdict.PASS
    assert base.share > 1e-3 and base.verdict is Verdict.NOT_GATED, "without the adapter it is another model"
    assert not any("Another model?" in note for note in report.notes)
    assert any("one buffer, as its genai_config.json says" in note for note in report.notes)
    assert (report.against.folder, report.against.kind) == (str(other), "other")
    assert set(report.against.n_bytes) == {"model.onnx", "model.onnx.data"}
    text, page = render_bench_text(report), files["html"].read_text("utf-8")
    for shown in (text, page):
        assert "merged ÷ against" in shown and "Is it the same model?" in shown and str(other) in shown
    assert json.loads(files["json"].read_text("utf-8"))["differences"][1]["share"] == 0


def test_it_gets_what_the_export_gets_in_its_own_dtype(exports, tmp_path):
    """A cache is one buffer only where that tool says so; sizes that the graph leaves open are the export's."""
    other = another_tools(exports["llama-f16-merged"], tmp_path / "f16", "genai_config.json")
    plan = planned(exports["llama-base"], other, (2, 1, 4))
    assert plan.against.contract.cache_layout is CacheLayout.COLUMNS
    race = _race(plan, plan.races[0])
    ours, theirs = race.inputs["export"]["model"], race.inputs["against"]["model"]
    assert set(ours) == set(theirs) and theirs["past_key_values.1.value"].dtype == np.float16
    for name, array in ours.items():
        np.testing.assert_array_equal(array.astype(theirs[name].dtype), theirs[name], err_msg=name)
    path = graph_with(
        {"token_type_ids": (INT, ["rows", "tokens"]), "input_ids": (INT32, ["rows", "tokens"])} | PAST,
        tmp_path / "a.onnx",
    )
    plan = planned(exports["llama-base"], path, (2, 1, 4))
    fed = _race(plan, plan.races[0]).inputs["against"]["model"]
    assert fed["input_ids"].dtype == np.int32 and not fed["token_type_ids"].any()
    np.testing.assert_array_equal(fed["input_ids"], ours["input_ids"])
    np.testing.assert_array_equal(fed["past_key_values.1.value"], ours["past_key_values.1.value"])


@pytest.mark.parametrize(
    ("name", "inputs", "shape", "words"),
    [
        ("bert-dynamic", TEXT | {"seqlens_k": (INT32, ["rows"])}, (2, 4, 0),
         ("has no values for", "input seqlens_k", "int32 [rows]", "input_ids, attention_mask")),
        ("bert-dynamic", TEXT | PAST, (2, 4, 0), ("has no values for", "input past_key_values.0.key")),
        ("bert-dynamic", {"pixel_values": (FLOAT, ["rows", 3, 8, 8])}, (2, 4, 0), ("has no values for", "pixel_values")),
        ("bert-dynamic", {"attention_mask": TEXT["attention_mask"]}, (2, 4, 0), ("does not take an input", "input input_ids")),
        ("bert-dynamic", {"input_ids": (INT, [1, "tokens"])}, (2, 4, 0),
         ("at 2x4", "input input_ids", "expected: [2, 4]", "int64 [1, tokens]")),
        ("bert-dynamic", TEXT | {"attention_mask": (FLOAT, ["rows", 1, "a", "b"])}, (2, 4, 0), ("at 2x4", "attention_mask")),
        ("llama-base", TEXT | PAST | {"past_key_values.1.key": (FLOAT, ["rows", 7, "past", "size"])}, (2, 1, 4),
         ("at 2x1@4", "input past_key_values.1.key", "[rows, 7, past,")),
        ("llama-base", TEXT | dict(list(PAST.items())[:2]), (2, 1, 4), ("does not take an input", "past_key_values.1.key")),
        ("llama-base", TEXT | PAST | {"past_key_values.2.key": PAST["past_key_values.0.key"]}, (2, 1, 4),
         ("has no values for", "input past_key_values.2.key")),
        ("llama-base", TEXT, (2, 1, 4), ("does not take an input", "past_key_values.0.key")),
        ("vit-merged", {"pixel_values": (FLOAT, ["rows", 3, 9, 9])}, (2, 0, 0), ("at 2x0", "pixel_values", "[rows, 3, 9, 9]")),
    ],
)  # fmt: skip
def test_what_cannot_be_fed_is_refused_by_name(name, inputs, shape, words, exports, tmp_path):
    path = graph_with(inputs, tmp_path / "other" / "model.onnx")
    with pytest.raises(InputRefused) as caught:
        planned(exports[name], path.parent, shape)
    for word in words:
        assert " ".join(word.split()) in " ".join(str(caught.value).split())


def test_a_graph_without_a_cache_runs_whole_texts_and_images_by_any_size(exports, tmp_path):
    assert planned(exports["llama-base"], graph_with(TEXT, tmp_path / "nocache.onnx"), (2, 4, 0)).against
    open_sizes = {"pixel_values": (FLOAT, ["rows", "channels", "height", "width"])}
    plan = planned(exports["vit-merged"], graph_with(open_sizes, tmp_path / "open.onnx"), (2, 0, 0))
    race = _race(plan, plan.races[0])
    np.testing.assert_array_equal(
        race.inputs["against"]["model"]["pixel_values"], race.inputs["export"]["model"]["pixel_values"]
    )


def test_folders_that_hold_no_one_graph_are_refused(exports, tmp_path):
    export = exports["bert-dynamic"]

    def refused(path: Path, of: Path = export) -> str:
        with pytest.raises(InputRefused) as caught:
            planned(of, path)
        return str(caught.value)

    assert "no graph in the folder" in refused(tmp_path) and "There is no such graph" in refused(tmp_path / "gone")
    graph_with(TEXT, tmp_path / "model_optimized.onnx")
    assert planned(export, tmp_path).against.graph.name == "model_optimized.onnx"
    graph_with(TEXT, tmp_path / "model_quantized.onnx")
    assert "model_optimized.onnx, model_quantized.onnx" in refused(tmp_path) and "name the .onnx file" in refused(
        tmp_path
    )
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    assert "ONNX Runtime cannot open the graph" in refused(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model_optimized.onnx"}}}')
    assert planned(export, tmp_path).against.graph.name == "model_optimized.onnx"
    (tmp_path / "genai_config.json").write_text("{")
    assert "genai_config.json is not valid JSON" in refused(tmp_path)
    assert "several graphs" in refused(tmp_path / "model_optimized.onnx", exports["t5-merged"])


def test_a_difference_is_only_limited_where_there_is_another(exports, tmp_path):
    (tmp_path / "budget.toml").write_text("[difference]\nagainst = 0.1\n", encoding="utf-8")
    options = {"budget": tmp_path / "budget.toml"}
    with pytest.raises(InputRefused, match="a difference that this bench does not measure"):
        plan_bench(exports["bert-merged"], BenchOptions("cpu", [(2, 4, 0)], **options))
    assert planned(exports["bert-merged"], exports["bert-merged"], **options).budget.difference == 0.1


def judged(ours: Mapping, theirs: Mapping, allowance: float | None = 1e-3):
    here, there = ({name: np.array(value) for name, value in each.items()} for each in (ours, theirs))
    return difference("w", "v", ours=here, theirs=there, allowance=allowance)


def test_differences_of_outputs():
    lowest = float("-inf")
    same = judged({"logits": [[1.0, lowest]]}, {"logits": [[1.0005, lowest]], "more": [1.0]}, None)
    assert same.outputs == ("logits",) and same.largest == pytest.approx(5e-4) and same.verdict is Verdict.NOT_GATED
    assert judged({"logits": [[2.0, 4.0]]}, {"logits": [[2.0, 4.004]]}).verdict is Verdict.PASS
    far = judged({"logits": [[2.0, 4.0]]}, {"logits": [[2.0, 5.0]]})
    assert (far.largest, far.share, far.verdict) == (1.0, 0.25, Verdict.FAIL)
    assert judged({"logits": [[1.0]]}, {"logits": [[float("nan")]]}).verdict is Verdict.FAIL
    named = judged({"last_hidden_state": [[1.0]]}, {"output": [[1.0]]})
    assert named.outputs == ("last_hidden_state and output",) and named.verdict is Verdict.PASS
    last = judged({"logits": [[[9.0], [2.0]]]}, {"logits": [[[2.0]]]})
    assert (last.largest, last.verdict) == (0.0, Verdict.PASS)
    other = judged({"logits": [[1.0, 2.0]]}, {"logits": [[1.0]]})
    assert (other.outputs, other.share, other.verdict) == ((), None, Verdict.FAIL)
    assert unlike([far, same]) == unlike([]) == ()
    (note,) = unlike([far, other])
    assert note.startswith("Another model? At w ") and "v 25.0%, v not comparable" in note
