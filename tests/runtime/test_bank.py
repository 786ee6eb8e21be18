"""`Bank` is a value with a cache of its own, and `Shelf` changes banks together or not at all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lora_export.contract import AdapterInput, AdapterInputKind, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.bank import Bank, Shelf

A, B = "q.lora_A.weight", "q.lora_B.weight"
CONTRACT = GraphContract(
    (),
    (),
    (
        AdapterInput(A, "q", AdapterInputKind.LORA_A, "float32", ("rows", 4, "q.rank")),
        AdapterInput(B, "q", AdapterInputKind.LORA_B, "float32", ("rows", "q.rank", 3)),
    ),
)


def tensors(value: float, rank: int = 2) -> dict[str, np.ndarray]:
    return {A: np.full((1, 4, rank), value, np.float32), B: np.full((1, rank, 3), value, np.float32)}


def bank_of(**values: float) -> Bank:
    made = Bank(CONTRACT, "cpu", {})
    for name, value in values.items():
        made = made.with_adapter(name, tensors(value))
    return made


def served(bank: Bank, name: str) -> float:
    """The number that fills the adapter's tensors on the device."""
    with bank.lent(bank.rows(name, 1)) as lent:
        return float(lent[A].numpy().flat[0])


def test_a_bank_stays_as_it_is():
    old = bank_of(chat=1)
    new = old.with_adapter("chat", tensors(2)).with_adapter("code", tensors(3))
    gone = new.without("chat")
    assert [tuple(each.adapters) for each in (old, new, gone)] == [("chat",), ("chat", "code"), ("code",)]
    assert (served(old, "chat"), served(new, "chat"), served(gone, "code")) == (1, 2, 3)
    with pytest.raises(TypeError):
        new.adapters["chat"] = tensors(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        new.adapters = {}


def test_a_bank_does_not_follow_the_mapping_that_it_was_given():
    given = tensors(1)
    bank = Bank(CONTRACT, "cpu", {}).with_adapter("chat", given)
    given.clear()
    assert served(bank, "chat") == 1


def test_what_was_stacked_of_an_adapter_no_other_of_its_name_is_served():
    old = bank_of(chat=1)
    new, back = old.with_adapter("chat", tensors(5)), old.without("chat").with_adapter("chat", tensors(6))
    for chosen in ("chat", {"chat": 1, "code": 0}, ["chat", None]):
        for bank, value in ((old, 1), (new, 5), (back, 6), (old, 1)):
            bank = bank.with_adapter("code", tensors(2))
            with bank.lent(bank.rows(chosen, 2)) as lent:
                assert lent[A].numpy()[0].flat[0] == value


def test_an_invocation_goes_with_its_adapter():
    late = bank_of().with_adapter("late", tensors(1), [7, 8])
    assert late.adapters["late"].invocation == (7, 8)
    assert late.with_adapter("late", tensors(1)).adapters["late"].invocation is None
    assert late.without("late").with_adapter("late", tensors(2)).adapters["late"].invocation is None


def test_an_unknown_adapter_is_refused_with_those_there_are():
    for ask in (lambda bank: bank.rows("legal", 1), lambda bank: bank.without("legal")):
        with pytest.raises(UsageProblem, match="No adapter 'legal' is loaded") as refused:
            ask(bank_of(chat=1, code=2))
        assert refused.value.found == "chat, code"
        with pytest.raises(UsageProblem) as refused:
            ask(Bank(CONTRACT, "cpu", {}, ("topic", "kind")))
        assert refused.value.found == "a merged graph (of topic, kind)"


def test_a_shelf_changes_the_banks_that_it_is_told_to():
    shelf = Shelf({"encoder": bank_of(chat=1), "decoder": bank_of(chat=1)})
    before = shelf.banks
    shelf.put("chat", {"encoder": tensors(2)})
    assert [served(bank, "chat") for bank in shelf.banks.values()] == [2, 1]
    shelf.put("chat", {"encoder": tensors(3), "decoder": tensors(4)}, [7])
    assert [served(bank, "chat") for bank in shelf.banks.values()] == [3, 4]
    assert [bank.adapters["chat"].invocation for bank in shelf.banks.values()] == [(7,), (7,)]
    assert [served(bank, "chat") for bank in before.values()] == [1, 1]


def test_a_shelf_that_cannot_remove_from_one_bank_removes_from_none():
    shelf = Shelf({"encoder": bank_of(chat=1), "decoder": bank_of()})
    with pytest.raises(UsageProblem, match="No adapter 'chat' is loaded"):
        shelf.remove("chat", ["encoder", "decoder"])
    assert served(shelf.banks["encoder"], "chat") == 1
