"""From a request to all that an export holds: what was asked for, its numbers, its graphs, its records.

    task_choice.py the task, told by base and adapters
    plan.py        what was asked for, checked before any work
    pooling.py     how the graph makes an embedding of a text
    options.py     how to write the export
    origin.py      the base that an adapter records
    padding.py     the padding token of a classifier on a decoder
    model_configs.py the model config that each adapter makes of its base's
    given_files.py a graph that another tool made, as files
    resolve.py     the adapters, read, and the source of every parameter
    weights.py     the numbers: checkpoint tensors with adapters folded in, one at a time
    integers.py    the numbers as small integers, by ONNX Runtime's quantizers
    as_stored.py   a quantized checkpoint's own integers, as they are
    completion.py  what an adapter needs of the base, and what of it a mode cannot export
    targets.py     modules that are named to be served
    given_graph.py adapters on a graph that another tool made
    tied.py        what is one tensor in several places
    untraced.py    why a base could not be traced, in plain words
    graphs.py      the finished weightless graphs of a plan, cached
    recall.py      plan, resolution and graphs of an earlier export of the same files
    quantizing.py  the graphs with their linear maps quantized
    contracts.py   what a written graph takes and gives
    outputs.py     the files of an export, and the bytes of its weights
    records.py     adapter files, config, and the entries of the manifest
    again.py       an export asked for again, as its manifest says
    lifecycle.py   adapters of a dynamic export that come, are replaced and go
    genai.py       genai_config.json
    describe.py    inspect and --dry-run, as values

Imports adapters, agreement, artifact, base, carried, changing, compat, contract, errors, folders, graph, integrity,
named, other_tools, progress, quantization, quiet, reading, runtime, sentence, site_choice, staging.
"""
