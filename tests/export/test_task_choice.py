"""The task that is exported is the adapters', told by what they record or by the names in their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan


@pytest.fixture
def masked(bases, own) -> Path:
    """A base that says that it fills masks, as most encoders do."""
    base = own(bases["bert"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    return base


def untyped(base: Path, folder: Path, model_class: str, *, records_class: bool, **options: object) -> Path:
    """An adapter without a task type, with the class it was trained on or without."""
    tiny.adapter(base, folder, model_class, r=2, target_modules=["query"], **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["auto_mapping"]["base_model_class"] == model_class
    if not records_class:
        config["auto_mapping"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def plan_of(base: Path, adapter: Path, task: str | None = None):
    return make_plan(Request(str(base), ((str(adapter), None),), "merge", task))


def test_the_class_that_peft_recorded_tells_it(masked, tmp_path):
    adapter = untyped(
        masked, tmp_path / "a", "BertForTokenClassification", records_class=True, modules_to_save=["classifier"]
    )
    plan = plan_of(masked, adapter)
    assert plan.task == "token-classification"
    assert [remark for remark in plan.remarks if "exporting" in remark] == []


def test_names_tell_it_where_one_task_alone_has_them(masked, tmp_path):
    adapter = untyped(masked, tmp_path / "a", "BertModel", records_class=False)
    plan = plan_of(masked, adapter)
    assert plan.task == "feature-extraction"
    assert plan.remarks == (
        "exporting feature-extraction: it is the task whose model has the adapter's modules (--task names another)",
    )
    head = untyped(
        masked, tmp_path / "b", "BertForQuestionAnswering", records_class=False, modules_to_save=["qa_outputs"]
    )
    assert plan_of(masked, head).task == "question-answering"


def test_names_that_several_tasks_have_are_refused_with_those_tasks(masked, tmp_path):
    adapter = untyped(
        masked, tmp_path / "a", "BertForSequenceClassification", records_class=False, modules_to_save=["classifier"]
    )
    with pytest.raises(InputRefused, match="The adapter has modules that the base's model for fill-mask") as refused:
        plan_of(masked, adapter)
    assert refused.value.found == "classifier.bias, classifier.weight"
    wanted = ("text-classification", "token-classification", "multiple-choice")
    assert refused.value.next_step == "name its task: " + " or ".join(f"--task {task}" for task in wanted)
    assert plan_of(masked, adapter, "text-classification").task == "text-classification"


def test_a_task_that_was_named_and_does_not_fit_is_refused_with_the_one_that_does(bases, adapters):
    with pytest.raises(InputRefused, match="the base's model for text-classification does not have") as refused:
        plan_of(bases["bert"], adapters["features"], "text-classification")
    assert refused.value.next_step == "name its task: --task feature-extraction"


def test_what_fits_no_task_is_told_by_the_reader(bases, adapters):
    assert plan_of(bases["bert"], adapters["chat"], "feature-extraction").task == "feature-extraction"
