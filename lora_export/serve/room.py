"""`Room`: the bytes that requests with images or sounds hold together, from when they have come until they are over.

What is counted of a request is its body, and what the graph takes of each image and sound in it. A request that finds
no room is refused, so that many that wait side by side do not take all of a machine's memory.
"""

from __future__ import annotations

import threading

from lora_export.serve.batching import LEAST_RETRY
from lora_export.serve.problems import Problem


class Room:
    """Room for `most` bytes; requests take and give back from any thread."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self.n_taken = 0

    def held(self) -> Held:
        """What one request holds; nothing yet."""
        return Held(self)

    def _take(self, held: Held, n_bytes: int) -> None:
        with self._lock:
            if held.is_over:
                raise Problem(499, "Nobody waits for the answer")
            if held.n_bytes + n_bytes > self._most:
                raise Problem(
                    413, f"The images or sounds of the request take more than {self._most:,} bytes", code="too_large"
                )
            if self.n_taken + n_bytes > self._most:
                raise Problem(
                    429, f"Images and sounds that wait take {self.n_taken:,} bytes of {self._most:,}; there is no room "
                    "for those of the request", code="signals_full", retry_after_s=LEAST_RETRY,
                )  # fmt: skip
            held.n_bytes += n_bytes
            self.n_taken += n_bytes

    def _give_back(self, held: Held) -> None:
        with self._lock:
            self.n_taken -= held.n_bytes
            held.n_bytes, held.is_over = 0, True


class Held:
    """What a request holds of a `Room`.

    Attributes:
        is_over: Whether nobody waits for the request any more.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self.n_bytes, self.is_over = 0, False

    def take(self, n_bytes: int) -> None:
        """Take so many bytes more.

        Raises:
            Problem: 499 if the request is over, 413 if it takes more than there ever is, 429 if it does so now.
        """
        self._room._take(self, n_bytes)

    def give_back(self) -> None:
        """The request is over; whatever it has taken is there for others."""
        self._room._give_back(self)
