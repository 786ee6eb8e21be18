"""The reference: unmerged PEFT in PyTorch.

    unmerged.py      the model at the export's dtype and a wider one, run
    models.py        what it is made of, and its making
    bases.py         a base that is loaded once, for several models
    on_integers.py   a quantized export's weights in the model
    widened.py       float64 without a copy of the weights
    sentence.py      the embedding of a text
    trained.py       adapters as PEFT runs them
    module_calls.py  what every module is given and gives in one run

Imports adapters, base, check.judge, check.turns, compat, errors, graph, quiet, reading, sentence.
"""
