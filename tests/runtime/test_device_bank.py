"""The bank that a composition is picked from on a device: what enters it, what leaves it, and its size."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import onnx
import pytest
from test_composition import CONTRACT, DEFAULTS, Q_A, adapter, require_equal, row

from lora_export.contract import AdapterInput, AdapterInputKind, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime import device_bank as module
from lora_export.runtime import device_layout, device_memory
from lora_export.runtime.arrays import to_array
from lora_export.runtime.bank import Bank
from lora_export.runtime.composition import Compositions
from lora_export.runtime.device_memory import DeviceMemory, gather_graph
from lora_export.runtime.held_adapter import HeldAdapter
from lora_export.runtime.residency import Residency

PAIRS = [adapter(f"p{seed}", seed, q=4, v=4) for seed in range(20, 30)]


def made(max_bytes: int | None = None) -> Compositions:
    return Compositions(CONTRACT, "cpu", DEFAULTS, banked=True, max_bytes=max_bytes)


def of(one: HeldAdapter, weight: float = 1.0):
    return ((one, weight),)


@pytest.fixture
def entering(monkeypatch) -> list:
    """The slots that are written."""
    found, upload = [], module.DeviceBank._upload

    def counted(self, slot, tensors):
        found.append(slot)
        upload(self, slot, tensors)

    monkeypatch.setattr(module.DeviceBank, "_upload", counted)
    return found


def compose(compositions: Compositions, *rows) -> None:
    with compositions.of(rows) as values:
        require_equal(values, rows)


def test_an_adapter_enters_once(entering):
    compositions = made()
    for rows, n_entered in (
        ([of(PAIRS[0]), of(PAIRS[1]), (), of(PAIRS[0])], 3),
        ([of(PAIRS[1]), (), of(PAIRS[0])], 0),
        ([of(PAIRS[2]), (), of(PAIRS[0]), of(PAIRS[1])], 1),
        ([of(PAIRS[0], 0.5), of(PAIRS[2])], 1),  # a weight makes it another entry
        ([row(1), of(PAIRS[2])], 2),  # a larger rank and a gain: all that is wanted, in another layout
        ([row(1), of(PAIRS[2]), of(PAIRS[0])], 1),
    ):
        entering.clear()
        compose(compositions, *rows)
        assert len(entering) == n_entered


def test_it_grows_and_keeps_what_it_has(entering):
    compositions = made()
    for n in range(2, len(PAIRS)):
        compose(compositions, *map(of, PAIRS[:n]))
    assert len(entering) == len(PAIRS) - 1


def test_the_slots_of_adapters_that_are_gone_are_given_away():
    compositions, gone = made(), [adapter(f"g{seed}", seed, q=4, v=4) for seed in range(4)]
    compose(compositions, *map(of, gone), of(PAIRS[0]))
    n_bytes = compositions.device_bytes[0]
    held = [weakref.ref(each) for each in gone]
    del gone
    gc.collect()
    assert not any(reference() for reference in held), "nothing here keeps an adapter's tensors on the host"
    compose(compositions, *map(of, PAIRS[:5]))
    assert compositions.device_bytes[0] == n_bytes


def test_blends_take_the_slots_of_blends():
    compositions = made()
    for n in range(30):
        compose(compositions, of(PAIRS[0]), of(PAIRS[1], 1 + n / 7), of(PAIRS[2]))
        if n == 1:
            n_bytes = compositions.device_bytes[0]
    assert compositions.device_bytes[0] == n_bytes


def test_a_bound_holds_but_for_what_one_batch_needs(entering):
    free = made()
    compose(free, *map(of, PAIRS[:2]))
    slot = free.device_bytes[0] // 2
    compositions = made(max_bytes=3 * slot)
    for first in range(len(PAIRS) - 1):
        compose(compositions, *map(of, PAIRS[first : first + 2]))
        assert compositions.device_bytes[0] <= 3 * slot
    compose(compositions, *map(of, PAIRS[:6]))
    assert compositions.device_bytes[0] == 6 * slot
    entering.clear()
    compose(compositions, *map(of, PAIRS[1:3]))
    compose(compositions, of(PAIRS[8]), of(PAIRS[9]))
    assert len(entering) == 2 and compositions.device_bytes[0] == 6 * slot


def test_the_bound_of_the_session_is_the_bank_s():
    bank = Bank(CONTRACT, "cpu", DEFAULTS, residency=Residency(1000))
    assert bank.compositions.max_bytes == 1000


def test_it_is_laid_out_anew_when_half_of_a_rank_was_enough_for_a_while():
    compositions, sizes = made(), []
    compose(compositions, of(adapter("large", 1, q=40, v=4)), of(PAIRS[0]))
    for n in range(200):
        compose(compositions, of(PAIRS[n % 3]), of(PAIRS[3 + n % 4]))
        sizes.append(compositions.device_bytes[0])
    assert sizes[10] == sizes[40] and sizes[-1] < sizes[40] / 2
    assert len(set(sizes[130:])) == 1


def test_a_failure_on_the_device_leaves_nothing_behind(monkeypatch):
    compositions = made()
    compose(compositions, *map(of, PAIRS[:2]))
    with monkeypatch.context() as broken:
        broken.setattr(DeviceMemory, "allocate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), compositions.of(tuple(map(of, PAIRS[:6]))):
            pass
    compose(compositions, *map(of, PAIRS[:6]))
    compose(compositions, *map(of, PAIRS[:2]))


def test_a_failure_of_a_larger_batch_alone_leaves_nothing_behind(monkeypatch):
    """The bank holds all of it; only the rows' own buffers are to grow."""
    compositions = made()
    compose(compositions, *map(of, PAIRS[:2]))
    larger = (*map(of, PAIRS[:2]), *map(of, PAIRS[:2]))
    with monkeypatch.context() as broken:
        broken.setattr(DeviceMemory, "allocate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), compositions.of(larger):
            pass
    assert min(compositions.device_bytes) >= 0
    compose(compositions, *larger)
    compose(compositions, *map(of, PAIRS[:2]))


def test_more_than_can_be_addressed_is_refused(monkeypatch):
    monkeypatch.setattr(device_layout, "MOST_WORDS_OF_A_TABLE", 40)
    with pytest.raises(UsageProblem, match="more different adapters than ONNX Runtime can address"):
        compose(made(), *map(of, PAIRS[:6]))


def test_large_groups_and_long_copies_are_split(monkeypatch):
    """Copies of at most a few words, groups of one or two inputs: the same numbers."""
    monkeypatch.setattr(device_layout, "_MOST_BYTES", 150)
    monkeypatch.setattr(device_memory, "_MOST_WORDS_AT_ONCE", 41)
    compositions = made()
    compose(compositions, *map(of, PAIRS[:3]), row(1), row(5), ())
    compose(compositions, *map(of, PAIRS[2:9]), row(1), row(6), ())


def test_a_row_that_gather_would_not_copy_whole_is_refused(monkeypatch):
    monkeypatch.setattr(device_memory, "_MOST_WORDS_AT_ONCE", 3)
    with pytest.raises(ValueError, match="longer than ONNX Runtime's Gather copies"):
        compose(made(), of(PAIRS[0]), of(PAIRS[1]))


@pytest.mark.parametrize(
    ("dtype", "size"), [("float16", 5), ("bfloat16", 7), ("bfloat16", 64), ("float32", 3), ("float16", 128)]
)
def test_rows_of_any_length_and_dtype(dtype, size):
    """Rows of 2, 4 and 8 bytes' words, alone and in groups."""
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype) if dtype == "bfloat16" else dtype)
    contract = GraphContract((), (), tuple(
        AdapterInput(f"{module}.{kind.value}.weight", module, kind, dtype, ("rows", *dims))
        for module in "abc" for kind, dims in (
            (AdapterInputKind.LORA_A, (size, f"{module}.rank")), (AdapterInputKind.LORA_B, (f"{module}.rank", size)))
    ))  # fmt: skip
    rng, found = np.random.default_rng(0), []
    for name, rank in (("one", 3), ("two", 1)):
        tensors = {}
        for entry in contract.adapter_inputs:
            dims = [rank if isinstance(dim, str) else dim for dim in entry.dims[1:]]
            tensors[entry.name] = rng.standard_normal((1, *dims)).astype(numpy_dtype)
        found.append(HeldAdapter(name, tensors))
    rows = (of(found[0]), of(found[1]), (), of(found[0]))
    with Compositions(contract, "cpu", {}, banked=True).of(rows) as values:
        for name, value in values.items():
            array = to_array(value)
            assert array.dtype == numpy_dtype
            for made_of, got in zip(rows, array, strict=True):
                expected = np.zeros_like(got)
                if made_of:
                    tensor = made_of[0][0].tensors[name][0]
                    expected[: tensor.shape[0], : tensor.shape[1]] = tensor
                np.testing.assert_array_equal(got, expected)


def test_what_is_picked_outlives_the_compositions():
    compositions = made()
    values = dict(compositions.alone((of(PAIRS[0]), of(PAIRS[1]))))
    expected = values[Q_A].numpy().copy()
    del compositions
    gc.collect()
    np.empty(10**6).fill(7)
    np.testing.assert_array_equal(values[Q_A].numpy(), expected)


def test_the_graph_is_what_onnx_would_write():
    model = onnx.load_from_string(gather_graph(onnx.TensorProto.INT16))
    onnx.checker.check_model(model, full_check=True)
    info = onnx.helper.make_tensor_value_info
    kind, places = onnx.TensorProto.INT16, onnx.TensorProto.INT64
    inputs = [info("table", kind, ["table_rows", "words"]), info("places", places, ["n"])]
    node = onnx.helper.make_node("Gather", ["table", "places"], ["rows"])
    graph = onnx.helper.make_graph([node], "rows", inputs, [info("rows", kind, ["n", "words"])])
    opset = [onnx.helper.make_opsetid("", 20)]
    expected = onnx.helper.make_model(graph, ir_version=10, opset_imports=opset)
    assert onnx.printer.to_text(model) == onnx.printer.to_text(expected)


def test_the_bytes_that_are_told_are_those_of_the_page():
    """docs/runtime.md: each entry's inputs once in the bank, each row's in a stack, and where they come from."""
    compositions, rows = made(), [of(PAIRS[0]), of(PAIRS[1]), ()]
    compose(compositions, *rows)
    n_bytes = PAIRS[0].n_bytes
    bank, picked = compositions.device_bytes
    assert bank == 3 * n_bytes
    n_inputs = len(PAIRS[0].names)
    assert 3 * n_bytes <= picked <= 3 * n_bytes + 256 * n_inputs + 8 * 3 * n_inputs
