"""A small world that commands change: a base, adapters, a cache with the graphs, and folders for outputs and /tmp."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from random_models import LlamaShape, write_adapter, write_llama
from safetensors.torch import load_file, save_file

_SHAPE = LlamaShape(1, 32, 64, 2, 1, 16, 64, "float32")
_STRENGTH = 3000.0
# By roster, an adapter's name in it and what it is a copy of.
_ROSTERS = {
    "roster": {"one": "one", "two": "two", "three": "three"},
    "next-roster": {"one": "other/one", "two": "two", "late": "three"},
}


@dataclass(frozen=True)
class World:
    """Paths, all under one folder.

    Attributes:
        place: The folder that outputs lie in.
    """

    root: Path

    @property
    def place(self) -> Path:
        return self.root / "place"

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    @property
    def base(self) -> Path:
        return self.root / "sources" / "base"

    @property
    def n_tokens(self) -> int:
        """Of the base."""
        return _SHAPE.vocab

    @property
    def changed(self) -> tuple[Path, Path, Path]:
        """What a command may change."""
        return self.place, self.cache, self.temporary

    def adapter(self, name: str) -> Path:
        return self.root / "sources" / name

    def strong_adapter(self, name: str) -> Path:
        """One that changes what the base writes; the others are too weak for that."""
        return self.root / "sources" / "strong" / name

    def roster(self, name: str) -> Path:
        """A folder of adapters: `roster`, and `next-roster`, where one is another, one is gone and one has come."""
        return self.root / "sources" / name

    @property
    def public_key(self) -> Path:
        """Of the key that `injection.keys` makes."""
        return self.root / "sources" / "release.pub"

    @property
    def foreign(self) -> Path:
        return self.root / "sources" / "foreign.safetensors"

    @property
    def fine_tuned(self) -> Path:
        return self.root / "sources" / "fine-tuned"

    def keep(self, name: str) -> None:
        """Keep what may be changed, to go back to it."""
        kept = self.root / "kept" / name
        shutil.rmtree(kept, ignore_errors=True)
        for folder in self.changed:
            shutil.copytree(folder, kept / folder.name, symlinks=True)

    def go_back(self, name: str) -> None:
        for folder in self.changed:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.root / "kept" / name / folder.name, folder, symlinks=True)


def make_world(root: Path) -> World:
    """A world in `root`, with its base and adapters; this process keeps temporary files and cached graphs in it."""
    world = World(root.resolve())
    for folder in (world.place, world.temporary):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in world.changed:
        folder.mkdir(parents=True, exist_ok=True)
    write_llama(world.base, _SHAPE)
    (world.base / "LICENSE").write_text("Anyone may do anything.\n", encoding="utf-8")
    for seed, name in enumerate(("one", "two", "three", "other/one")):
        shape = {"rank": 2, "base": world.base, "task_type": "CAUSAL_LM", "seed": seed}
        write_adapter(world.adapter(name), _SHAPE.linears(), **shape)
        (world.adapter(name) / "NOTICE").write_text(f"Of {name}.\n", encoding="utf-8")
    for seed, name in enumerate(("one", "two")):
        shape = {"rank": 2, "base": world.base, "task_type": "CAUSAL_LM", "seed": seed, "strength": _STRENGTH}
        write_adapter(world.strong_adapter(name), _SHAPE.linears(), **shape)
    for roster, adapters in _ROSTERS.items():
        for name, adapter in adapters.items():
            shutil.copytree(world.adapter(adapter), world.roster(roster) / name, dirs_exist_ok=True)
    _by_another_tool(world.adapter("one"), world.foreign)
    _fine_tune(world.base, world.fine_tuned)
    world.keep("empty")
    shutil.rmtree(world.cache)
    world.cache.mkdir()
    world.keep("nothing")
    world.go_back("empty")
    os.environ["LORA_EXPORT_CACHE"] = str(world.cache)
    os.environ["TMPDIR"] = tempfile.tempdir = str(world.temporary)
    return world


def _by_another_tool(adapter: Path, file: Path) -> None:
    """The same adapter as kohya's trainer names it; it is converted in a folder for temporary files."""
    names = {"lora_A": "lora_down", "lora_B": "lora_up"}
    tensors = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, factor, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        tensors[f"lora_te_{module.replace('.', '_')}.{names[factor]}.weight"] = tensor
    save_file(tensors, file)


def _fine_tune(base: Path, folder: Path) -> None:
    """The base with another number on the diagonal of each linear map."""
    if not folder.exists():
        shutil.copytree(base, folder)
        tensors = load_file(base / "model.safetensors")
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "embed" not in name:
                tensor.fill_diagonal_(0.5)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
