"""`Seq2SeqScheduler`: many targets on one encoder-decoder, each with its own adapter, which come and go between steps.

Targets that begin together are a group (see `Group`). Every step writes one token of each group, and begins one group
of those that wait. A target that is over leaves its group at once. NumPy only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_export.errors import InputRefused, UsageProblem
from lora_export.reading import CONFIG, model_settings, size_in
from lora_export.runtime.bank import Bank, RowAdapter
from lora_export.runtime.sampling import Sampler, Sampling
from lora_export.runtime.scheduler import Finish, Request, Token
from lora_export.runtime.seq2seq_session import RowAdapters, Seq2SeqSession
from lora_export.runtime.target_group import IDS, Group, Source, Target, rows_of, whole
from lora_export.runtime.targets import Start, TargetRules, fixed_part

# Texts that come while these are written wait, and begin together: a group of one costs a run of its own.
_MOST_GROUPS = 4
# Sizes of a configuration that bound a target.
_POSITIONS = ("max_target_positions", "max_position_embeddings")


class Seq2SeqScheduler:
    """Writes the targets of requests with one session; threads as in `Scheduler`.

    Args:
        max_rows: The most texts at a time.
        max_length: The most tokens of a target, its start included; None for the model's positions.
        max_source_tokens: The most tokens of the sources that begin together, padding included; a longer one begins
            alone. Two frames of a sound count as one token, as Whisper's encoder makes a state of two. None for no
            bound.

    Attributes:
        longest: The most tokens of a target; None where neither the caller nor the model bounds it.

    Raises:
        UsageProblem: A number is out of its range.
    """

    def __init__(
        self,
        session: Seq2SeqSession,
        *,
        max_rows: int,
        max_length: int | None = None,
        max_source_tokens: int | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_length", max_length)):
            if value is not None and value < 1:
                raise UsageProblem(
                    "A limit of the scheduler is out of its range", where=name, expected="at least 1", found=str(value)
                )
        config, where = model_settings(session.folder), session.folder / CONFIG
        positions = size_in(config, *_POSITIONS, where=where)
        self.longest = min((each for each in (max_length, positions) if each is not None), default=None)
        self._session, self._n_rows, self._most_tokens = session, max_rows, max_source_tokens
        self._vocabulary = size_in(config, "vocab_size", where=where)
        self._longest_source = size_in(config, "max_position_embeddings", where=where)
        self._pad = config.get("pad_token_id") or 0
        self._groups: list[Group] = []
        self._waiting: deque[Target] = deque()
        self._cancelled: set[Request] = set()
        self._changing, self._stepping = threading.Lock(), threading.Lock()

    @property
    def n_active(self) -> int:
        """Texts that are written."""
        return len(self._active())

    @property
    def n_waiting(self) -> int:
        """Texts that wait."""
        return len(self._waiting)

    def submit(
        self,
        source: Source,
        adapter: RowAdapter = None,
        *,
        rules: TargetRules,
        start: Start | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int,
        eos_ids: Collection[int] | None = None,
        banks: Mapping[str, Bank] | None = None,
    ) -> Request:
        """Queue a text; `step` gives its tokens.

        Args:
            source: The encoder's inputs for one row: `input_ids` `[length]`, and its mask if it is padded, or
                `input_features` `[bands, frames]`.
            rules: See `Seq2SeqSession.rules`.
            start, eos_ids: In place of those of `rules`.
            banks: The adapters to choose from, by graph: the session's, of an earlier moment; None for those of now.

        Raises:
            UsageProblem: The adapter is not loaded, the source is not what the encoder takes, or nothing says how the
                target starts.
        """
        start = rules.start if start is None else start
        fixed = fixed_part(start)
        self._require(source, fixed, max_new_tokens)
        banks = banks or self._session.banks
        rows = {graph: bank.rows(adapter, 1)[0] for graph, bank in banks.items()}
        sampling = sampling or Sampling()
        ends = rules.eos_ids if eos_ids is None else frozenset(eos_ids)
        request = Request(fixed, adapter, sampling, int(max_new_tokens), ends)
        sampler, left = Sampler(sampling, fixed), deque(start[len(fixed) :])
        with self._changing:
            self._waiting.append(Target(request, whole(source), rows, rules, sampler, left))
        return request

    def cancel(self, request: Request) -> None:
        """End a request; the next step says so. One that is over, or is not of this scheduler, is left alone."""
        with self._changing:
            if any(target.request is request for target in (*self._waiting, *self._active())):
                self._cancelled.add(request)

    def clear(self) -> None:
        """Forget all texts at once, those that wait too: after a step that raised, which is of all of them."""
        with self._stepping, self._changing:
            self._waiting.clear()
            self._groups.clear()
            self._cancelled.clear()

    def step(self) -> list[Token]:
        """Write one token of every text, and begin with some of those that wait.

        A text that cannot go on fails alone. What the step raises is of all texts.
        """
        with self._stepping:
            tokens = self._drop_cancelled()
            going_on = list(self._groups)
            new = self._next_group()
            for group in ([new] if new else []) + going_on:
                tokens += self._run(group)
        return tokens

    def _active(self) -> list[Target]:
        return [target for group in tuple(self._groups) for target in group.targets]

    def _require(self, source: Source, start: Sequence[int], max_new_tokens: int) -> None:
        if not start:
            raise UsageProblem(
                "Nothing says how a target starts",
                where=f"{self._session.folder}: config.json, generation_config.json",
                expected="decoder_start_token_id",
                next_step="name the first tokens with start_ids",
            )
        if max_new_tokens < 1 or (self.longest is not None and len(start) >= self.longest):
            most = "" if self.longest is None else f", and a start of at most {self.longest - 1}"
            raise UsageProblem(
                "The target has no room for a token",
                expected=f"at least 1 new token{most}",
                found=f"{max_new_tokens} new tokens after {len(start)}",
            )
        ids = source.get(IDS)
        if ids is not None and (not len(ids) or ids.min() < 0 or ids.max() >= (self._vocabulary or 2**31)):
            raise UsageProblem(
                "The source is empty, or has a token that the model does not know",
                expected=f"ids from 0 to {self._vocabulary - 1}" if self._vocabulary else "ids from 0 on",
                found=f"{len(ids)} tokens" + (f" from {ids.min()} to {ids.max()}" if len(ids) else ""),
            )
        if ids is not None and self._longest_source is not None and len(ids) > self._longest_source:
            raise UsageProblem(
                "The source is longer than the model's positions",
                expected=f"at most {self._longest_source} tokens",
                found=f"{len(ids)}",
            )

    def _drop_cancelled(self) -> list[Token]:
        with self._changing:
            gone = set(self._cancelled)
            self._waiting = deque(target for target in self._waiting if target.request not in gone)
            self._cancelled.clear()
            for group in list(self._groups):
                self._keep(group, [target for target in group.targets if target.request not in gone])
        return [Token(request, None, Finish.CANCELLED) for request in gone]

    def _keep(self, group: Group, targets: Collection[Target]) -> None:
        """With `_changing` held: only `targets` of `group` go on."""
        for target in set(group.targets) - set(targets):
            self._cancelled.discard(target.request)
        group.keep(targets)
        if not targets:
            self._groups.remove(group)

    def _next_group(self) -> Group | None:
        """Those that wait longest, with starts of one length, as many as there is room for."""
        with self._changing:
            room = self._n_rows - len(self._active())
            if not self._waiting or room < 1 or len(self._groups) >= _MOST_GROUPS:
                return None
            taken: list[Target] = []
            longest, n_start = 0, len(self._waiting[0].request.prompt_ids)
            for target in self._waiting:
                wider = max(longest, _length(target.source))
                is_too_much = self._most_tokens is not None and wider * (len(taken) + 1) > self._most_tokens
                if len(target.request.prompt_ids) != n_start or (taken and is_too_much):
                    continue
                taken.append(target)
                longest = wider
                if len(taken) == room:
                    break
            chosen = set(taken)
            self._waiting = deque(target for target in self._waiting if target not in chosen)
            self._groups.append(group := Group(self._session, self._pad, taken))
        return group

    def _run(self, group: Group) -> list[Token]:
        is_new = not group.cache
        try:
            scores = group.scores()
        except Exception:
            if not (failed := group.failed()):
                raise
            self._go_on_without(group, failed, is_new=is_new)
            return [Token(target.request, None, Finish.FAILED, error) for target, error in failed.items()]
        tokens = [target.next(of_row, self.longest) for target, of_row in zip(group.targets, scores, strict=True)]
        with self._changing:
            self._keep(group, [t for t, token in zip(group.targets, tokens, strict=True) if not token.finish])
        return tokens

    def _go_on_without(self, group: Group, failed: Collection[Target], *, is_new: bool) -> None:
        """With the next step; nothing was added to a row."""
        others = [target for target in group.targets if target not in failed]
        with self._changing:
            self._keep(group, others)
            if is_new and others:
                self._groups.remove(group)
                self._waiting.extendleft(reversed(others))


def _length(source: Source) -> int:
    """The tokens of a text `[length]`, or half the frames of a sound `[bands, frames]`."""
    return len(source[IDS]) if IDS in source else next(iter(source.values())).shape[-1] // 2


def write_targets(
    session: Seq2SeqSession,
    inputs: Mapping[str, np.ndarray],
    adapters: RowAdapters,
    *,
    max_new_tokens: int,
    start_ids: Sequence[int] | None,
    eos_ids: Collection[int] | None,
    suppress: bool,
) -> list[list[int]]:
    """The greedy target of each row; see `Seq2SeqSession.generate`."""
    sources = rows_of(inputs)
    session = session.snapshot()
    next(iter(session.banks.values())).rows(adapters, len(sources))  # refuses unknown names and a wrong number
    is_one = adapters is None or isinstance(adapters, str | Mapping)
    by_row = [adapters] * len(sources) if is_one else adapters
    scheduler = Seq2SeqScheduler(session, max_rows=len(sources))
    start = None if start_ids is None else tuple(map(int, start_ids))
    written: dict[Request, list[int]] = {}
    for source, adapter in zip(sources, by_row, strict=True):
        rules = session.rules(adapter)
        rules = rules if suppress else replace(rules, suppressed=frozenset(), suppressed_first=frozenset())
        how = {"start": start, "max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
        written[scheduler.submit(source, adapter, rules=rules, **how)] = []
    while scheduler.n_active or scheduler.n_waiting:
        for token in scheduler.step():
            if token.finish is Finish.FAILED:
                raise _failure(token.error) from token.error
            if token.finish is not Finish.STOP and not token.is_start:
                written[token.request].append(token.token_id)
    return list(written.values())


def _failure(error: Exception | None) -> Exception:
    if not isinstance(error, FloatingPointError):
        return error
    return InputRefused(
        "The scores of a token are not finite, so no token is the likeliest",
        next_step="run `lora-export check`; a float16 export may overflow where a float32 one does not",
    )
