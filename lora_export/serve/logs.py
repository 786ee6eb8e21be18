"""Logs as one JSON object a line. No text of a request or an answer is in them, unless `--log-prompts` asks for it."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import TextIO

NAME = "lora_export.serve"
# uvicorn's own: what it says of its start and end, and errors below the application.
_OF_UVICORN = "uvicorn.error"


class JsonLines(logging.Formatter):
    """A record as a JSON object: time, level, event, and the fields in its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(stream: TextIO) -> None:
    """Send what the server logs to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name in (NAME, _OF_UVICORN):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # It warns of every damaged form; the server's own line says that it was refused.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: object) -> None:
    """One line of the server's log; an `error` forgets the variables of where it came from."""
    logging.getLogger(NAME).log(level, event, exc_info=error, extra={"fields": fields})
    if error is not None:
        traceback.clear_frames(error.__traceback__)


def bare(error: Exception) -> Exception:
    """`error` without what it came from, which is a note of it: else it keeps the inputs of a run as long as itself."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    error.__context__ = None
    return error.with_traceback(None)
