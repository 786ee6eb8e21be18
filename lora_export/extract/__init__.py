"""A full fine-tune as an adapter, by truncated SVD of what differs.

    run.py          the order of the steps
    differences.py  which tensors differ
    placement.py    how each difference is carried
    svd.py          the low-rank form of a difference
    pairs.py        one decomposition after another
    peft_folder.py  the adapter on disk
    results.py      what was found, as frozen values

Imports adapters, artifact, base, carried, errors, export, progress, staging.
"""
