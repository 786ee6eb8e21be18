"""Which side of a check is in memory: of a large export one at a time.

ONNX Runtime's session and PyTorch's model take the bytes of the weights each, and what looks into a graph takes them
once more. So a side is let go when another one's turn comes, and made again from its files when it is needed. The peak
is that of the largest side, and a change of sides costs about what reading the weights does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lora_export.contract import graph_file
from lora_export.environment import give_back_memory, is_large, return_large_arrays
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.runtime.session import open_session

AnySession = AdapterSession | Seq2SeqSession
# A graph's file and a provider to an ONNX Runtime session.
Opener = Callable[[Path, str], object]


class Side(Protocol):
    """What takes the bytes of the weights."""

    def let_go(self) -> None:
        """Keep nothing of them; what is asked for next makes it again."""


class Turns:
    """Whose turn it is.

    Args:
        one_at_a_time: Whether the side before is let go; else each stays as long as it is used.
        with_sessions: Whether ONNX Runtime's sessions are sides: those of a GPU lie elsewhere.
    """

    def __init__(self, *, one_at_a_time: bool = False, with_sessions: bool = True) -> None:
        self._one_at_a_time, self._with_sessions = one_at_a_time, with_sessions
        if one_at_a_time:
            return_large_arrays()
        self._side: Side | None = None

    @classmethod
    def of(cls, session: AnySession) -> Turns:
        """Those of the check of an export: one side at a time where its weights are worth it."""
        is_one = is_large(session.manifest, session.folder)
        return cls(one_at_a_time=is_one, with_sessions=session.provider == "cpu")

    def take(self, side: Side | None) -> None:
        """Let go of the side that is in memory, if it is another; `side` is the one from now on, None for none."""
        if not self._one_at_a_time or side is self._side:
            return
        before, self._side = self._side, side
        if before is not None:
            before.let_go()
            del before
            gc.collect()  # a model is a cycle
            give_back_memory()

    def take_session(self, sessions: Side | None = None) -> None:
        """As `take`, before a session is opened or used; None for one that is gone before the next turn."""
        if self._with_sessions:
            self.take(sessions)


class _Sessions:
    """The ONNX Runtime sessions of one export's graphs: a side."""

    def __init__(self, turns: Turns, *, folder: Path, provider: str, opens: Opener) -> None:
        self._turns, self._opens = turns, opens
        self._where = (folder, provider)
        self.opened: dict[str, object] = {}

    def let_go(self) -> None:
        self.opened.clear()

    def take(self, graph: str) -> object:
        """The session of `graph`, opened if it is not."""
        self._turns.take_session(self)
        if graph not in self.opened:
            folder, provider = self._where
            self.opened[graph] = self._opens(folder / graph_file(graph), provider)
        return self.opened[graph]


class _SessionInTurn:
    """All that an `InferenceSession` has, of one that is opened when it is used."""

    def __init__(self, sessions: _Sessions, graph: str) -> None:
        self._sessions, self._graph = sessions, graph

    def __getattr__(self, name: str) -> object:
        return getattr(self._sessions.take(self._graph), name)


def in_turn(session: AnySession, turns: Turns, opens: Opener | None = None) -> AnySession:
    """`session` with its adapters, as a side: open in its turn alone.

    Args:
        opens: What makes an ONNX Runtime session of a graph's file on a provider, otherwise than `session` did.
    """
    sessions = _Sessions(turns, folder=session.folder, provider=session.provider, opens=opens or open_session)
    if opens is None:
        turns.take_session(sessions)

    def alone(one: AdapterSession) -> AdapterSession:
        if opens is None:
            sessions.opened[one.graph] = one.session
        view = one.snapshot()
        view.runs = one.runs.on(_SessionInTurn(sessions, one.graph))
        return view

    if isinstance(session, AdapterSession):
        return alone(session)
    view = session.snapshot()
    view.sessions = {graph: alone(each) for graph, each in session.sessions.items()}
    return view
