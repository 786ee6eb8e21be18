"""`Room`: the bytes that requests with images or sounds hold together, for as long as they are in memory.

What is counted of a request is its body, and what the graph takes of each image and sound in it. A request that finds
no room is refused, so that many that wait side by side do not take all of a machine's memory. The body is counted until
the request is over and nothing works on it any more, an array until nothing refers to it: a run that nobody waits for
ends all the same, and holds its inputs until then.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future

import numpy as np

from lora_export.serve.batching import LEAST_RETRY
from lora_export.serve.problems import Problem


class Room:
    """Room for `most` bytes; requests take and give back from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()  # an array may go at any time, such as while the lock is held
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

    def _give_back(self, held: Held, n_bytes: int) -> None:
        with self._lock:
            self.n_taken -= n_bytes
            held.n_bytes -= n_bytes


class Held:
    """What a request holds of a `Room`.

    Attributes:
        n_bytes: As many.
        is_over: Whether nobody waits for the request any more.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._n_users, self._n_own = 1, 0  # the request, and the jobs that work on it; bytes that are no array's
        self.n_bytes, self.is_over = 0, False

    def take(self, n_bytes: int) -> None:
        """Take so many bytes more, until the request is over and its jobs are done.

        Raises:
            Problem: 499 if the request is over, 413 if it takes more than there ever is, 429 if it does so now.
        """
        self._room._take(self, n_bytes)
        self._n_own += n_bytes

    def take_array(self, array: np.ndarray) -> None:
        """Take the bytes of an array that owns its memory, until nothing refers to it.

        Raises:
            Problem: As `take`.
        """
        self._room._take(self, array.nbytes)
        weakref.finalize(array, self._room._give_back, self, array.nbytes).atexit = False

    def used_by(self, job: Future) -> None:
        """Keep what is taken until `job` is done, or will never start."""
        with self._room._lock:
            self._n_users += 1
        job.add_done_callback(lambda _: self._let_go())

    def give_back(self) -> None:
        """The request is over; what it has taken is there for others once nothing works on it."""
        with self._room._lock:
            if self.is_over:
                return
            self.is_over = True
        self._let_go()

    def _let_go(self) -> None:
        with self._room._lock:
            self._n_users -= 1
            if not self._n_users:
                self._room._give_back(self, self._n_own)
                self._n_own = 0
