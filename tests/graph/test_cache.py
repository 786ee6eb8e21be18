"""The cache of finished graphs: a hit changes no byte, damage is a miss, trouble costs only time."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
from catalogue import EXPORTS, export_to

from lora_export.graph import cache


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def export_here(bases, adapters, tmp_path, monkeypatch):
    """Exports the smallest classifier with a cache folder of its own; the files' bytes."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(folder))
    counter = iter(range(100))

    def export() -> dict[str, bytes]:
        out = tmp_path / f"out{next(counter)}"
        export_to(out, EXPORTS["vit-dynamic"], bases, adapters)
        return bytes_of(out)

    return export, folder


def test_a_hit_gives_the_same_bytes_and_a_damaged_graph_is_built_again(export_here, monkeypatch):
    export, folder = export_here
    cold = export()
    kept = bytes_of(folder)
    records = [name for name in kept if name.endswith(".json")]
    assert len(kept) == 3 and len(records) == 1, "a trace, a finished graph, and what was planned"

    def no_trace(*args: object) -> None:
        raise AssertionError("the trace was made again")

    monkeypatch.setattr("lora_export.export.graphs.trace", no_trace)
    assert export() == cold, "a cache hit differs"
    finished = max(kept.keys() - set(records), key=lambda name: (folder / name).stat().st_mtime_ns)
    (folder / finished).write_bytes(kept[finished][: len(kept[finished]) // 2])
    assert export() == cold, "an export from a kept trace differs"
    assert bytes_of(folder) == kept, "the damaged file was not replaced"
    flipped = bytearray(kept[finished])
    flipped[len(flipped) // 2] ^= 1
    for damage in (b"", b"\xff" * 5000, kept[finished][:1000], kept[finished][:-1], bytes(flipped)):
        (folder / finished).write_bytes(damage)
        with pytest.raises(LookupError, match="built anew"):
            cache.cached_graph(finished.split(".")[0], built_anew, use_cache=True)
        assert not (folder / finished).exists()


def test_a_graph_of_another_key_is_not_read(tmp_path, monkeypatch):
    """Whole, and put in the place of this one: by hand, or by a program that knows names only."""
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path))
    cache.cached_graph("one", a_graph, use_cache=True)
    (kept,) = tmp_path.iterdir()
    assert len(cache.cached_graph("one", built_anew, use_cache=True).graph) == 1
    kept.rename(tmp_path / kept.name.replace("one.", "other."))
    with pytest.raises(LookupError, match="built anew"):
        cache.cached_graph("other", built_anew, use_cache=True)
    assert list(tmp_path.iterdir()) == []


def a_graph() -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [x])
    return ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10)


def test_no_cache_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    found = cache.cached_graph("key", a_graph, use_cache=False)
    assert [node.op_type for node in found.graph] == ["Identity"]
    assert list(tmp_path.iterdir()) == []


def built_anew():
    raise LookupError("built anew")


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(blocked / "cache"))
    assert len(cache.cached_graph("key", a_graph, use_cache=True).graph) == 1


def test_the_folder_is_the_variables_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "here"))
    assert cache.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("LORA_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache.cache_folder() == tmp_path / "user" / "lora-export"


def test_the_key_depends_on_every_file_of_the_package_and_on_what_runs_it(tmp_path, monkeypatch):
    package = tmp_path / "lora_export"
    shutil.copytree(Path(cache.__file__).parent.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(package / "graph/cache.py"))
    cache._code_digest.cache_clear()
    keys = {cache.cache_key({})}
    for file in ("compat.py", "adapters/factors.py", "export/plan.py", "base/trace.py", "graph/fuse.py"):
        with (package / file).open("a") as changed:
            changed.write("\n")
        cache._code_digest.cache_clear()
        keys.add(cache.cache_key({}))
    monkeypatch.setattr(cache.platform, "python_version", lambda: "3.99")
    keys.add(cache.cache_key({}))
    cache._code_digest.cache_clear()
    assert len(keys) == 7


def test_the_key_depends_on_every_fact_and_not_on_their_order():
    key = cache.cache_key({"a": 1, "b": [2]})
    assert cache.cache_key({"b": [2], "a": 1}) == key
    assert len({key, cache.cache_key({"a": 1}), cache.cache_key({"a": 2, "b": [2]})}) == 3
