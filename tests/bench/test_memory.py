"""Memory of one session: a process of its own, its peak above what it had before, and what the driver says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_export.bench import memory
from lora_export.bench.memory import anonymous_mb, device_mb, peaks_mb
from lora_export.bench.memory_job import MemoryJob
from lora_export.errors import EnvironmentUnusable

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")


@LINUX
def test_what_a_process_allocates_is_anonymous_memory():
    before = anonymous_mb(os.getpid())
    held = np.ones(50_000_000, np.uint8)
    assert anonymous_mb(os.getpid()) - before == pytest.approx(50, rel=0.1)
    del held


@LINUX
def test_the_peak_grows_with_what_runs(exports):
    """Logits of a run of 32 × 32 tokens over 260 words, 4 bytes each, are what one of 1 × 1 does not have."""

    def peak(*shapes) -> float:
        job = MemoryJob(str(exports["llama-base"]), "cpu", 100, [(shape, None, False) for shape in shapes])
        found = peaks_mb(job)
        assert list(found) == ["process"]
        return found["process"]

    small, again, large = peak((1, 1, 0)), peak((1, 1, 0)), peak((1, 1, 0), (32, 32, 0))
    assert small > 1 and again == pytest.approx(small, rel=0.2, abs=1)
    assert large > small + 32 * 32 * 260 * 4 / 1e6


def test_the_job_needs_neither_torch_nor_transformers():
    code = "import sys, lora_export.bench.memory_job; print(*{'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", "what it loads is no part of the peak, and takes seconds"


def test_a_process_that_ends_early_is_no_peak_of_zero(tmp_path):
    with pytest.raises(EnvironmentUnusable) as caught:
        peaks_mb(MemoryJob(str(tmp_path), "cpu", 100, [((1, 1, 0), None, False)]))
    assert "its process ended early" in str(caught.value) and "The folder holds no export" in str(caught.value)
    assert "exit status 1" in str(caught.value)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` on the path that prints the given lines."""

    def put(*lines: str, status: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def test_the_device_s_memory_is_the_process_s_own_on_all_gpus(nvidia_smi):
    nvidia_smi("123, 1000", "77, 512", "123, 24")
    assert device_mb(123) == pytest.approx(1024 * 1024**2 / 1e6)


@pytest.mark.parametrize("lines", [(), ("77, 512",), ("123, [N/A]",), ("123, 5", "123, [N/A]")])
def test_what_the_driver_does_not_tell_is_absent(lines, nvidia_smi):
    nvidia_smi(*lines)
    assert device_mb(123) is None


def test_without_the_driver_it_is_absent(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi("123, 1000", status=9)
    assert device_mb(123) is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert device_mb(123) is None


@LINUX
def test_where_the_system_tells_nothing_there_is_no_figure(exports, monkeypatch):
    monkeypatch.setattr(memory, "anonymous_mb", lambda pid: None)
    assert peaks_mb(MemoryJob(str(exports["llama-base"]), "cpu", 100, [((1, 1, 0), None, False)])) == {}
