"""The fuzz of hostile input: what is recorded, and thousands of inputs, chosen by a seed, in every run."""

from __future__ import annotations

import os
import signal

import fuzz_inputs as fuzz
import pytest
from fuzzing.engine import seeded
from fuzzing.judge import judged
from fuzzing.kinds import kinds
from fuzzing.subjects import Subjects
from readme_tables import table_in_readme

from lora_export.errors import Defect, InputRefused

# Of each kind; what people fetch most from others gets more, and what takes a millisecond or more fewer.
N_INPUTS, MANY, SLOW = (
    600,
    dict.fromkeys(("adapter config", "adapter header"), 10_000),
    {"base config": 80, "image": 150, "graph": 200, "encoder requests": 250, "writer requests": 250},
)


@pytest.fixture(scope="module")
def subjects(bases, adapters, exports) -> Subjects:
    return Subjects(bases["llama"], adapters["chat"], exports["features-dynamic"], exports["llama-dynamic"])


@pytest.fixture
def _handlers():
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers of Unix")
@pytest.mark.parametrize("name", fuzz.THOUSANDS)
def test_every_input_is_read_or_refused(name, subjects, tmp_path, request, _handlers):
    n = round((SLOW | MANY).get(name, N_INPUTS) * request.config.getoption("--fuzz"))
    tally = seeded(kinds(subjects, tmp_path)[name](), n, os.environ["LORA_EXPORT_TEST_SEED"])
    assert tally.findings == {} and tally.n == n
    assert n / 20 < tally.n_refused < n  # damage is seen, and the valid ones are read


def test_the_page_has_the_recorded_figures():
    recorded = fuzz.recorded(fuzz.RESULT)
    assert table_in_readme("fuzz_inputs") == fuzz.summary(recorded)
    assert set(recorded["kinds"]) == set(fuzz.THOUSANDS)
    assert all(of["findings"] == {} and of["n"] >= 1000 for of in recorded["kinds"].values())
    assert sum(of["n"] for of in recorded["kinds"].values()) >= 500_000


def test_what_is_wrong_is_found(_handlers):
    """A judge that cannot fail is none."""

    def raising(error: BaseException):
        def read(content: bytes) -> None:
            raise error

        return read

    assert judged(raising(InputRefused("No.")), b"", 0).is_refused
    assert judged(raising(KeyError("x")), b"", 0).finding == "raised KeyError at elsewhere: 'x'"
    assert judged(raising(Defect("Ours.")), b"", 0).finding == "no refusal: Ours."
    found = judged(lambda content: bytearray(200 << 20), b"x", 1 << 20).finding
    assert found.endswith("bytes of memory for a file of 1: read")


def test_pieces_add_up():
    piece = {"n": 5, "n_refused": 2, "seconds": 1.0, "most_seconds": 0.1, "most_bytes": 7, "different": 2, "code": "a"}
    first = fuzz.merged(None, piece | {"outcomes": {"read": 3}, "findings": {}})
    both = fuzz.merged(first, piece | {"outcomes": {"read": 1, "x": 1}, "findings": {"x": "y"}, "most_bytes": 9})
    assert (both["n"], both["pieces"], both["most_bytes"], both["outcomes"]) == (10, 2, 9, {"read": 4, "x": 1})
    assert both["findings"] == {"x": "y"}
    assert fuzz.merged(both, piece | {"outcomes": {}, "findings": {}, "code": "b"})["n"] == 5
