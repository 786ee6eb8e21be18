"""Many adapters of one base: packed, checked and recorded one by one, so that none harms another.

    roster.py       the list of adapters, and where each lies
    outcomes.py     what became of each
    survey.py       kinds of adapter
    sources.py      the adapters, fetched and opened
    embedding.py    how the graph makes an embedding of a text
    answering.py    what a worker answers
    pool.py         workers that may die, hang or swell
    processes.py    those of this machine
    on_ray.py       those of a Ray cluster
    options.py      how to make a fleet
    assignments.py  what a worker is given
    state.py        what an earlier run found, and the lock
    graph.py        the graph that serves all kinds
    kinds.py        PEFT's layers, for one adapter after another
    workbench.py    packs an adapter and compares it with PEFT
    worker.py       a worker's work
    run.py          the whole of it
    places.py       where it goes
    remote.py       to an address, adapter by adapter
    brought.py      what is there already
    address_lock.py one fleet at a time there
    store.py        an address as fsspec has it

Imports adapters, artifact, base, carried, check, environment, errors, export, folders, graph, integrity,
progress, quiet, reading, runtime, sentence, staging, verdict.
"""
