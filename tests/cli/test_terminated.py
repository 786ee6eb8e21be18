"""A command that is asked to end cleans up: SIGTERM is what containers and job schedulers send."""

from __future__ import annotations

import os
import signal

import pytest

from lora_export.artifact import MANIFEST
from lora_export.cli.output import Display, guarded
from lora_export.staging import staging


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
