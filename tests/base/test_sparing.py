"""What is left out while a graph is made is back afterwards, whatever happened."""

from __future__ import annotations

import gc

import pytest

from lora_export import compat
from lora_export.base.sparing import sparing
from lora_export.compat import Borrowed, Without, borrow

SETTINGS = ("fake_tensor_cache_enabled", "do_not_emit_stack_traces")


def test_settings_are_changed_and_put_back_after_a_failure(monkeypatch):
    monkeypatch.setattr(gc, "get_threshold", lambda: (700, 10, 10))  # whatever this session's is
    set_to = []
    monkeypatch.setattr(gc, "set_threshold", lambda *thresholds: set_to.append(thresholds))
    before = [borrow(name) for name in SETTINGS]
    with pytest.raises(ZeroDivisionError), sparing():
        assert [borrow(name) for name in SETTINGS] == [False, True]
        assert set_to == [(50_000, 10, 10)]
        raise ZeroDivisionError
    assert [borrow(name) for name in SETTINGS] == before
    assert set_to == [(50_000, 10, 10), (700, 10, 10)]


def test_a_release_without_a_setting_is_left_as_it_is(monkeypatch):
    gone = Borrowed("no.such:do_not_emit_stack_traces", "torch", "0", "gone", Without.SLOWER)
    monkeypatch.setitem(compat._BY_NAME, gone.name, gone)
    with sparing():
        assert borrow("fake_tensor_cache_enabled") is False
