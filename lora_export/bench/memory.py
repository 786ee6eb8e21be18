"""The most memory that one session takes, from its opening through runs of every workload.

Each variant gets a process of its own (`memory_job`), so that none inherits what another's allocator kept. Counted on
the CPU is anonymous memory (RssAnon) above what the process had before: what was allocated. The kernel's own peak
(VmHWM, also after a reset through clear_refs) counts the pages of mapped files too, such as weights and libraries,
which come and go with the machine's page cache; RssAnon has no peak of its own, so this process samples it every two
milliseconds, from outside, where no lock of the interpreter holds it up. On CUDA the driver is asked what the process
has on the device when all has run: ONNX Runtime's arena does not shrink, so that is its peak; CUDA's context is in it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import lora_export
from lora_export.bench.memory_job import DONE, READY, MemoryJob
from lora_export.errors import EnvironmentUnusable

PERIOD_SECONDS = 0.002
METHOD = {
    "process": "peak of anonymous memory (RssAnon) over what the process had before the session, sampled every "
    f"{PERIOD_SECONDS * 1e3:g} ms, through opening it and running the workloads; a process for each variant",
    "device": "what the driver says the process has on the GPU after that, CUDA's context included (nvidia-smi)",
}
_QUERY = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
_MIB = 1024**2 / 1e6  # in megabytes of 10⁶ bytes
_LAST_WORDS, _GRACE_SECONDS = 2000, 10


def peaks_mb(job: MemoryJob) -> dict[str, float]:
    """Megabytes (10⁶ bytes) by place, "process" and on CUDA "device"; without those that this machine does not tell.

    Raises:
        EnvironmentUnusable: The process of the session did not come to its end.
    """
    command = [sys.executable, "-m", "lora_export.bench.memory_job"]
    paths = [str(Path(lora_export.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            found = _watched(process, job)
            if found is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)  # for its own exit status
        finally:
            process.kill()
            process.communicate()
        if found is None:
            errors.seek(0)
            raise EnvironmentUnusable(
                "The memory of a session could not be measured: its process ended early",
                where=job.folder,
                found=f"exit status {process.returncode}\n{errors.read()[-_LAST_WORDS:]}".strip(),
                next_step="free memory on the machine (status -9 is often the kernel's, for want of it)",
            )
    return found


def _watched(process: subprocess.Popen, job: MemoryJob) -> dict[str, float] | None:
    """Have the job done, and what it took; None if the process ended before."""
    _tell(process, job.to_json())
    if not _hears(process, READY):
        return None
    before = anonymous_mb(process.pid)
    sampler = _Sampler(process.pid)
    sampler.start()
    _tell(process, "go")
    done = _hears(process, DONE)
    sampler.stop()
    if not done:
        return None
    found = {} if before is None else {"process": max(sampler.peak_mb - before, 0.0)}
    device = device_mb(process.pid) if job.provider == "cuda" else None
    return found if device is None else found | {"device": device}


def _tell(process: subprocess.Popen, line: str) -> None:
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    except BrokenPipeError:  # it has ended, and is heard no more either
        pass


def _hears(process: subprocess.Popen, word: str) -> bool:
    """Whether the process says `word` before it ends; what its libraries print is passed over."""
    return any(line.strip() == word for line in process.stdout)


class _Sampler(threading.Thread):
    """Keeps the largest anonymous memory of a process until stopped, the last moment included."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._stopped, self.peak_mb = pid, threading.Event(), 0.0

    def run(self) -> None:
        while not self._stopped.wait(PERIOD_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak_mb = max(self.peak_mb, anonymous_mb(self._pid) or 0.0)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        self._sample()


def anonymous_mb(pid: int) -> float | None:
    """RssAnon of a process; None where the system does not tell (no Linux), or there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon:")), None)


def device_mb(pid: int) -> float | None:
    """Memory of a process on the GPUs; None where the driver does not tell, as in containers that hide process ids."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = [line.split(",") for line in done.stdout.splitlines()]
    used = [size.strip() for process, size in found if process.strip() == str(pid)]
    if not used or not all(size.isdigit() for size in used):
        return None
    return sum(map(int, used)) * _MIB
