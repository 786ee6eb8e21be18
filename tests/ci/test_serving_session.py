"""The table of `ci/benchmarks/serving_session.py` in docs/ is that of its recorded result."""

from __future__ import annotations

import json

import serving_session
from readme_tables import table_in_readme
from results import RESULTS


def test_the_table_is_that_of_the_result():
    (path,) = RESULTS.glob("serving-session-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result["parts"]) == set(serving_session._PARTS)
    assert table_in_readme("serving_session") == serving_session.session_table(result)
