"""Where an export went wrong: the error by layer, and the first node that differs.

    where.py         collects, while the cases run
    probes.py        one row of a case to look into
    probe.py         that row on both sides
    layers.py        match them with the graph's, and compare
    divergence.py    the first node that differs
    reproduction.py  a script that shows it

Imports artifact, check.divergence_results, check.inputs, check.judge, check.reference, check.results, check.turns,
contract, graph, runtime.
"""
