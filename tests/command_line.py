"""Calls of the command line in this process, for tests of any room."""

from __future__ import annotations

import sys
from pathlib import Path

from click.testing import CliRunner, Result

from lora_export.cli.main import main
from lora_export.errors import Defect

SCRIPT = Path(sys.executable).with_name("lora-export")


def call(*arguments: object) -> Result:
    """Call the command; a traceback or a defect is an error of the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{arguments} ended in a traceback") from result.exception
    assert result.exit_code != Defect.exit_code, result.output
    return result


def fails(code: int, *arguments: object) -> str:
    """The message of a call that fails with `code`."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output
