"""How far two sets of outputs are apart, and how much is allowed. NumPy only.

    compare.py     two sets of outputs become one case
    formulas.py    what each measure is of two sets of outputs, and its limit there
    measures.py    their mathematics, and the size that an error is measured against
    effect.py      how much of an adapter's effect arrived
    weights.py     quantized weights against floats
    tolerances.py  what is measured, and the table of limits, a reason for each

Imports check.results, errors, quantization.
"""
