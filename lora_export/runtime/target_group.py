"""Targets of an encoder-decoder that are written together: a row each, each with its own adapter. NumPy only.

A decoder with a cross-attention takes no mask of its own tokens. So all rows of a run have the same number of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_export.contract import DECODER, DECODER_WITH_PAST, ENCODER, PAST, PRESENT, present_of
from lora_export.runtime.batch import BatchRun, mask_padded_classes, run_batch
from lora_export.runtime.sampling import Sampler, require_finite
from lora_export.runtime.scheduler import Finish, Request, Token
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.runtime.stacking import RowSpec
from lora_export.runtime.targets import TargetRules

IDS, MASK = "input_ids", "attention_mask"
# The encoder's inputs for one row, by name, without the batch's axis.
Source = Mapping[str, np.ndarray]


@dataclass(eq=False)
class Target:
    """A request in work.

    Attributes:
        rows: What it runs, by graph.
        to_start: What it has yet to be given.
        last: The token that the next step goes on from.
    """

    request: Request
    source: Source
    rows: Mapping[str, RowSpec]
    rules: TargetRules
    sampler: Sampler
    to_start: deque[int | frozenset[int]]
    last: int = -1
    n_started: int = 0
    n_written: int = 0

    def next(self, scores: np.ndarray, longest: int | None) -> Token:
        """What follows the last token, by its `scores` `[vocabulary]`.

        Args:
            longest: The most tokens of a target, its start included.
        """
        request, is_start = self.request, bool(self.to_start)
        try:
            self.last = token = self._started(scores) if is_start else self._written(scores)
        except Exception as error:  # of this text, whatever it is
            return Token(request, None, Finish.FAILED, error)
        is_full = len(request.prompt_ids) + self.n_started + self.n_written == longest
        if is_start:
            return Token(request, token, Finish.LENGTH if is_full else None, is_start=True)
        if token in request.eos_ids:
            return Token(request, token, Finish.STOP)
        return Token(request, token, Finish.LENGTH if is_full or self.n_written == request.max_new_tokens else None)

    def _started(self, scores: np.ndarray) -> int:
        """The next token of the start: as it is given, or the likeliest of those given."""
        self.n_started += 1
        entry = self.to_start.popleft()
        if isinstance(entry, int):
            return entry
        require_finite(scores)
        tokens = np.array(sorted(token for token in entry if token < len(scores)))
        return int(tokens[scores[tokens].argmax()])

    def _written(self, scores: np.ndarray) -> int:
        token = self.sampler.choose(self.rules.allowed(scores, is_first=not self.n_written))
        self.n_written += 1
        return token


@dataclass(eq=False)
class Group:
    """Targets with equally many tokens; array row `i` is of target `i`.

    Attributes:
        fixed: The source's mask (text), and the cross-attention's `past_key_values.{i}.encoder.key|value`.
        cache: `past_key_values.{i}.decoder.key|value`, `[batch, heads, past, head_size]`.
    """

    session: Seq2SeqSession
    pad: int
    targets: list[Target]
    fixed: dict[str, np.ndarray] = field(default_factory=dict)
    cache: dict[str, np.ndarray] = field(default_factory=dict)

    def keep(self, targets: Collection[Target]) -> None:
        """Let all others go."""
        places = [place for place, target in enumerate(self.targets) if target in targets]
        if len(places) < len(self.targets):
            self.targets = [self.targets[place] for place in places]
            self.fixed = {name: array[places] for name, array in self.fixed.items()}
            self.cache = {name: array[places] for name, array in self.cache.items()}

    def scores(self) -> np.ndarray:
        """The scores of each target's next token, `[batch, vocabulary]` in float32."""
        logits = self._advance() if self.cache else self._begin()
        return logits[:, -1].astype(np.float32)

    def _begin(self) -> np.ndarray:
        """Encode the sources and decode the starts."""
        sources = {name: self._stacked(name) for name in self.targets[0].source}
        states = self._graph(ENCODER, sources)["last_hidden_state"]
        mask = {f"encoder_{MASK}": sources[MASK]} if MASK in sources else {}
        starts = np.array([target.request.prompt_ids for target in self.targets], np.int64)
        results = self._graph(DECODER, {IDS: starts, "encoder_hidden_states": states, **mask})
        past = {PAST + name.removeprefix(PRESENT): value for name, value in results.items() if name.startswith(PRESENT)}
        self.fixed = mask | {name: value for name, value in past.items() if ".encoder." in name}
        self.cache = {name: value for name, value in past.items() if ".decoder." in name}
        return results["logits"]

    def _advance(self) -> np.ndarray:
        last = np.array([[target.last] for target in self.targets], np.int64)
        results = self._graph(DECODER_WITH_PAST, {IDS: last, **self.fixed, **self.cache})
        self.cache = {name: results[present_of(name)] for name in self.cache}
        return results["logits"]

    def _stacked(self, name: str) -> np.ndarray:
        """An input of the encoder, `[batch, …]`; shorter texts filled up on the right, where their mask is 0."""
        arrays = [target.source[name] for target in self.targets]
        if name not in (IDS, MASK):
            return np.stack(arrays)
        stacked = np.full((len(arrays), max(map(len, arrays))), self.pad if name == IDS else 0, np.int64)
        for row, array in enumerate(arrays):
            stacked[row, : len(array)] = array
        return stacked

    def _graph(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs of a graph; scores beyond a row's own classes are the lowest number."""
        session = self.session.sessions[graph]
        bank, rows = session.bank, tuple(target.rows[graph] for target in self.targets)
        rows = rows[:1] if len(set(rows)) == 1 else rows
        names = [spec.name for spec in session.contract.outputs]
        results = run_batch(session.session, bank, BatchRun(inputs, rows, names))
        mask_padded_classes(results, session.contract, bank.classes(rows))
        return results

    def failed(self) -> dict[Target, Exception]:
        """Those whose adapters cannot be had, such as one whose file is not what it was, and why."""
        found = {}
        for target in self.targets:
            try:
                for graph, row in target.rows.items():
                    self.session.sessions[graph].bank.stacked([row])
            except Exception as error:
                found[target] = error
        return found


def whole(source: Source) -> Source:
    """`source` with the mask of a text that is not padded."""
    return {**source, MASK: np.ones_like(source[IDS])} if IDS in source and MASK not in source else source


def rows_of(inputs: Mapping[str, np.ndarray]) -> Sequence[Source]:
    """The rows of a batch."""
    n_rows = len(next(iter(inputs.values())))
    return [{name: np.asarray(array)[row] for name, array in inputs.items()} for row in range(n_rows)]
