"""What is compared beyond one adapter alone.

    examination.py   how a comparison is judged, and what was found so far
    decoding.py      a decoder: padding, cached steps, greedy tokens
    seq2seq.py       an encoder-decoder, likewise
    quantized.py     a quantized base: its weights, its rounding, its cost
    mixed_rows.py    mixed rows, adapters in sequence, a merged export beside
    side_outputs.py  what a graph gives beside its main output

Imports artifact, base, check.context, check.inputs, check.judge, check.locate, check.reference, check.results,
contract, errors, quantization, runtime.
"""
