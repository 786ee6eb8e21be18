"""Texts of a decoder. NumPy only; texts instead of token ids need a tokenizer.

`write_texts` is what `AdapterSession.generate` does: texts that join and leave a batch. `generate` is the plain loop on
one padded batch, greedy and without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.contract import GATE_INPUT, LOGITS_TO_KEEP
from lora_export.errors import UsageProblem
from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.chat_template import Messages
from lora_export.runtime.decoder_limits import DecoderLimits
from lora_export.runtime.end_tokens import end_tokens_in, has_brought_settings
from lora_export.runtime.host_inputs import empty
from lora_export.runtime.sampling import Sampling
from lora_export.runtime.scheduler import Finish, Request, Scheduler, Token
from lora_export.runtime.text_stream import TextStream

# A text, token ids, or messages for the chat template.
Prompt = str | Sequence[int] | Messages


@dataclass(frozen=True)
class Piece:
    """What one token adds to a text.

    Attributes:
        index: Which of the prompts goes on.
        token_id: The token; None for a text that is over without one, and for an end token.
        text: What of the text is certain with it; empty for prompts of ids.
        finish: Set on the last piece of a text.
    """

    index: int
    token_id: int | None
    text: str
    finish: Finish | None = None


@dataclass(frozen=True)
class Generated:
    """How a prompt goes on.

    Attributes:
        ids: Without an end token.
        text: Of `ids`, without special tokens, up to a stop string; None for prompts of ids without stop strings.
        finish: Why it ends.
    """

    ids: tuple[int, ...]
    text: str | None
    finish: Finish


@dataclass(frozen=True)
class TextOptions:
    """The arguments of `AdapterSession.generate` by the same names."""

    max_new_tokens: int
    sampling: Sampling | None
    stop: tuple[str, ...]
    eos_ids: Collection[int] | None
    max_rows: int


def write_texts(
    session: AdapterSession,
    prompts: Sequence[Prompt],
    adapters: Sequence[RowAdapter] | RowAdapter,
    *,
    options: TextOptions,
    stream: Callable[[Piece], None] | None,
) -> list[Generated]:
    """How `prompts` go on; see `AdapterSession.generate`."""
    if isinstance(prompts, str):
        raise UsageProblem("`prompts` is one text", expected="a list of prompts", next_step="write [text]")
    if not prompts:
        return []
    session = session.snapshot()
    session.bank.rows(adapters, len(prompts))  # refuses unknown names and a wrong number
    is_one = adapters is None or isinstance(adapters, str | Mapping)
    by_row = [adapters] * len(prompts) if is_one else adapters
    ids = [prompt_ids(session, prompt, adapter) for prompt, adapter in zip(prompts, by_row, strict=True)]
    longest = max(map(len, ids)) + options.max_new_tokens
    positions = DecoderLimits.of(session).n_positions
    scheduler = Scheduler(
        session, max_rows=min(options.max_rows, len(prompts)), max_length=min(longest, positions or longest)
    )
    texts: dict[Request, _Text] = {}
    for index, (prompt, own, adapter) in enumerate(zip(prompts, ids, by_row, strict=True)):
        ends = end_tokens(session, adapter) if options.eos_ids is None else options.eos_ids
        request = scheduler.submit(
            own, adapter, sampling=options.sampling, max_new_tokens=options.max_new_tokens, eos_ids=ends
        )
        has_text = _is_text(prompt) or options.stop
        reader = TextStream(session.tokenizer(adapter).decode, options.stop) if has_text else None
        texts[request] = _Text(index, reader)
    while scheduler.n_active or scheduler.n_waiting:
        for token in scheduler.step():
            text = texts[token.request]
            if text.finish is None:
                piece = text.add(token)
                if piece.finish and not token.finish:  # a stop string
                    scheduler.cancel(token.request)
                if stream is not None:
                    stream(piece)
    return [text.whole() for text in texts.values()]


class _Text:
    """A text that is being written; `reader` makes text of its tokens."""

    def __init__(self, index: int, reader: TextStream | None) -> None:
        self._index, self._reader = index, reader
        self._ids: list[int] = []
        self._parts: list[str] = []
        self.finish: Finish | None = None

    def add(self, token: Token) -> Piece:
        is_end = token.finish is Finish.STOP or token.token_id is None
        new = None if is_end else token.token_id
        part = ""
        if new is not None:
            self._ids.append(new)
            part = self._reader.add(new) if self._reader else ""
        if token.finish and self._reader and not self._reader.is_stopped:
            part += self._reader.end()
        is_stopped = self._reader is not None and self._reader.is_stopped
        self.finish = Finish.STOP if is_stopped else token.finish
        self._parts.append(part)
        return Piece(self._index, new, part, self.finish)

    def whole(self) -> Generated:
        return Generated(tuple(self._ids), "".join(self._parts) if self._reader else None, self.finish)


def prompt_ids(session: AdapterSession, prompt: Prompt, adapter: RowAdapter) -> list[int]:
    """The token ids of `prompt` for a row that runs `adapter`."""
    if isinstance(prompt, str):
        return session.tokenizer(adapter).encode(prompt)
    if _is_text(prompt):
        return session.tokenizer(adapter).encode_chat(prompt)
    return list(map(int, prompt))


def end_tokens(session: AdapterSession, adapter: RowAdapter) -> frozenset[int]:
    """The tokens that end a text of `adapter`; see `end_tokens_in`."""
    place, export = session.preprocessing(adapter), session.folder
    is_brought = has_brought_settings(place, export, session.manifest)
    return end_tokens_in(place, export, is_brought=is_brought, tokenizer=lambda: session.tokenizer(adapter))


def _is_text(prompt: Prompt) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, attention_mask)`, int64 `[batch, longest]`, padded on the left."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def empty_cache(session: AdapterSession, batch: int) -> dict[str, np.ndarray]:
    """The graph's past of length 0, `[batch, kv_heads, 0, head_size]` by input name."""
    return {spec.name: empty(spec, batch) for spec in session.manifest.contract.past}


def generate(
    session: AdapterSession,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[RowAdapter] | RowAdapter = None,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    pad_id: int = 0,
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the prompt, up to and without an end token.

    A text goes on with the adapters that it was begun with, whatever another thread loads or unloads meanwhile.

    Args:
        prompts: Token ids of each row; rows may differ in length.
        adapters: As in `AdapterSession.run`.
        pad_id: Filler on the left of shorter rows; masked, so any id serves.
    """
    session = session.snapshot()
    ids, mask = left_pad(prompts, pad_id)
    cache = session.cache(len(prompts), ids.shape[1] + max_new_tokens)
    gate = session.gate(ids, adapters)
    last = {spec.name: np.array(1) for spec in session.contract.optional_inputs if spec.name == LOGITS_TO_KEEP}
    generated: list[list[int]] = [[] for _ in prompts]
    finished = np.zeros(len(prompts), bool)
    for _ in range(max_new_tokens):
        feeds = {"input_ids": ids, "attention_mask": mask} | last
        if gate is not None:
            feeds[GATE_INPUT] = gate
        results = session.run(feeds, adapters, cache=cache)
        best = results["logits"][:, -1].astype(np.float32).argmax(axis=-1)
        for row, token in enumerate(best):
            finished[row] |= int(token) in eos_ids
            if not finished[row]:
                generated[row].append(int(token))
        if finished.all():
            break
        ids = best[:, None].astype(np.int64)
        gate = None if gate is None else gate[:, -1:]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return generated
