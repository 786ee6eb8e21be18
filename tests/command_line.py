"""Calls of the command line in this process, for tests of any room."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner, Result

from lora_export.cli.main import main
from lora_export.errors import Defect

SCRIPT = Path(sys.executable).with_name("lora-export")
# Of `bench`, by name: what the fixture `short_timing` sets.
SHORT_TIMING = {
    "lora_export.bench.warm_up.WINDOW_SECONDS": 0.001,
    "lora_export.bench.warm_up.MOST_SECONDS": 0.02,
    "lora_export.bench.latency.SAMPLE_SECONDS": 0.0005,
}


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


# Sends its folder and arguments, prints what comes back, and exits with the code in its first line.
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as there:
    there.connect({place!r})
    there.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
    code, _, output = there.makefile(encoding="utf-8").read().partition("\\n")
print(output, end="")
sys.exit(int(code))
"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Path]:
    """A `lora-export` in `folder` for a script to call, whose work this process does: it has the libraries loaded.

    Meanwhile this process is in the folder of the call, and the test waits for the script.
    """
    place = f"/tmp/lora-export-{os.getpid()}.socket"  # a socket's path is short

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            where, arguments = json.loads(self.rfile.readline())
            with contextlib.chdir(where):
                result = CliRunner().invoke(main, arguments)
            self.wfile.write(f"{result.exit_code}\n{result.output}".encode())

    client = folder / "lora-export"
    client.write_text(CLIENT.format(python=sys.executable, place=place), encoding="utf-8")
    client.chmod(0o755)
    Path(place).unlink(missing_ok=True)
    with socketserver.UnixStreamServer(place, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield client
        finally:
            server.shutdown()
            Path(place).unlink()
