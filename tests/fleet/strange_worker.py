"""A worker that does what it is told: answer, die, hang, swell, raise."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.outcomes import AdapterOutcome, Outcome


@dataclass(frozen=True)
class Order:
    name: str
    act: str
    once: Path | None = None


def work():
    return act


def act(order: Order) -> AdapterOutcome:
    if order.once is not None and not order.once.exists():
        order.once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    match order.act:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
        case "hang":
            time.sleep(600)
        case "swell":
            held = bytearray(300_000_000)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(600)
        case "raise":
            raise KeyError("a key")
        case "no disk":
            raise EnvironmentUnusable("The disk is full")
    return AdapterOutcome(order.name, str(os.getpid()), Outcome.SERVED)
