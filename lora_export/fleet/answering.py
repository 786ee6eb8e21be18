"""What a worker answers to an assignment, whatever carries it there and back."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import EnvironmentUnusable, told
from lora_export.fleet.outcomes import AdapterOutcome
from lora_export.quiet import leave_quantized_layers_out

Work = Callable[[object], AdapterOutcome]


@dataclass(frozen=True)
class Broken:
    """What a worker answers where it raised what no input should make it raise."""

    reason: str


Answer = AdapterOutcome | Broken | EnvironmentUnusable


def work_of(named: str) -> Work:
    """What `module:function` makes: the function from an assignment to its outcome. It brings PEFT and PyTorch."""
    leave_quantized_layers_out()
    module, _, function = named.partition(":")
    return getattr(importlib.import_module(module), function)()


def answer_to(assignment: object, work: Work) -> Answer:
    """The outcome of `assignment`; what it raised, where that is the machine's fault or ours."""
    try:
        return work(assignment)
    except EnvironmentUnusable as error:
        return error
    except OSError as error:
        return Broken(f"the system refused it: {told(error)}")
    except Exception as error:
        return Broken(f"a defect: {told(error)}")


def resident_bytes(process: int | str = "self") -> int:
    """The memory of a process; 0 where the kernel does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
