"""What a bench will time: the other export's place in it, and refusals before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort
import pytest
from click.testing import CliRunner

from lora_export import pipeline
from lora_export.artifact import read_manifest
from lora_export.bench.plan import BenchOptions, BenchPlan, candidates, foldable, plan_bench
from lora_export.cli.main import main
from lora_export.contract import AdapterInputKind
from lora_export.errors import InputRefused, UsageProblem
from lora_export.quantization import Method, Quantization


def plan_of(folder: Path, tmp_path: Path, budget: str = "", **options) -> BenchPlan:
    if budget:
        (tmp_path / "budget.toml").write_text(budget, encoding="utf-8")
        options["budget"] = tmp_path / "budget.toml"
    return plan_bench(folder, BenchOptions("cpu", **({"shapes": [(2, 4, 0)]} | options)))


def ratios(plan: BenchPlan) -> list[tuple[str, str, float | None]]:
    return [(c.variant, c.reference, c.allowance) for race in plan.races for c in race.comparisons]


def test_every_variant_is_compared_with_the_base(exports, tmp_path):
    plan = plan_of(exports["bert-dynamic"], tmp_path, max_ratio=1.1)
    names = ("merged", "dynamic, no adapter", "dynamic", "mixed rows")
    assert ratios(plan) == [*((name, "base", 1.1) for name in names), ("changing rows", "base", None)]


def test_a_base_alone_is_timed_too(exports, tmp_path):
    assert ratios(plan_of(exports["llama-base"], tmp_path)) == [("export", "base", None)]


@pytest.mark.parametrize(
    ("name", "other", "ratio", "description"),
    [
        ("bert-dynamic", "bert-dynamic", ("dynamic", "against"), "topic for every row"),
        ("bert-dynamic", "bert-merged", ("dynamic", "against"), "kind folded into the weights"),
        ("bert-merged", "bert-dynamic", ("merged", "against"), "kind for every row"),
        ("llama-base", "llama-merged", ("export", "against"), "chat folded into the weights"),
        ("llama-merged", "llama-base", ("merged", "against"), "no adapter folded into the weights"),
    ],
)
def test_another_export_is_one_more_candidate(name, other, ratio, description, exports, tmp_path):
    plan = plan_of(
        exports[name], tmp_path, '[ratio]\nagainst = 1.02\n[ratio."2x4"]\nagainst = 1.01', against=exports[other]
    )
    (race,) = plan.races
    assert race.candidates[-1].session == "against"
    assert race.candidates[-1].description == f"{exports[other]}: {description}"
    assert ratios(plan)[-1] == (*ratio, 1.01)
    assert [reference for _, reference, _ in ratios(plan)].count("against") == 1


def test_another_task_is_refused(exports, tmp_path):
    with pytest.raises(InputRefused) as caught:
        plan_of(exports["bert-dynamic"], tmp_path, against=exports["llama-merged"])
    for word in ("do different tasks", "text-classification", "text-generation", str(exports["llama-merged"])):
        assert word in str(caught.value)


def test_other_inputs_are_refused(exports, own, tmp_path):
    other = own(exports["bert-merged"])
    manifest = json.loads((other / "lora_export.json").read_text())
    manifest["contract"]["inputs"][0]["name"] = "tokens"
    (other / "lora_export.json").write_text(json.dumps(manifest))
    with pytest.raises(InputRefused, match="take different inputs") as caught:
        plan_of(exports["bert-dynamic"], tmp_path, against=other)
    assert "input_ids" in str(caught.value) and "tokens" in str(caught.value)


def test_no_export_is_refused(exports, tmp_path):
    with pytest.raises(InputRefused, match=r"no graph in the folder[^$]*lora_export.json, model.onnx"):
        plan_of(exports["bert-dynamic"], tmp_path, against=tmp_path)


def test_the_budget_and_the_short_form(exports, tmp_path):
    budget = '[ratio]\ndynamic = 1.2\n[ratio."2x4"]\n"mixed rows" = 1.3'
    plan = plan_of(exports["bert-dynamic"], tmp_path, budget, max_ratio=1.1)
    assert [allowance for *_, allowance in ratios(plan)] == [1.1, 1.1, 1.2, 1.3, None]


def test_a_shape_is_named_as_it_was_asked_for(exports, tmp_path):
    """Speech has a length of its own, which the report shows and the budget need not know."""
    plan = plan_of(exports["whisper-merged"], tmp_path, '[ratio."2x0@4"]\nmerged = 1.5', shapes=[(2, 0, 4)])
    assert plan.races[0].shape == (2, 50, 4) and ratios(plan) == [("merged", "base", 1.5)]


@pytest.mark.parametrize(
    ("budget", "what", "known"),
    [
        ("[ratio]\nstatic = 1.1", "static", "merged, dynamic, no adapter, dynamic, mixed rows"),
        ("[ratio]\nbase = 1.1", "base", "merged, dynamic, no adapter"),
        ("[ratio]\nagainst = 1.1", "against", "or give --against FOLDER"),
        ('[ratio."4x128"]\ndynamic = 1.1', "4x128", "2x4"),
        ('[ratio."2x4"]\nstatic = 1.1', "static", "mixed rows"),
        ("[memory_mb]\nstatic = 9", "static", "base, merged"),
        ("[device_memory_mb]\nstatic = 9", "static", "base, merged"),
    ],
)
def test_allowances_that_match_nothing_are_refused(budget, what, known, exports, tmp_path):
    with pytest.raises(InputRefused, match="that this bench does not measure") as caught:
        plan_of(exports["bert-dynamic"], tmp_path, budget)
    assert f"found:    {what}" in str(caught.value) and known in str(caught.value)


def test_swaps_of_a_merged_export_are_not_measured(exports, tmp_path):
    with pytest.raises(InputRefused, match="a swap that this bench does not measure"):
        plan_of(exports["bert-merged"], tmp_path, "[swap_us]\nbound = 9")
    assert plan_of(exports["bert-dynamic"], tmp_path, "[swap_us]\nbound = 9").budget.swap_us == {"bound": 9.0}


def test_the_sample_fits_a_classifier_s_usual_shapes(exports):
    sample = Path(__file__).parents[2] / "ci/latency-budget.toml"
    plan = plan_bench(exports["bert-dynamic"], BenchOptions("cpu", budget=sample))
    by_shape = {race.shape: {c.variant: c.allowance for c in race.comparisons} for race in plan.races}
    assert by_shape[4, 128, 0]["dynamic"] < by_shape[1, 32, 0]["dynamic"] == by_shape[16, 64, 0]["dynamic"]
    assert by_shape[16, 64, 0]["mixed rows"] is None is not by_shape[4, 128, 0]["mixed rows"]


def test_the_merged_form_is_of_an_adapter_that_merge_takes(exports):
    """An activated LoRA, and one that adds a bias to a module without one, are served only."""
    manifest = read_manifest(exports["llama-dynamic"])
    first, second = manifest.adapters
    late = replace(manifest, adapters=(replace(first, invocation_tokens=(7,)), second))
    assert (foldable(manifest), foldable(late)) == (first.name, second.name)
    found = candidates(late, 1)
    assert [(each.name, each.description.split()[0]) for each in found if each.name in ("merged", "dynamic")] == [
        ("merged", second.name), ("dynamic", second.name),
    ]  # fmt: skip
    contract = manifest.contract
    pair = contract.adapter_inputs[0]
    bias = replace(pair, kind=AdapterInputKind.BIAS, name=f"{pair.module}.bias", base_has_default=False)
    graphs = {"model": replace(contract, adapter_inputs=(*contract.adapter_inputs, bias))}
    bare = replace(manifest, graphs=graphs)
    assert pair.module in first.targets and pair.module in second.targets and foldable(bare) is None
    assert [each.name for each in candidates(bare, 1)] == ["base", "dynamic, no adapter", "dynamic"]
    own = replace(manifest, quantization=Quantization(method=Method.AS_STORED))
    assert [each.name for each in candidates(own, 1)] == ["base", "dynamic, no adapter", "dynamic"]


def test_what_is_run_row_by_row_is_not_timed(exports):
    with pytest.raises(UsageProblem, match="row by row") as caught:
        plan_bench(exports["llama-base"], BenchOptions("cpu", [(1, 3, 4), (2, 3, 4)]))
    assert "--shape 2x3@4" in str(caught.value) and "(1x3@4)" in str(caught.value)
    plan_bench(exports["bert-dynamic"], BenchOptions("cpu", [(2, 3, 0)]))


WRONG = {
    "a past without a cache": ("bert-dynamic", ["--shape", "2x4@3"], 2, "no cache, so there is no past"),
    "more tokens than positions": ("bert-dynamic", ["--shape", "1x4000"], 2, "more tokens than the model has positions"),
    "no rows": ("bert-dynamic", ["--shape", "0x4"], 2, "is not BATCHxSEQUENCE"),
    "no tokens": ("llama-dynamic", ["--shape", "2x0@4"], 2, "The shape has no tokens"),
    "less than no past": ("llama-dynamic", ["--shape", "1x4@-1"], 2, "is not BATCHxSEQUENCE"),
    "an empty past": ("llama-dynamic", ["--shape", "1x4@"], 2, "is not BATCHxSEQUENCE"),
    "one of several": ("llama-dynamic", ["--shape", "1x4", "--shape", "1x4x4"], 2, "is not BATCHxSEQUENCE"),
    "rows that go on together": ("llama-dynamic", ["--shape", "2x4@3"], 2, "are run row by row"),
    "too few blocks": ("bert-dynamic", ["--blocks", "5"], 2, "--blocks"),
    "a ratio that is none": ("bert-dynamic", ["--max-ratio", "nan"], 2, "is no ratio"),
    "a negative ratio": ("bert-dynamic", ["--max-ratio", "-1"], 2, "is no ratio"),
    "no budget there": ("bert-dynamic", ["--budget", "no.toml"], 3, "There is no such budget"),
    "nothing to compare with": ("bert-dynamic", ["--against", "nowhere"], 3, "nowhere"),
    "an unusable provider": ("bert-dynamic", ["--provider", "cuda"], 4, "CUDA"),
    "an unknown provider": ("bert-dynamic", ["--provider", "tpu"], 2, "tpu"),
    "an adapter of another name": ("bert-dynamic", ["--adapter", "topics=x"], 2, "topics"),
    "an adapter that is not there": ("bert-dynamic", ["--adapter", "topic=nowhere"], 3, "nowhere"),
    "a base that is not there": ("bert-dynamic", ["--base", "nowhere"], 3, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_every_option_is_looked_at_before_anything_is_exported_or_measured(case, exports, monkeypatch):
    name, given, code, said = WRONG[case]
    if "cuda" in given and "CUDAExecutionProvider" in ort.get_available_providers() and Path("/dev/nvidia0").exists():
        pytest.skip("CUDA is usable here")

    folder = exports[name]  # which may be exported now

    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(pipeline, "export", no_work)
    monkeypatch.setattr(pipeline, "run_measurements", no_work)
    found = CliRunner().invoke(main, ["bench", str(folder), *given])
    assert found.exit_code == code and said in found.output, found.output
    assert "work was begun" not in found.output
