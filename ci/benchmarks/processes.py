"""Run a command in its own process and sample the anonymous memory of its whole process tree meanwhile.

Anonymous memory (RssAnon) is what a process allocated. Pages of mapped files do not count: the kernel drops them when
memory is short, so they are no part of what a job needs.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# 50 samples a second.
_PERIOD_SECONDS = 0.02


class JobFailed(Exception):
    """A measured command returned another status than 0."""


@dataclass(frozen=True)
class Usage:
    """What one run of a command took.

    Attributes:
        seconds: Wall time from start to exit, interpreter start included.
        peak_bytes: Largest sum of RssAnon over the process and its descendants among the samples; 0 if none was taken.
        n_samples: Memory samples taken.
        report: The JSON object on the last line of its standard output; {} if there is none.
    """

    seconds: float
    peak_bytes: int
    n_samples: int
    report: dict


def with_bytecode(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """`environment`, in which Python keeps what it compiles in `folder`, as an installed program has it.

    Where the machine forbids bytecode (PYTHONDONTWRITEBYTECODE, or files that cannot be written), every start compiles
    all of torch and Transformers again: 11 of 19 seconds of an export.
    """
    kept = {name: value for name, value in environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(folder)}


def run_measured(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Run `command` to its end.

    Raises:
        JobFailed: It failed; the message ends with its output.
    """
    # A file, not a pipe: a job that prints much must not wait for this process.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        sampler = _Sampler(process.pid)
        sampler.start()
        try:
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            seconds = time.perf_counter() - started
            sampler.stop()
        output.seek(0)
        text = output.read()
    if status != 0:
        raise JobFailed(f"status {status}: {' '.join(command)}\n{text[-4000:]}")
    return Usage(seconds, sampler.peak_bytes, sampler.n_samples, _last_json(text))


def _last_json(text: str) -> dict:
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


class _Sampler(threading.Thread):
    """Samples the tree of `root` until stopped."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root, self._stopped = root, threading.Event()
        self.peak_bytes, self.n_samples = 0, 0

    def run(self) -> None:
        while not self._stopped.wait(_PERIOD_SECONDS):
            found = [size for pid in _tree(self._root) if (size := anonymous_bytes(pid)) is not None]
            if found:
                self.peak_bytes = max(self.peak_bytes, sum(found))
                self.n_samples += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _tree(root: int) -> list[int]:
    """`root` and its descendants, as far as they still run."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                waiting.extend(map(int, children.read_text().split()))
            except OSError:  # the thread has ended meanwhile
                continue
    return found


def anonymous_bytes(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)
