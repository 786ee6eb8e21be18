"""The installed command: says in a line what it needs where only the runtime is installed."""

from __future__ import annotations

import importlib.util
import sys

from lora_export.errors import EnvironmentUnusable


def main() -> None:
    """Run the command line; exit 4 where Click is not installed."""
    if importlib.util.find_spec("click") is None:
        print(
            "error: The command needs Click, which is not installed here\n"
            "  next: pip install click; in Python, `from lora_export import AdapterSession` works without",
            file=sys.stderr,
        )
        sys.exit(EnvironmentUnusable.exit_code)
    from lora_export.cli.main import main as command

    command()
