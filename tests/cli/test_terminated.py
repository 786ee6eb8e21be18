"""A command that is asked to end cleans up: SIGTERM is what containers and job schedulers send."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lora_export.artifact import MANIFEST
from lora_export.cli.output import Display, guarded
from lora_export.staging import staging


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """As on a terminal, also where the tests run behind one: a shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigterm_ends_with_143_and_nothing_left(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as ended,
        guarded(Display(as_json=False, quiet=True)),
        staging(tmp_path / "out", overwrite=False, n_bytes=1) as stage,
    ):
        (stage / MANIFEST).write_text("{}")
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_a_library_makes_of_a_signal_is_no_refusal(number, code, tmp_path, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, guarded(Display(as_json=False, quiet=True)):
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from error
    assert ended.value.code == code and "error:" not in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_ctrl_c_before_a_command_begins_is_no_failed_gate():
    code = """
import os, signal, sys, types
import click
room = sys.modules["lora_export.cli.main"] = types.ModuleType("lora_export.cli.main")
room.main = click.command()(lambda: os.kill(os.getpid(), signal.SIGINT))
from lora_export.cli.entry import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
