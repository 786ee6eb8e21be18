"""Where ONNX Runtime runs the operators of an open session."""

from __future__ import annotations

from lora_export.bench.results import ProviderOperators
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.runtime.session import placement


def placements(name: str, session: AdapterSession | Seq2SeqSession) -> tuple[ProviderOperators, ...]:
    """Operators with their number, most frequent first, by graph and execution provider of the session `name`."""
    sessions = session.sessions.values() if isinstance(session, Seq2SeqSession) else [session]
    return tuple(
        ProviderOperators(name, each.graph, provider, dict(operators.most_common()))
        for each in sessions
        for provider, operators in sorted(placement(each.session).items())
    )
