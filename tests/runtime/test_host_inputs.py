"""What a tokenizer gives is enough: the session fills in what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import transformers
from references import error
from transformers import AutoTokenizer

from lora_export.contract import GraphContract, TensorSpec
from lora_export.errors import UsageProblem
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.host_inputs import completed_inputs

TEXTS = ["a longer text than the other", "a text"]


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("bert-dynamic", "topic"), ("albert-dynamic", "shared"), ("tagger-dynamic", "tags"), ("llama-dynamic", "chat"),
     ("gpt2-dynamic", "poet"), ("llama-merged", None), ("llama-f16", "chat")],
)  # fmt: skip
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_session_runs_what_the_tokenizer_gives(name, adapter, side, exports):
    session = AdapterSession(exports[name], "cpu")
    tokenizer = AutoTokenizer.from_pretrained(exports[name], padding_side=side)
    given = dict(tokenizer(TEXTS, return_tensors="np", padding=True))
    found = session.run(given, adapter)
    mask = given["attention_mask"]
    whole = given | {"token_type_ids": np.zeros_like(mask), "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    for spec in session.manifest.contract.inputs:
        if spec.name.startswith("past_key_values."):
            whole[spec.name] = np.zeros((2, spec.dims[1], 0, spec.dims[3]), spec.dtype)
    own = {spec.name: whole[spec.name] for spec in session.manifest.contract.inputs}
    for output, array in session.run(own, adapter).items():
        assert np.array_equal(found[output], array), output
    assert session.feeds(given, adapter).keys() == session.feeds(own, adapter).keys()


def spec(name: str, *dims: int | str, dtype: str = "int64") -> TensorSpec:
    return TensorSpec(name, dtype, ("batch_size", *dims))


ENCODER = GraphContract((spec("input_ids", "n"), spec("attention_mask", "n")), ())
DECODER = GraphContract(
    (*ENCODER.inputs, spec("position_ids", "n"), spec("past_key_values.0.key", 2, "past", 16, dtype="float16")), ()
)
IDS = np.array([[5, 6, 7]])


def test_token_types_that_the_model_has_no_table_for_are_left_out():
    given = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}
    assert set(completed_inputs(given, ENCODER)) == {"input_ids", "attention_mask"}


def test_positions_count_the_real_tokens_of_the_cache_too():
    mask = np.array([[0, 0, 1, 1, 1, 1]])
    past = np.zeros((1, 2, 3, 16), np.float16)
    found = completed_inputs({"input_ids": IDS, "attention_mask": mask, "past_key_values.0.key": past}, DECODER)
    assert found["position_ids"].tolist() == [[1, 2, 3]] and found["position_ids"].dtype == np.int64
    assert found["past_key_values.0.key"] is past
    empty = completed_inputs({"input_ids": IDS, "attention_mask": mask[:, 3:]}, DECODER)
    assert empty["past_key_values.0.key"].shape == (1, 2, 0, 16)
    assert empty["past_key_values.0.key"].dtype == np.float16


def test_a_mask_of_the_new_tokens_alone_does_not_say_their_positions():
    given = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "past_key_values.0.key": np.zeros((1, 2, 4, 16))}
    with pytest.raises(UsageProblem, match="positions do not follow from it") as refused:
        completed_inputs(given, DECODER)
    assert (refused.value.expected, refused.value.found) == ("4 + 3 columns", "3")


def test_what_has_no_obvious_value_is_asked_for():
    two = GraphContract((*DECODER.inputs, spec("past_key_values.0.value", 2, "past", 16)), ())
    past = {"past_key_values.0.key": np.zeros((1, 2, 4, 16))}
    for contract, given, said in (
        (ENCODER, {"input_ids": IDS}, "attention_mask is missing"),
        (DECODER, {"input_ids": IDS}, "attention_mask is missing, position_ids is missing"),
        (two, {"input_ids": IDS, "attention_mask": np.ones((1, 7)), **past}, "past_key_values.0.value is missing"),
        (ENCODER, {"input_ids": IDS, "attention_mask": IDS, "pixels": IDS}, "pixels is unknown"),
    ):
        with pytest.raises(UsageProblem, match="not those of the graph") as refused:
            completed_inputs(given, contract)
        assert refused.value.where == said


def test_roberta_takes_what_its_tokenizer_gives(tmp_path):
    """Its config's default says two token types; its tokenizer gives none, and Optimum's graph asks for none."""
    base = tmp_path / "base"
    config = tiny.bert_config().to_dict() | {"model_type": "roberta", "pad_token_id": 0}
    model = transformers.RobertaModel(transformers.RobertaConfig(**config))
    tiny.randomize(model, "roberta").save_pretrained(base)
    tiny.save_tokenizer(base, classifier=True)
    export(Request(str(base), (), "merge"), ExportOptions(tmp_path / "out"))
    session = AdapterSession(tmp_path / "out", "cpu")
    assert [spec.name for spec in session.manifest.contract.inputs] == ["input_ids", "attention_mask"]
    given = AutoTokenizer.from_pretrained(base)(TEXTS, return_tensors="np", padding=True)
    found = session.run(dict(given))["last_hidden_state"]
    with torch.no_grad():
        expected = model.eval()(**{name: torch.from_numpy(array) for name, array in given.items()}).last_hidden_state
    real = given["attention_mask"] == 1
    assert error(found[real], expected.numpy()[real]) < 1e-5


@pytest.mark.parametrize("given", [-1, 1.0, [1, 2], "1"])
def test_a_number_of_logits_that_is_none_is_a_usage_error(given, exports):
    session, ids = AdapterSession(exports["llama-dynamic"], "cpu"), np.array([[20, 30]])
    with pytest.raises(UsageProblem, match="number of logits to keep is no number of tokens"):
        session.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "num_logits_to_keep": given})
