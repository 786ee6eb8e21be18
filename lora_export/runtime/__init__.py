"""Run an export with onnxruntime and numpy only; nothing else need be installed.

    session.py          an ONNX Runtime session on a provider that is really used
    adapter_session.py  `AdapterSession`
    seq2seq_session.py  `Seq2SeqSession`
    described.py        whether the manifest describes the graph that was opened
    host_inputs.py      a text model's inputs, completed from what a tokenizer gives
    bank.py             the adapters of a graph at one moment
    stacking.py         the adapters of a batch's rows as inputs
    cache.py            a decoder's cache between runs
    batch.py            one batch: at once, or row by row
    adapter_file.py     an .onnx_adapter file
    invocation.py       where an activated LoRA is active
    generate.py         greedy generation
    arrays.py           NumPy arrays to ONNX Runtime values
    intermediates.py    values inside a graph

Imports agreement, artifact, contract, errors.
"""
