"""A base checkpoint: reading, tasks, the weightless model, its trace. The only room that calls torch.onnx.

    stored.py      JSON and safetensors of a folder
    quantized.py   refuses quantized weights, by the name of their method
    config.py      its config.json, compared with the checkpoint's headers and read by Transformers
    checkpoint.py  a base's folder, and what it holds of a model
    conversion.py  which stored tensors make a parameter, and reading them
    recipe.py      how a stored weight is made, as data
    tasks.py       the tasks: class, inputs, outputs
    weightless.py  a model without weights
    sample.py      the value that says what a model is traced with
    seq2seq.py     the three graphs of an encoder-decoder
    trace.py       the trace of a weightless model: its sample inputs, its axes, the names of a decoder's KV cache
    decompose.py   torch.onnx made to decompose operator by operator

Imports compat, contract, errors, quiet.
"""
