"""A file that is cut short while it is read: one message, nothing published. SIGBUS alone ends a process without."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from lora_export.base.stored import SafetensorsFiles
from lora_export.cli.main import main

_AT_EACH_READ = """
import os, sys
from lora_export.base.stored import SafetensorsFiles
from lora_export.cli.main import main
read, file, size = SafetensorsFiles.read, sys.argv.pop(1), int(sys.argv.pop(1))
def cut(self, name):
    os.truncate(file, size)
    return read(self, name)
SafetensorsFiles.read = cut
main()
"""


def ended(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_base_that_is_cut_short_while_it_is_read(own, bases, adapters, place):
    base = own(bases["bert"])
    file = base / "model.safetensors"
    command = ("merge", base, adapters["topic"], "-o", place / "out", "--provider", "cpu", "--quiet")
    found = ended(_AT_EACH_READ, file, mmap.PAGESIZE, *command)
    assert (found.returncode, found.stdout) == (3, "")
    assert found.stderr.count("error:") == 1 and "A file was cut short while it was read" in found.stderr
    assert str(file) in found.stderr and f"{mmap.PAGESIZE} bytes" in found.stderr
    assert list(place.iterdir()) == []


def test_a_base_that_is_cut_by_less_than_a_page(own, bases, adapters, place, monkeypatch):
    """The system gives zeros for it and sends no signal; its size tells."""
    base, read = own(bases["bert"]), SafetensorsFiles.read
    file = base / "model.safetensors"
    n_bytes = file.stat().st_size - 1

    def cut(self, name):
        os.truncate(file, n_bytes)
        return read(self, name)

    monkeypatch.setattr(SafetensorsFiles, "read", cut)
    command = ("merge", base, adapters["topic"], "-o", place / "out", "--provider", "cpu", "--quiet")
    found = CliRunner().invoke(main, list(map(str, command)))
    assert found.exit_code == 3, found.output
    assert found.output.count("error:") == 1 and f"was changed while it was read\n  where:    {file}" in found.output
    assert list(place.iterdir()) == []


_ANOTHER = """
import os, signal
from lora_export.cli.mapped_files import told_if_unreadable
with told_if_unreadable(print):
    os.kill(os.getpid(), signal.SIGBUS)
    print("goes on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_another_such_signal_ends_the_process_as_ever():
    found = ended(_ANOTHER)
    assert (found.returncode, found.stdout) == (-7, "")
