"""Libraries that print while they work, kept off the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

_LOGGERS = ("torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir", "peft")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop the progress prints and warnings of the exporter and its passes; `LORA_EXPORT_DEBUG=1` shows them.

    A library that sets up Python's logging when it is imported (ONNX Runtime's quantizers do) leaves it as it was.
    """
    if os.environ.get("LORA_EXPORT_DEBUG"):
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    root, root_level, handlers = logging.root, logging.root.level, tuple(logging.root.handlers)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        root.setLevel(root_level)
        root.handlers[:] = handlers


def leave_quantized_layers_out() -> None:
    """Let PEFT find no bitsandbytes: it imports it for layers that no command uses, which takes 1.5 s and prints on
    stderr. Once PEFT is loaded, it is too late."""
    if "peft" not in sys.modules:
        sys.modules.setdefault("bitsandbytes", None)
