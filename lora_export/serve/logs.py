"""Logs as one JSON object a line. No text of a request or an answer is in them, unless `--log-prompts` asks for it."""

from __future__ import annotations

import json
import logging
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
    """One line of the server's log."""
    logging.getLogger(NAME).log(level, event, exc_info=error, extra={"fields": fields})
