"""What does the export cost? Latency, swaps, memory, side by side in paired blocks.

    plan.py          what will be timed, refused before anything runs
    shapes.py        shapes of workloads as people write them
    budget.py        allowances, from a TOML file
    workloads.py     inputs of a shape
    other_export.py  another export, timed beside the first
    peer.py          a graph of another tool, by its inputs' names
    peer_session.py  a session of such a graph
    differences.py   whether the other is the same model
    run.py           the order of the measurements
    latency.py       paired blocks
    warm_up.py       until times have settled
    intervals.py     median ratios and their verdict
    swap.py          changing the adapter
    placement.py     which provider runs which operator
    memory.py        the peak of a session
    memory_job.py    the process that is watched
    results.py       what was found, as frozen values

Imports artifact, base, contract, environment, errors, named, other_tools, progress, quantization, reading, runtime,
sentence, verdict.
"""
