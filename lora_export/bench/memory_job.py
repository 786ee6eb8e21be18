"""Open one session and run workloads in it, in a process of its own, whose memory `bench.memory` watches.

    python -m lora_export.bench.memory_job    the job as JSON on the first line of standard input

It says READY when everything is loaded that is not the session's, waits for a line, opens and runs, says DONE, and
waits for another: the memory it holds then is the session's and stays until it was read.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_export.artifact import read_manifest
from lora_export.bench.latency import bound_runs
from lora_export.bench.peer_session import open_peer
from lora_export.bench.shapes import Shape
from lora_export.bench.workloads import workload_inputs
from lora_export.contract import SINGLE, GraphContract
from lora_export.runtime.seq2seq_session import open_export

READY, DONE = "memory job: ready", "memory job: done"


@dataclass(frozen=True)
class MemoryJob:
    """What the session is of, and what it runs.

    Attributes:
        folder: The export; with a `contract`, the ONNX file of another tool.
        runs: (batch, sequence, past) with the adapters of the rows, and whether these change from run to run, one after
            the other.
    """

    folder: str
    provider: str
    vocabulary: int
    runs: Sequence[tuple[Shape, str | Sequence[str | None] | None, bool]]
    contract: dict | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Do the job."""
    job = MemoryJob(**json.loads(sys.stdin.readline()))
    folder = Path(job.folder)
    contract = None if job.contract is None else GraphContract.from_dict(job.contract)
    graphs = read_manifest(folder).graphs if contract is None else {SINGLE: contract}
    work = [(workload_inputs(graphs, job.vocabulary, shape), *how) for shape, *how in job.runs]
    _give_back_free_memory()
    _say(READY)
    if contract is None:
        session = open_export(folder, job.provider, stop_spinning=True)
    else:
        session = open_peer(folder, contract, job.provider)
    for inputs, adapters, is_changing in work:
        run = bound_runs(session, adapters, inputs, is_changing=is_changing)
        for _ in range(1 + is_changing):
            run()
    _say(DONE)


def _say(word: str) -> None:
    """Tell the process that watches, and wait until it has looked."""
    print(word, flush=True)
    sys.stdin.readline()


def _give_back_free_memory() -> None:
    """What imports allocated and freed is the system's again, so that none of the session's memory hides in it.

    It is 2 MB more where Python had to compile what it imported. Without glibc nothing is given back.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
