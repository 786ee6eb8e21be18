"""How far two sets of outputs are apart, and how much is allowed. NumPy only.

    compare.py     two sets of outputs become one case
    measures.py    the measures, and the size that an error is measured against
    effect.py      how much of an adapter's effect arrived
    tolerances.py  the table of limits, a reason for each

Imports check.results, errors.
"""
