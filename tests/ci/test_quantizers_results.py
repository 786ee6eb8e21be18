"""The table of docs/evidence.md is that of the recorded results, whose weights were those of their quantizers."""

from __future__ import annotations

import json

from quantizers import RECIPES, options_of, report
from readme_tables import table_in_readme
from results import RESULTS


def test_the_table_is_that_of_the_results():
    (path,) = RESULTS.glob("quantizers-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert table_in_readme("quantizers") == report(result)
    assert result["found"].keys() == RECIPES.keys()
    assert not any(each["weights_failures"] for each in result["found"].values())
    assert {each["rows"] for each in result["found"].values()} == {64}


def test_a_quantizer_is_asked_for_by_options():
    asked = {" ".join(options_of(how)) for how in RECIPES.values()}
    assert "--quantize int4 --block-size 32 --quantize-method rtn --asymmetric" in asked and len(asked) == len(RECIPES)
