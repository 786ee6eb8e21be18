"""A text that is longer than the model takes is refused in words, where ONNX Runtime cannot run it."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.errors import UsageProblem
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.positions import n_positions


def text(n_tokens: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.full((1, n_tokens), 3), "attention_mask": np.ones((1, n_tokens), np.int64)}


@pytest.mark.parametrize(
    ("name", "too_many"),
    [("bert-merged", 1), ("gpt2-merged", 1), ("llama-dynamic", 4096)],
    ids=["a table of an encoder", "a table of a decoder", "tables inside the attention"],
)
def test_what_onnx_runtime_cannot_run_is_too_long(name, too_many, exports):
    session = AdapterSession(exports[name], "cpu")
    longest = n_positions(session.folder)
    session.run(text(longest))
    said = rf"longer than the model has positions[\s\S]*at most {longest} tokens[\s\S]*{longest + too_many}"
    with pytest.raises(UsageProblem, match=said):
        session.run(text(longest + too_many))


def test_what_it_can_run_is_run(exports):
    """Positions without a table have no end, as in PyTorch."""
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    n_tokens = n_positions(session.folder) + 1
    assert session.run(text(n_tokens), outputs=["logits"])["logits"].shape[1] == n_tokens


def test_another_error_is_told_as_it_is(exports):
    session = AdapterSession(exports["gpt2-merged"], "cpu")
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session.run({"input_ids": np.full((1, 2), 10**6), "attention_mask": np.ones((1, 2), np.int64)})


@pytest.mark.parametrize("changed", [{"token": 10**6}, {"output": "nothing"}])
def test_a_long_text_does_not_explain_other_errors(exports, changed):
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    fed, n_tokens = text(n_positions(session.folder) + 9), n_positions(session.folder) + 9
    fed["input_ids"][0, 0] = changed.get("token", 3)
    with pytest.raises(Exception, match=r"out of data bounds|nothing|output") as raised:
        session.run(fed, outputs=[changed.get("output", "logits")])
    assert "longer than" not in str(raised.value) and n_tokens > 64
