"""How an encoder-decoder's target starts and ends, and what it may not hold, by its configuration. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.errors import UsageProblem, some_of
from lora_export.reading import tokens_in
from lora_export.runtime.generation_config import eos_ids_of

# An entry of a start: a token, or several, of which the model takes the likeliest.
Start = tuple[int | frozenset[int], ...]
TRANSCRIBE, TRANSLATE = "transcribe", "translate"
_WHERE = "generation_config.json or config.json"
# Fields that change what Transformers writes and have no effect here, with the value that changes nothing.
_NOT_DONE = {
    "num_beams": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0, "num_beam_groups": 1, "penalty_alpha": 0, "encoder_repetition_penalty": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TargetRules:
    """What Transformers' `generate` does to the targets of one configuration, beside choosing tokens.

    Attributes:
        start: What the decoder is given first; its first entry is a token.
        eos_ids: The tokens that end a text.
        suppressed: Tokens that are never written (`suppress_tokens`, and `bad_words_ids` of one token).
        suppressed_first: Tokens that are not the first one written (`begin_suppress_tokens`).
    """

    start: Start
    eos_ids: frozenset[int]
    suppressed: frozenset[int] = frozenset()
    suppressed_first: frozenset[int] = frozenset()

    @classmethod
    def of(cls, defaults: Mapping) -> TargetRules:
        """By the fields of a configuration, see `generation_defaults`."""
        names = ("decoder_start_token_id", "forced_bos_token_id")
        start = tuple(token for name in names for token in tokens_in(defaults, name, _WHERE)[:1])
        ends = eos_ids_of(defaults)
        words = defaults.get("bad_words_ids") or ()
        bad = {word[0] for word in words if isinstance(word, Sequence) and len(word) == 1 and type(word[0]) is int}
        never = frozenset(token for token in tokens_in(defaults, "suppress_tokens", _WHERE) if token >= 0)
        first = frozenset(tokens_in(defaults, "begin_suppress_tokens", _WHERE))
        return cls(start, ends, never | (bad - ends), first)

    def allowed(self, scores: np.ndarray, *, is_first: bool) -> np.ndarray:
        """`scores` `[vocabulary]`, those of tokens that may not come next at -inf; a copy where there are any."""
        refused = self.suppressed | self.suppressed_first if is_first else self.suppressed
        refused = [token for token in refused if token < len(scores)]
        if refused:
            scores = scores.astype(np.float32)
            scores[refused] = -np.inf
        return scores


def fixed_part(start: Start) -> tuple[int, ...]:
    """The tokens of a start before the first that the model chooses."""
    fixed = []
    for entry in start:
        if not isinstance(entry, int):
            break
        fixed.append(entry)
    return tuple(fixed)


def settings_not_done(defaults: Mapping) -> dict[str, object]:
    """The fields of a configuration that Transformers' `generate` obeys and this package does not, as they are."""
    return {
        name: defaults[name]
        for name, nothing in _NOT_DONE.items()
        if defaults.get(name) is not None and defaults[name] != nothing
    }


def languages_of(defaults: Mapping) -> dict[str, int]:
    """The languages of a speech model by their codes, such as `en`; none where it knows one only."""
    found = defaults.get("lang_to_id")
    if not isinstance(found, Mapping) or defaults.get("is_multilingual") is False:
        return {}
    return {str(name).strip("<|>"): token for name, token in found.items() if type(token) is int}


def speech_start(defaults: Mapping, language: str | None = None, task: str = TRANSCRIBE) -> Start:
    """How Whisper's target starts, as Transformers starts it without timestamps: model, language, task.

    Args:
        language: By its code; None for the likeliest, which the model says itself.
        task: TRANSCRIBE, or TRANSLATE to English.

    Raises:
        UsageProblem: The model has no such language or task.
    """
    start, languages, tasks = TargetRules.of(defaults).start[:1], languages_of(defaults), defaults.get("task_to_id")
    end = tokens_in(defaults, "no_timestamps_token_id", _WHERE)
    if not languages:
        if task != TRANSCRIBE or language not in (None, "en"):
            raise UsageProblem(
                "The model knows one language and writes down what it hears",
                expected="no language, or en; transcription",
                found=f"{language or 'no language'}; {task}",
            )
        return (*start, *end)
    if language is not None and language not in languages:
        raise UsageProblem(
            "The model does not know this language",
            expected=some_of(sorted(languages), 12),
            found=language[:40],
            next_step="name it by its code, or leave it out: the model finds it by itself",
        )
    chosen = frozenset(languages.values()) if language is None else languages[language]
    asked = tasks.get(task) if isinstance(tasks, Mapping) else None
    if type(asked) is not int and task != TRANSCRIBE:
        raise UsageProblem(f"The model has no token for the task {task!r}", where=f"{_WHERE}: task_to_id")
    return (*start, chosen, *([asked] if type(asked) is int else []), *end)
