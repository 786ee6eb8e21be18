"""A text token by token: what of it will not change any more, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder gives for bytes that are no character yet.
_UNFINISHED = "�"


class TextStream:
    """The text of tokens that come one at a time. All that `add` and `end` give together is the tokens' text.

    Args:
        decode: The text of token ids.
        stop: Texts that end it; they are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids: list[int] = []
        self._n_given = 0
        # Tokens before the second are in `_known`; those from the first on are decoded again to join the next to them.
        self._first, self._second = 0, 0
        self._known = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What the text has more with `token`; it may be empty until later tokens decide how it goes on."""
        self._ids.append(token)
        before = self._decode(self._ids[self._first : self._second])
        after = self._decode(self._ids[self._first :])
        if after.endswith(_UNFINISHED) or len(after) <= len(before):
            return ""
        self._known += after[len(before) :]
        self._first, self._second = self._second, len(self._ids)
        return self._give(self._known, is_whole=False)

    def end(self) -> str:
        """What is left when no token follows."""
        return "" if self.is_stopped else self._give(self._decode(self._ids), is_whole=True)

    def _give(self, known: str, *, is_whole: bool) -> str:
        places = [place for text in self._stop if (place := known.find(text)) >= 0]
        if places:
            self.is_stopped = True
            known = known[: min(places)]
        elif not is_whole:
            known = known[: len(known) - self._n_held(known)]
        new, self._n_given = known[self._n_given :], max(len(known), self._n_given)
        return new

    def _n_held(self, known: str) -> int:
        """How many letters at the end may begin a stop string."""
        longest = 0
        for text in self._stop:
            for n in range(min(len(text) - 1, len(known)), longest, -1):
                if known.endswith(text[:n]):
                    longest = n
                    break
        return longest
