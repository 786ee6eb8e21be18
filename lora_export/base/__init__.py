"""A base checkpoint: reading, tasks, the weightless model, its trace. The only room that calls torch.onnx.

    stored.py      JSON and safetensors of a folder
    groups.py      weights that are integers with a scale and a zero a group
    restored.py    weights of quantized checkpoints, in floats
    quantized.py   which method a base's weights are quantized by; what restored.py cannot read is refused by name
    gguf_file.py   a GGUF file as a base, by Transformers' reader
    config.py      its config.json, compared with the checkpoint's headers and read by Transformers
    sentence_folder.py  folders of sentence-transformers, and what follows the model in them
    checkpoint.py  a base's folder, and what it holds of a model
    conversion.py  which stored tensors make a parameter, and reading them
    recipe.py      how a stored weight is made, as data
    tasks.py       the tasks: Transformers' class, PEFT's name and the graphs of each
    forward.py     what a model's forward takes
    weightless.py  a model without weights
    computed.py    what is computed and not stored: sinusoidal positions
    layers.py      the stack of alike layers, and the model with few of them
    sample.py      the value that says what a model is traced with
    encoders.py    texts, images and sounds, run in one pass
    decoder.py     a decoder on its cache, whose shape the model tells
    seq2seq.py     the three graphs of an encoder-decoder
    sparing.py     what no export needs of a trace, left out
    trace.py       the trace of a weightless model: its axes, the names of a decoder's KV cache
    decompose.py   torch.onnx made to decompose operator by operator

Imports compat, contract, errors, folders, named, quantization, quiet, reading, sentence.
"""
