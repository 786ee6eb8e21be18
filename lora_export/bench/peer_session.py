"""A session of another tool's graph, with what a bench asks of the session of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.contract import SINGLE, GraphContract
from lora_export.runtime.bank import Bank, RowAdapter
from lora_export.runtime.session import open_session


@dataclass(frozen=True)
class PeerSession:
    """A session of another tool's graph, which has no adapters: what `latency` needs of an `AdapterSession`."""

    session: object
    provider: str
    contract: GraphContract
    graph: str = SINGLE

    @property
    def bank(self) -> Bank:
        return Bank(self.contract, self.provider, {}, ())

    def bind_adapters(self, binding: object, adapters: Sequence[RowAdapter] | RowAdapter, batch: int) -> None:
        """There are none."""


def open_peer(graph: Path, contract: GraphContract, provider: str) -> PeerSession:
    """A session of the ONNX file `graph`, as those of exports are opened to be timed.

    Raises:
        EnvironmentUnusable: Its compute would not run on `provider`.
    """
    return PeerSession(open_session(graph, provider, stop_spinning=True), provider, contract)
