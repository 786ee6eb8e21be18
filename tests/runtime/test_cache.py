"""A cache between runs, in place or handed on, gives what one run over all tokens gives."""

from __future__ import annotations

import numpy as np
import pytest
from references import outputs_of, unmerged

from lora_export.contract import CacheLayout
from lora_export.errors import UsageProblem
from lora_export.runtime.adapter_session import AdapterSession

LENGTH = 12
NAMES = ["chat", None, "code"]
MASKS = {
    "left": [[0] * 4 + [1] * 8, [1] * 12, [0] * 1 + [1] * 11],
    "right": [[1] * 4 + [0] * 2 + [1] * 6, [1] * 12, [1] * 5 + [0] + [1] * 6],
    "between": [[1, 0, 1, 1, 0, 1] + [1] * 6, [1] * 12, [0, 1, 1, 1, 1, 0] + [1] * 6],
}


@pytest.fixture(scope="module")
def session(exports) -> AdapterSession:
    return AdapterSession(exports["llama-dynamic"], "cpu")


@pytest.fixture(scope="module")
def models(bases, adapters) -> dict:
    return {name: unmerged(bases["llama"], "LlamaForCausalLM", [adapters[name]] if name else []) for name in NAMES}


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(5, 250, (3, LENGTH))


def expected(models, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each row's real tokens alone, without padding or cache."""
    found = np.zeros((*ids.shape, 260), np.float32)
    for row, name in enumerate(NAMES):
        real = mask[row] == 1
        found[row, real] = outputs_of(models[name], {"input_ids": ids[row : row + 1, real]})[0]
    return found


@pytest.mark.parametrize("padding", list(MASKS))
@pytest.mark.parametrize("cuts", [[6, 7, 8, 12], [6, 9, 12]], ids=["step by step", "chunks"])
def test_runs_on_a_cache_equal_each_row_alone(padding, cuts, session, models):
    ids, mask = tokens(), np.array(MASKS[padding])
    cache = session.cache(3, LENGTH)
    found, start = [], 0
    for end in cuts:
        inputs = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        results = session.run(inputs, NAMES, cache=cache)
        assert list(results) == ["logits"]
        found.append(results["logits"])
        start = end
    whole = expected(models, ids, mask)
    assert np.abs(np.concatenate(found, axis=1) - whole)[mask == 1].max() < 1e-4 * np.abs(whole).max()
    assert cache.length == LENGTH


def test_past_and_present_as_arrays_equal_the_cache(session):
    ids, mask = tokens(), np.array(MASKS["left"])
    first = session.run({"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}, NAMES)
    past = {name.replace("present", "past_key_values"): array for name, array in first.items() if name != "logits"}
    second = session.run({"input_ids": ids[:, 6:7], "attention_mask": mask[:, :7]} | past, NAMES)
    cache = session.cache(3, LENGTH)
    session.run({"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}, NAMES, cache=cache)
    held = session.run({"input_ids": ids[:, 6:7], "attention_mask": mask[:, :7]}, NAMES, cache=cache)
    assert np.array_equal(second["logits"], held["logits"])


def test_a_cache_that_is_full_says_so(session):
    cache = session.cache(1, 3)
    session.run({"input_ids": np.ones((1, 2), np.int64), "attention_mask": np.ones((1, 2), np.int64)}, cache=cache)
    with pytest.raises(UsageProblem, match="no room") as caught:
        session.run({"input_ids": np.ones((1, 2), np.int64), "attention_mask": np.ones((1, 4), np.int64)}, cache=cache)
    assert "at most 3 tokens" in str(caught.value) and "2 and 2 new ones" in str(caught.value)


def test_a_graph_without_a_cache_has_none(exports):
    with pytest.raises(UsageProblem, match="no cache"):
        AdapterSession(exports["bert-dynamic"], "cpu").cache(1, 8)


def test_the_manifest_says_where_a_token_is_kept(exports):
    assert AdapterSession(exports["llama-dynamic"], "cpu").manifest.contract.cache_layout is CacheLayout.TOKENS
    assert AdapterSession(exports["bert-dynamic"], "cpu").manifest.contract.cache_layout is None


def test_a_bound_run_writes_into_the_cache_it_reads(session):
    from lora_export.bench.latency import bound_run
    from lora_export.bench.workloads import random_inputs

    inputs = random_inputs(session.contract, 250, (2, 1, 5))
    run = bound_run(session, NAMES[:2], inputs)
    expected = session.run(inputs, NAMES[:2])
    run()
    for layer in (0, 1):
        for part in ("key", "value"):
            written = run.held[f"past_key_values.{layer}.{part}"].numpy()
            assert written.shape[2] == 6
            np.testing.assert_array_equal(written, expected[f"present.{layer}.{part}"])
