"""The table of docs/quantize.md is that of the recorded results, on which both int4 graphs have the same settings."""

from __future__ import annotations

import json

from quantized import report
from readme_tables import table_in_readme
from results import RESULTS


def test_the_table_is_that_of_the_results():
    (path,) = RESULTS.glob("quantized-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert table_in_readme("quantized") == report(result)
    for each in result["found"]:
        for settings in each["settings"].values():
            assert (settings["block_size"], settings["accuracy_level"], settings["with_zeros"]) == ([32], [4], 0)
        assert each["settings"]["int4"]["bits"] == [4]
