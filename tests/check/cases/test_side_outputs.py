"""What a graph gives beside its main output is compared, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stored_tensors import adapter_tensors, write_adapter_tensors

from lora_export.check.context import CheckOptions
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check


def cases_of(folder: Path) -> dict[str, tuple[str, bool]]:
    report, _ = check(folder, SourceOverrides(), CheckOptions(provider="cpu"))
    return {case.name: (case.group, case.passed) for case in report.cases}


@pytest.mark.parametrize("kind", ["merged", "dynamic"])
def test_a_pooled_output_is_compared(kind, exports, own):
    found = cases_of(own(exports[f"features-{kind}"]))
    assert found["features: pooler_output"] == ("adapter", True)
    assert (found.get("base: pooler_output") == ("base", True)) is (kind == "dynamic")


def test_a_wrong_pooler_is_caught_though_the_hidden_states_are_right(exports, own):
    folder, file = own(exports["features-dynamic"]), "adapters/features.onnx_adapter"
    tensors = adapter_tensors(folder, file)
    tensors["pooler.dense.lora_B.weight"] *= np.float32(0.5)
    write_adapter_tensors(folder, file, tensors)
    failed = {name for name, (_, passed) in cases_of(folder).items() if not passed}
    assert failed == {"features: pooler_output"}


def test_a_classifier_has_no_other_output(exports, own):
    assert not any("output" in name for name in cases_of(own(exports["classifier-merged"])))
