"""Is the export what was trained? Unmerged PEFT against ONNX Runtime, case by case.

    opened.py              a check whose sources are looked for
    run.py                 the order of the cases
    context.py             the options, and the two sides over the same batches
    results.py             what was found, as frozen values
    divergence_results.py  where they part, likewise
    reference/             unmerged PEFT
    inputs/                on which data
    cases/                 what is compared
    judge/                 how far apart, and how much is allowed
    locate/                where it went wrong

Imports artifact, base, compat, contract, environment, errors, export, graph, integrity, quantization, quiet, reading,
runtime, sentence, verdict.
"""
