"""The gate of activated LoRA, against PEFT's own search, and what a session asks of its host."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets
from references import error

from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, add_adapter, export
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import empty_cache
from lora_export.runtime.invocation import gate_of, last_occurrence

TOKENS = (70, 71)


@pytest.mark.parametrize("seed", range(20))
def test_the_gate_opens_where_peft_finds_the_invocation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3, (16, rng.integers(1, 9)))
    invocation = rng.integers(0, 3, rng.integers(1, 4)).tolist()
    config = {"a": LoraConfig(alora_invocation_tokens=invocation, task_type="CAUSAL_LM")}
    offsets = calculate_alora_offsets(config, "a", torch.from_numpy(ids))
    gate = gate_of(ids, [invocation] * len(ids))[:, :, 0]
    assert gate.sum(axis=1).tolist() == [offset or 0 for offset in offsets]
    assert (np.diff(gate, axis=1) >= 0).all(), "once active, always active"


def test_the_last_occurrence_counts() -> None:
    assert last_occurrence(np.array([1, 2, 1, 2, 3]), [1, 2]) == 2
    assert last_occurrence(np.array([1, 1, 1]), [1, 1]) == 1
    assert last_occurrence(np.array([1, 2]), [2, 1]) is None
    assert last_occurrence(np.array([1]), [1, 2]) is None


@pytest.fixture(scope="module")
def session(bases, tmp_path_factory: pytest.TempPathFactory) -> AdapterSession:
    root = tmp_path_factory.mktemp("invocation")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    for name, more in {"late": {"alora_invocation_tokens": list(TOKENS)}, "plain": {}}.items():
        tiny.trained(bases["llama"], root / name, "LlamaForCausalLM", LoraConfig(**options, **more))
    chosen = tuple((str(root / name), name) for name in ("late", "plain"))
    request = Request(str(bases["llama"]), chosen, "dynamic", task="text-generation")
    export(request, ExportOptions(root / "out"))
    return AdapterSession(root / "out", "cpu")


def feeds(session: AdapterSession, ids: list[list[int]]) -> dict[str, np.ndarray]:
    array = np.array(ids, np.int64)
    positions = np.tile(np.arange(array.shape[1]), (len(array), 1))
    own = {"input_ids": array, "attention_mask": np.ones_like(array), "position_ids": positions}
    return own | empty_cache(session, len(array))


def test_it_is_the_base_before_its_invocation_and_without_one(session: AdapterSession) -> None:
    inputs = feeds(session, [[9, 20, *TOKENS, 30], [9, 20, 70, 30, 71]])
    base, late = (session.run(inputs, name)["logits"] for name in (None, "late"))
    assert error(late[1], base[1]) == 0
    assert error(late[0, :2], base[0, :2]) == 0
    assert error(late[0, 2:], base[0, 2:]) > 0.01


def test_rows_have_gates_of_their_own(session: AdapterSession) -> None:
    inputs = feeds(session, [[9, 20, *TOKENS, 30]] * 3)
    mixed = session.run(inputs, ["late", "plain", None])["logits"]
    for row, name in enumerate(["late", "plain", None]):
        assert error(mixed[row], session.run(inputs, name)["logits"][row]) < 1e-5


def test_a_cached_step_takes_the_gate_from_its_host(session: AdapterSession) -> None:
    ids = [[9, 20, *TOKENS, 30, 31]]
    whole = session.run(feeds(session, ids), "late")["logits"]
    first = session.run(feeds(session, [ids[0][:-1]]), "late")
    cache = {name: first[name.replace("past_key_values", "present")] for name in empty_cache(session, 1)}
    step = {"input_ids": np.array([[31]]), "attention_mask": np.ones((1, 6), np.int64), "position_ids": np.array([[5]])}
    with pytest.raises(UsageProblem, match="continues a cache") as refused:
        session.run(step | cache, "late")
    assert "session.gate" in refused.value.next_step
    gate = session.gate(np.array([ids[0][:-1]]), "late")[:, -1:]
    assert error(session.run(step | cache | {"lora_gate": gate}, "late")["logits"][0, 0], whole[0, -1]) < 1e-5
    assert error(session.run(step | cache | {"lora_gate": 0 * gate}, "late")["logits"][0, 0], whole[0, -1]) > 0.01


def test_an_export_without_its_gate_takes_no_activated_adapter(bases, session, tmp_path) -> None:
    """It would be active for all tokens, in silence."""
    late, plain = (str(session.folder.parent / name) for name in ("late", "plain"))
    request = Request(str(bases["llama"]), ((plain, "plain"),), "dynamic", task="text-generation")
    export(request, ExportOptions(tmp_path / "out"))
    with pytest.raises(InputRefused, match="has no gate for the activated LoRA 'later'") as refused:
        add_adapter(tmp_path / "out", [(late, "later")], SourceOverrides())
    assert "model.layers.0.self_attn.q_proj" in refused.value.where
    assert not list((tmp_path / "out/adapters").glob("later*"))


def test_a_blend_with_another_adapter_is_refused(session: AdapterSession) -> None:
    with pytest.raises(UsageProblem, match="one gate"):
        session.run(feeds(session, [[9, *TOKENS]]), {"late": 0.5, "plain": 0.5})


def test_an_adapter_and_its_invocation_are_loaded_at_once(session: AdapterSession, monkeypatch) -> None:
    """A run right after the tensors are there waits for the invocation, as every later one."""
    session = session.snapshot()
    inputs = feeds(session, [[9, 20, *TOKENS, 30]])
    expected = session.run(inputs, "late")["logits"]
    put, found = session._shelf.put, []

    def put_and_run(*args, **named) -> None:
        put(*args, **named)
        found.append(session.run(inputs, "later")["logits"])

    monkeypatch.setattr(session._shelf, "put", put_and_run)
    session.load(session.folder / "adapters/late.onnx_adapter", "later", invocation_tokens=TOKENS)
    np.testing.assert_array_equal(found[0], expected)
