"""How much a chat template may do: it comes from elsewhere, and Jinja's sandbox bounds neither time nor memory.

1. Lines of the template that are run: at most `MOST_LINES`, loops and macros counted.
2. Numbers given to filters and methods, such as a width: at most `MOST_NUMBER`.
3. What `*` and `**` make, and what a namespace keeps: texts and lists of at most `MOST_SIZE`, numbers of so many bits.

Not bounded: one template that doubles a text line by line.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# The longest chats and templates of published models stay far below each.
MOST_LINES, MOST_NUMBER, MOST_SIZE = 2_000_000, 1_000_000, 10_000_000
_TEMPLATE = "<template>"
_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{6,}|\*)")


class TooMuch(Exception):
    """A template does more than it may."""


@contextmanager
def few_lines() -> Iterator[None]:
    """Count the lines of templates that this thread runs, and stop at `MOST_LINES`.

    Raises:
        TooMuch: There are more.
    """
    left = MOST_LINES

    def of_line(frame: FrameType, event: str, argument: object) -> Callable:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooMuch(f"it runs more than {MOST_LINES:,} lines")
        return of_line

    def of_call(frame: FrameType, event: str, argument: object) -> Callable | None:
        return of_line if frame.f_code.co_filename == _TEMPLATE else None

    before = sys.gettrace()
    sys.settrace(of_call)
    try:
        yield
    finally:
        sys.settrace(before)


def bounded(function: Callable) -> Callable:
    """A filter that is given no large numbers besides the value that it filters."""
    first = 2 if hasattr(function, "jinja_pass_arg") else 1

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        require_small(*args[first:], *kwargs.values())
        return function(*args, **kwargs)

    return call


def require_small(*numbers: object) -> None:
    """Refuse a number that asks for much.

    Raises:
        TooMuch: One of `numbers` is larger than `MOST_NUMBER`.
    """
    large = next((n for n in numbers if isinstance(n, int) and abs(n) > MOST_NUMBER), None)
    if large is not None:
        raise TooMuch(f"it asks for {'a number without end' if large.bit_length() > 99 else format(large, ',')}")


def require_product(operator: str, left: object, right: object) -> None:
    """Refuse `left * right`, `left ** right` or `left % right` that makes more than `MOST_SIZE`.

    Raises:
        TooMuch: It would.
    """
    if operator == "%":
        size = MOST_SIZE + 1 if isinstance(left, str) and _WIDTH.search(left) else 0
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        size = sum(bits) if operator == "*" else bits[0] * max(0, right) if bits[1] < 64 else MOST_SIZE + 1
    else:
        sequence, times = (right, left) if isinstance(left, int) else (left, right)
        is_repeated = isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int)
        size = len(sequence) * max(0, times) if is_repeated else 0
    if size > MOST_SIZE:
        raise TooMuch(f"{operator} makes more than {MOST_SIZE:,}")


def require_short(value: object) -> None:
    """Refuse to keep a text or list of more than `MOST_SIZE`.

    Raises:
        TooMuch: It has more.
    """
    if isinstance(value, str | list | tuple | dict) and len(value) > MOST_SIZE:
        raise TooMuch(f"it keeps a value of more than {MOST_SIZE:,}")
