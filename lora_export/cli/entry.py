"""The installed command: what must hold before the command line is there."""

from __future__ import annotations

import importlib.util
import signal
import sys
from typing import NoReturn

from lora_export.errors import EnvironmentUnusable


def main() -> None:
    """Run the command line; exit 4 where Click is not installed, and 130 where Ctrl-C comes before a command begins."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored: in a background
        signal.signal(signal.SIGINT, _end)
    if importlib.util.find_spec("click") is None:
        print(
            "error: The command needs Click, which is not installed here\n"
            "  next: pip install click; in Python, `from lora_export import AdapterSession` works without",
            file=sys.stderr,
        )
        sys.exit(EnvironmentUnusable.exit_code)
    from lora_export.cli.main import main as command

    command()


def _end(_number: int, _frame: object) -> NoReturn:
    """Click would make exit code 1 of a KeyboardInterrupt, which is a failed gate's."""
    sys.exit(130)
