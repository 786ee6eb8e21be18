"""On which data exports are compared.

    tokenizers.py        the tokenizer, or seeded token ids
    examples.py          texts and images, from a file or from the machine
    amount.py            how much: less of a large base
    batcher.py           rows as a graph's inputs, in padded batches
    seq2seq_examples.py  sources and targets
    prepared.py          all inputs of a check
    audio.py             WAV files
    ragged.py            rows of different lengths
    invoked.py           text that invokes an activated LoRA

Imports artifact, base, contract, errors, named, reading, runtime.
"""
