"""The page of fleets quotes what was measured, and the verdicts follow from the figures."""

from __future__ import annotations

import fleet
from readme_tables import table_in_readme


def test_the_page_has_the_records_table():
    result = fleet.read_result()
    assert table_in_readme("fleet") == fleet.summary(result)
    assert [vars(target) for target in fleet.targets(result["figures"])] == result["targets"]
