"""What the sample builders share: caching, atomic publication, progress and tables.

Nothing here imports torch, so that a run whose results are already built takes no time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


# The linear modules of a Llama's layer.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DecoderAdapter:
    """How one adapter of a decoder is shaped, in peft.LoraConfig's words, and trained."""

    name: str
    r: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    steps: int
    learning_rate: float

    def lora_options(self) -> dict[str, Any]:
        """The arguments of peft.LoraConfig."""
        return {
            "task_type": "CAUSAL_LM",
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": list(self.target_modules),
        }


@dataclass(frozen=True)
class Build:
    """One set of files under `out`, rebuilt only when what it depends on changes.

    `sources` are file names in this folder and `packages` are distribution names: a change in
    the text of the former or the version of the latter makes the build stale. `outputs` are the
    files and folders, relative to `out`, that the build replaces as a whole.
    """

    name: str
    out: Path
    outputs: tuple[str, ...]
    sources: tuple[str, ...]
    packages: tuple[str, ...]

    @property
    def stamp(self) -> Path:
        """The file that says what the present outputs were built from."""
        return self.out / ".stamps" / f"{self.name}.json"

    def fingerprint(self) -> str:
        """A hash of everything the outputs depend on."""
        digest = hashlib.sha256()
        # Adapters name their base by absolute path, so a moved folder has to be rebuilt.
        facts = [str(self.out), platform.python_version()]
        facts += [f"{package}=={metadata.version(package)}" for package in self.packages]
        for fact in facts:
            digest.update(fact.encode() + b"\0")
        for source in self.sources:
            digest.update((HERE / source).read_bytes())
        return digest.hexdigest()

    def is_current(self) -> bool:
        """Whether every output is there, whole, and built from the present sources."""
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
            if stamp["fingerprint"] != self.fingerprint():
                return False
            sizes = {name: (self.out / name).stat().st_size for name in stamp["bytes"]}
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return sizes == stamp["bytes"]

    def run(self, make: Callable[[Path], None]) -> None:
        """Let `make` write the outputs into a temporary folder, then move them into place."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.out, prefix=f".building-{self.name}-") as temp:
            fresh, old = Path(temp, "new"), Path(temp, "old")
            fresh.mkdir()
            make(fresh)
            self.stamp.unlink(missing_ok=True)
            for name in self.outputs:
                _replace(fresh / name, self.out / name, old / name)
            write_json(Path(temp, "stamp"), self._stamp_content())
            self.stamp.parent.mkdir(exist_ok=True)
            Path(temp, "stamp").replace(self.stamp)

    def _stamp_content(self) -> dict[str, Any]:
        files: list[Path] = []
        for name in self.outputs:
            path = self.out / name
            files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        sizes = {file.relative_to(self.out).as_posix(): file.stat().st_size for file in files}
        return {"fingerprint": self.fingerprint(), "bytes": sizes}


def _replace(fresh: Path, target: Path, old: Path) -> None:
    """Move `fresh` to `target`, and what was there before to `old`."""
    if target.exists():
        old.parent.mkdir(parents=True, exist_ok=True)
        target.rename(old)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh.rename(target)


def out_folder(description: str) -> Path:
    """Read the command line: the absolute folder to write to."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder to write to")
    return parser.parse_args().out.resolve()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copy the named files from one folder to another, which is made."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def progress(message: str) -> None:
    """Say on standard error what is going on."""
    print(message, file=sys.stderr, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text on standard output, columns aligned to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
