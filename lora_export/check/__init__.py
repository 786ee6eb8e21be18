"""Is the export what was trained? Unmerged PEFT against ONNX Runtime, case by case.

    opened.py              from `CheckOptions` to a check: sources found, examples read
    run.py                 the order of the cases
    turns.py               which side is in memory: of a large export one at a time
    context.py             `CheckOptions`, and the two sides over the same batches
    results.py             what was found, as frozen values
    divergence_results.py  where the two sides part, as frozen values
    reference/             unmerged PEFT, the side that is right
    inputs/                the data that both sides run on
    cases/                 what is compared
    judge/                 how far apart, and how much is allowed
    locate/                where it went wrong

Imports adapters, artifact, base, compat, contract, environment, errors, graph, integrity, named, progress,
quantization, quiet, reading, runtime, sentence, verdict.
"""
