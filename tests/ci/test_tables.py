"""The tables of some benchmarks in docs/ are those of their recorded results."""

from __future__ import annotations

import json

import export
import pytest
import runtime
import serving_session
from readme_tables import table_in_readme
from results import RESULTS


def recorded(name: str) -> dict:
    (path,) = RESULTS.glob(f"{name}-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_session_was_measured_in_all_parts():
    assert set(recorded("serving-session")["parts"]) == set(serving_session._PARTS)


@pytest.mark.parametrize(
    ("name", "result", "table"),
    [("serving_session", "serving-session", serving_session.session_table),
     ("runtime", "runtime", runtime.runtime_table), ("export", "export", export.export_table)],
)  # fmt: skip
def test_the_table_is_that_of_the_result(name, result, table):
    assert table_in_readme(name) == table(recorded(result))
