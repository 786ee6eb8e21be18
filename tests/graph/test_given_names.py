"""A given graph whose names are no text: protobuf hands them on as bytes, which no pass takes."""

from __future__ import annotations

import pytest
from fuzzing.media import small_graphs

from lora_export.errors import InputRefused
from lora_export.graph.given import open_given


@pytest.mark.parametrize("name", [b"input_ids", b"Gather", b"q_proj/MatMul", b"logits"])
def test_names_that_are_no_text_are_refused(name, tmp_path):
    path = tmp_path / "model.onnx"
    whole = small_graphs()[0]
    path.write_bytes(whole)
    assert len(open_given(path).graph) == 3
    path.write_bytes(whole.replace(name, b"\xff" + name[1:]))
    with pytest.raises(InputRefused, match="has a name that is no text") as refused:
        open_given(path)
    assert refused.value.where == str(path) and "\\xff" in refused.value.found
