"""One side of a large check at a time: never two in memory, and the same figures as with all at once."""

from __future__ import annotations

import pytest

from lora_export import environment
from lora_export.artifact import read_manifest
from lora_export.check import turns
from lora_export.check.context import CheckOptions
from lora_export.environment import memory_of_references
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check


class Kept:
    """A side that knows whether it was let go."""

    def __init__(self) -> None:
        self.n_let_go = 0

    def let_go(self) -> None:
        self.n_let_go += 1


def test_a_side_is_let_go_when_another_ones_turn_comes():
    one, other, found = Kept(), Kept(), turns.Turns(one_at_a_time=True)
    for side in (one, one, other, None, None):
        found.take(side)
    assert (one.n_let_go, other.n_let_go) == (1, 1)


def test_without_need_all_stay():
    one, found = Kept(), turns.Turns()
    for side in (one, Kept(), None):
        found.take(side)
    assert one.n_let_go == 0


def test_a_session_of_a_gpu_lets_no_reference_go():
    reference, found = Kept(), turns.Turns(one_at_a_time=True, with_sessions=False)
    found.take(reference)
    found.take_session(Kept())
    found.take_session()
    assert reference.n_let_go == 0


@pytest.mark.parametrize("name", ["llama-dynamic", "t5-dynamic", "tagger-dynamic"])
def test_one_at_a_time_finds_what_all_at_once_do(name, exports, own, monkeypatch):
    folder = own(exports[name])
    expected, _ = check(folder, SourceOverrides(), CheckOptions(provider="cpu"))
    monkeypatch.setattr(environment, "_LARGE_BYTES", 0)
    changes, take = [], turns.Turns.take

    def counted(self, side):
        changes.append(side is not self._side and self._side is not None)
        take(self, side)

    monkeypatch.setattr(turns.Turns, "take", counted)
    found, _ = check(folder, SourceOverrides(), CheckOptions(provider="cpu"))
    assert sum(changes) > 3, "sides take turns"
    assert found.cases == expected.cases and found.layers == expected.layers


def test_what_is_planned_is_the_largest_side(exports, monkeypatch):
    folder = exports["llama-dynamic"]
    manifest = read_manifest(folder)
    n_bytes, at_once = manifest.weights_bytes(folder), memory_of_references(manifest, folder, precisely=True)
    monkeypatch.setattr(environment, "_LARGE_BYTES", 0)
    assert at_once == 4 * n_bytes and memory_of_references(manifest, folder, precisely=True) == 2 * n_bytes
