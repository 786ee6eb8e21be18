"""Runs that are captured and replayed give what others do: a stand-in for ONNX Runtime's session replays as a GPU does."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from interleave import under_load
from references import inputs_for

from lora_export.errors import UsageProblem
from lora_export.runtime import adapter_session as session_module
from lora_export.runtime import bank as bank_module
from lora_export.runtime import captured as module
from lora_export.runtime import session as opening
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.composition import Compositions, Stack
from lora_export.runtime.generate import generate
from lora_export.runtime.scheduler import Scheduler


class Recorded:
    """A binding that notes the addresses of what is bound."""

    def __init__(self, binding: ort.IOBinding) -> None:
        self.binding, self.inputs, self.outputs = binding, {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = (value.element_type(), value.shape(), value.data_ptr())
        self.binding.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = (value.element_type(), value.shape(), value.data_ptr())
        self.binding.bind_ortvalue_output(name, value)

    def bind_input(self, name, device, number, *where):
        self.inputs[name] = where
        self.binding.bind_input(name, device, number, *where)

    def bind_output(self, name, device="cpu", number=0, *where):
        if where:
            self.outputs[name] = where
        self.binding.bind_output(name, device, number, *where)

    def get_outputs(self):
        return self.binding.get_outputs()


class Replaying:
    """A session as CUDA graphs make it: an identity's later runs use the addresses of its first, whatever is bound."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session, self.captures, self.n_replays, self._running = session, {}, 0, threading.Lock()
        self.refuses = False

    def __getattr__(self, name):
        return getattr(self._session, name)

    def io_binding(self):
        return Recorded(self._session.io_binding())

    def run_with_iobinding(self, recorded, options):
        assert self._running.acquire(blocking=False), "two runs at a time"
        try:
            identity = options.get_run_config_entry(module.GRAPH_ID)
            if identity == module.NOT_CAPTURED:
                self._session.run_with_iobinding(recorded.binding)
                return
            if identity not in self.captures:
                if self.refuses:
                    raise RuntimeError("operation not permitted when stream is capturing")
                assert recorded.outputs, "outputs have no places"
                replay = self._session.io_binding()
                for name, where in recorded.inputs.items():
                    replay.bind_input(name, "cpu", 0, *where)
                for name, where in recorded.outputs.items():
                    replay.bind_output(name, "cpu", 0, *where)
                self.captures[identity] = replay
            else:
                self.n_replays += 1
            self._session.run_with_iobinding(self.captures[identity])
        finally:
            self._running.release()


@pytest.fixture
def opened(exports, monkeypatch):
    """A session of an export that captures, on the CPU with the stand-in."""
    real = opening.open_session

    def replaying(path, provider, *, cuda_graph, **how):
        return Replaying(real(path, provider, **how)) if cuda_graph else real(path, provider, **how)

    monkeypatch.setattr(session_module, "open_session", replaying)
    monkeypatch.setattr(module, "refuse_capture", lambda *_: None)
    monkeypatch.setattr(bank_module, "Compositions", functools.partial(Compositions, banked=True))
    return lambda name, **how: AdapterSession(exports[name], "cpu", cuda_graph=True, **how)


# Exports, and mixes for three rows; a later mix may have another rank, other inputs, or a head of another size.
CASES = {
    "bert-dynamic": ["topic", None, "kind", ["topic", "kind", None], ["kind", None, {"topic": 0.5}], "topic", ["topic"] * 3],
    "classifier-dynamic": ["plain", None, ["plain", None, None], {"plain": 0.5}],
    "vit-dynamic": ["sights", None, ["sights", None, "sights"]],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_other_runs(name, opened, exports):
    """Mixes in turn, twice, in two shapes: each replay has its own adapters and inputs."""
    session, plain = opened(name), AdapterSession(exports[name], "cpu")
    base = name.split("-")[0]
    for seed in (1, 2):
        for n, length in ((3, 9), (3, 5)):
            for adapters in CASES[name]:
                inputs = inputs_for(base, n, length, seed)
                expected, found = plain.run(inputs, adapters), session.run(inputs, adapters)
                assert expected.keys() == found.keys()
                for output in expected:
                    np.testing.assert_allclose(found[output], expected[output], atol=2e-6, err_msg=str(adapters))
    assert session.session.n_replays >= len(CASES[name])


def test_a_swap_replays_and_another_rank_is_captured_anew(opened):
    session = opened("bert-dynamic")
    tensors = session.read(session.folder / "adapters" / "topic.onnx_adapter")
    inputs, captures = inputs_for("bert", 3, 9), session.session.captures
    other = {name: array * 2 if "lora_B" in name else array for name, array in tensors.items()}
    first = session.run(inputs, "topic")["logits"]
    assert len(captures) == 1
    session.hold("other", other)
    second = session.run(inputs, "other")["logits"]
    assert len(captures) == 1 and np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(session.run(inputs, "topic")["logits"], first)
    # Another number of rows of adapters, another length, another output, a larger rank.
    session.run(inputs, ["topic", "other", None])
    session.run(inputs_for("bert", 3, 6), "topic")
    assert len(captures) == 3
    session.hold("larger", {
        name: np.concatenate([array] * 3, axis=2 if "lora_A" in name else 1) if "lora_" in name else array
        for name, array in tensors.items()
    })  # fmt: skip
    session.run(inputs, "larger")
    assert len(captures) == 4
    np.testing.assert_allclose(session.run(inputs, "topic")["logits"], first, atol=1e-6)
    assert len(captures) == 4


def test_what_a_run_returned_stays(opened):
    session = opened("bert-dynamic")
    first = session.run(inputs_for("bert", 3, 9, 1), "topic")["logits"]
    kept = first.copy()
    session.run(inputs_for("bert", 3, 9, 2), None)
    session.run(inputs_for("bert", 3, 9, 2), "topic")
    np.testing.assert_array_equal(first, kept)


def test_after_enough_captures_others_run_as_they_come(opened, exports, monkeypatch):
    monkeypatch.setattr(module, "MOST_CAPTURES", 2)
    session, plain = opened("bert-dynamic"), AdapterSession(exports["bert-dynamic"], "cpu")
    with pytest.warns(RuntimeWarning, match="has 2 CUDA graphs, which is the most"):
        for n in (1, 2, 3, 4, 1):
            inputs = inputs_for("bert", n, 7, n)
            for adapters in ("topic", [None, "topic", None, "kind"][:n]):
                expected = plain.run(inputs, adapters)["logits"]
                np.testing.assert_allclose(session.run(inputs, adapters)["logits"], expected, atol=2e-6)
    assert len(session.session.captures) == 2


def test_the_steps_of_a_decoder_are_captured_and_write_what_others_do(opened, exports):
    """Texts of a scheduler and of a plain loop, with padding and an adapter for each row."""
    session, plain = opened("llama-dynamic"), AdapterSession(exports["llama-dynamic"], "cpu")
    prompts, mix = [[20, 30, 40], [7], [50, 60, 70, 80, 90]], ["chat", None, "code"]
    for adapters in (mix, "code", [{"chat": 0.5, "code": 0.5}, "chat", None]):
        expected = [each.ids for each in plain.generate(prompts, adapters, max_new_tokens=9)]
        assert [each.ids for each in session.generate(prompts, adapters, max_new_tokens=9)] == expected
    assert session.session.n_replays > 10 and session.session.captures
    assert generate(session, prompts, mix, max_new_tokens=6) == generate(plain, prompts, mix, max_new_tokens=6)


def test_a_text_replays_what_another_one_has_captured(opened):
    """The buffers of a cache that is gone serve the next of almost its length, and what was captured on them."""
    session = opened("llama-dynamic")
    first = session.generate([[5, 6, 7], [8]], ["chat", None], max_new_tokens=6)
    n_captures = len(session.session.captures)
    for n_new in (6, 9, 4):
        again = session.generate([[5, 6, 7], [8]], ["chat", None], max_new_tokens=n_new)
        assert all(a.ids[:4] == b.ids[:4] for a, b in zip(first, again, strict=True))
    assert len(session.session.captures) == n_captures
    (buffers,) = session.runs._buckets
    assert session.cache(1, 20).buffers is buffers, "larger ones do"
    cache = session.cache(3, 20)  # more rows: the others' buffers and captures are let go
    assert cache.buffers is not buffers and cache.longest == 20
    gone = weakref.ref(buffers)
    del buffers
    gc.collect()
    assert gone() is None and not session.runs._buckets


def test_texts_of_one_row_and_of_three_by_turns_use_up_no_captures(opened, exports):
    session, plain = opened("llama-dynamic"), AdapterSession(exports["llama-dynamic"], "cpu")
    prompts = [[5, 6, 7], [8], [9, 10]]
    for turn in range(12):
        some = prompts[: 1 + turn % 3]
        expected, found = (each.generate(some, "chat", max_new_tokens=4) for each in (plain, session))
        assert [text.ids for text in found] == [text.ids for text in expected]
    assert len(session.session.captures) <= 6


def test_each_thread_has_captures_of_its_own(opened):
    """Also one that has the number of an earlier one."""
    session, inputs = opened("bert-dynamic"), inputs_for("bert", 2, 7)
    for _ in range(3):
        thread = threading.Thread(target=session.run, args=(inputs, "topic"))
        thread.start()
        thread.join()
    assert len(session.session.captures) == session.runs.n_captures == 3


def test_rows_that_come_and_go_take_a_capture_for_each_power_of_two(opened, exports):
    """Texts of a scheduler that may not move rows: at times only the last rows are in use."""
    found = []
    for session in (opened("llama-dynamic"), AdapterSession(exports["llama-dynamic"], "cpu")):
        scheduler = Scheduler(session, max_rows=7, max_length=40)
        scheduler._rows.can_move = False
        rng = np.random.default_rng(0)
        texts = [
            scheduler.submit(rng.integers(5, 90, int(n)).tolist(), ("chat", None, "code")[i % 3], max_new_tokens=int(n))
            for i, n in enumerate(rng.integers(2, 19, 24))
        ]
        written = {text: [] for text in texts}
        while scheduler.n_active or scheduler.n_waiting:
            for token in scheduler.step():
                written[token.request].append(token.token_id)
        found.append([written[text] for text in texts])
        if session.runs.are_captured:
            # 1, 2, 4 and 7 rows, each with a mix, with one adapter, and with none.
            assert len(session.session.captures) <= 12 and session.session.n_replays > 40
    assert found[0] == found[1]


def test_a_gate_is_an_input_like_others(opened, exports):
    prompts, mix = [[20, 30, 40], [5, 6, 7, 8], [9]], ["activated", "gains", "activated"]
    session = opened("llama-kinds")
    expected = AdapterSession(exports["llama-kinds"], "cpu").generate(prompts, mix, max_new_tokens=7)
    assert [each.ids for each in session.generate(prompts, mix, max_new_tokens=7)] == [each.ids for each in expected]
    assert session.session.n_replays


def test_a_run_that_fails_leaves_nothing(opened):
    session = opened("bert-dynamic")
    inputs = inputs_for("bert", 2, 7)
    wrong = {**inputs, "input_ids": inputs["input_ids"] + 10**6}
    for _ in range(2):
        with pytest.raises(Exception, match="out of data bounds"):
            session.run(wrong, "topic")
    assert not session.runs._buckets[session.runs] and not session.runs.n_captures
    session.session.refuses = True
    for _ in range(module.MOST_CAPTURES + 1):  # a capture that fails is none of them
        with pytest.raises(UsageProblem, match="did not capture a run"):
            session.run(inputs, "topic")
    assert not session.runs._buckets[session.runs] and not session.runs.n_captures
    session.session.refuses = False
    first, again = (session.run(inputs, "topic")["logits"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert session.session.n_replays == 2  # the first run replays what it has captured


def test_writing_adapters_that_failed_is_done_again(opened, monkeypatch):
    session = opened("bert-dynamic")
    inputs = inputs_for("bert", 2, 7)
    expected = [session.run(inputs, ["topic", "kind"])["logits"], session.run(inputs, ["kind", None])["logits"]]
    real = Stack.write

    def failing(stack, rows):
        real(stack, rows)
        raise MemoryError

    monkeypatch.setattr(Stack, "write", failing)
    with pytest.raises(MemoryError):
        session.run(inputs, ["topic", "kind"])
    monkeypatch.setattr(Stack, "write", real)
    for adapters, each in zip((["topic", "kind"], ["kind", None]), expected, strict=True):
        np.testing.assert_array_equal(session.run(inputs, adapters)["logits"], each)


def test_an_adapter_that_is_unloaded_is_let_go(opened):
    session = opened("bert-dynamic")
    inputs = inputs_for("bert", 2, 7)
    expected = session.run(inputs, ["topic", "kind"])["logits"]
    held = weakref.ref(session.bank.adapters["topic"])
    session.unload("topic")
    gc.collect()
    assert held() is None
    session.load(session.folder / "adapters" / "topic.onnx_adapter", "topic")
    np.testing.assert_array_equal(session.run(inputs, ["topic", "kind"])["logits"], expected)
    assert len(session.session.captures) == 1


def test_outputs_in_bfloat16_are_copied_bit_by_bit(exports):
    session = AdapterSession(exports["bert-dynamic"], "cpu").session
    array = np.array([[1.5, -2.25, 3e38]], ml_dtypes.bfloat16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), 16)
    found = module.copies({"logits": value}, "cpu", session)["logits"]
    array[:] = 0
    assert found.dtype == ml_dtypes.bfloat16 and found.tolist() == [[1.5, -2.25, float(ml_dtypes.bfloat16(3e38))]]


def test_each_cache_has_captures_of_its_own(opened, exports):
    """Two of one shape, whose texts go on in turn."""
    sessions = opened("llama-dynamic"), AdapterSession(exports["llama-dynamic"], "cpu")
    texts = [np.array([[5, 6, 7]]), np.array([[90, 80, 70]])]
    found = []
    for session in sessions:
        caches = [session.cache(1, 9) for _ in texts]
        steps = [(cache, ids) for cache, ids in zip(caches, texts, strict=True)]
        steps += [(caches[turn % 2], np.array([[11 + turn]])) for turn in range(8)]
        for cache, ids in steps:
            mask = np.ones((1, cache.length + ids.shape[1]), np.int64)
            found.append(session.run({"input_ids": ids, "attention_mask": mask}, "chat", cache=cache)["logits"])
    for captured, plain in zip(found[:10], found[10:], strict=True):
        np.testing.assert_allclose(captured, plain, atol=2e-6)
    assert len(sessions[0].session.captures) == 2


def test_a_step_s_mask_is_for_the_whole_buffer():
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert module.step_mask(mask, 7).tolist() == [[0, 1, 1, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0, 0]]


def test_a_full_cache_is_refused(opened):
    session = opened("llama-dynamic")
    cache = session.cache(1, 3)
    for n in (2, 1):
        ids = np.array([[5] * n])
        session.run({"input_ids": ids, "attention_mask": np.ones((1, cache.length + n), np.int64)}, "chat", cache=cache)
    with pytest.raises(UsageProblem, match="no room for the new tokens"):
        session.run({"input_ids": ids, "attention_mask": np.ones((1, 4), np.int64)}, "chat", cache=cache)


def test_every_thread_gets_its_own_answer(opened):
    session = opened("bert-dynamic", n_threads=1, stop_spinning=True)
    asked = [
        (inputs_for("bert", 2, 7, seed), mix) for seed, mix in enumerate(["topic", None, ["kind", "topic"], "kind"])
    ]
    expected = [session.run(*each)["logits"] for each in asked]
    turns = iter(range(10**6))

    def run():
        turn = next(turns) % len(asked)
        return turn, session.run(*asked[turn])["logits"]

    for turn, found in under_load(run, [], n_runs=8, n_rounds=3):
        np.testing.assert_allclose(found, expected[turn], atol=1e-6)


def test_what_cannot_be_captured_is_refused(exports, monkeypatch):
    with pytest.raises(UsageProblem, match="on the CUDA provider only"):
        AdapterSession(exports["bert-dynamic"], "cpu", cuda_graph=True)
    choice = opening.ProviderChoice("cuda", "asked for")
    with pytest.raises(UsageProblem, match="no single buffer"):
        module.refuse_capture(AdapterSession(exports["llama-cuda"], "cpu").contract, choice)
    module.refuse_capture(AdapterSession(exports["llama-dynamic"], "cpu").contract, choice)

    def refusing(*_, **__):
        raise ort.capi.onnxruntime_pybind11_state.Fail("This session cannot use the graph capture feature as requested")

    monkeypatch.setattr(opening.ort, "InferenceSession", refusing)
    with pytest.raises(UsageProblem, match="cannot capture this graph"):
        opening.open_session(exports["bert-dynamic"] / "model.onnx", "cpu", cuda_graph=True)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.Fail):
        opening.open_session(exports["bert-dynamic"] / "model.onnx", "cpu")
