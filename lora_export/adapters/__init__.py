"""A trained adapter on its base: reading, mathematics, packing, what is supported. No ONNX graph.

    support.py         the one table: each option merged, served as inputs, or refused
    on_quantized.py    the few combinations that `--quantize` does not take
    folder.py          an adapter's folder, headers only
    header.py          rank and scale in a safetensors header
    factors.py         a trained adapter as values, and the mathematics of LoRA and DoRA
    merging.py         what an adapter does to one parameter, and the weighted sum of several
    initialization.py  starts that changed the base, undone
    peft_reader.py     PEFT loads the adapter; what it resolved is read
    peft_keys.py       which tensors of an adapter's file PEFT loads
    peft_sizes.py      what PEFT says of tensors that do not fit, told plainly
    peft_pairs.py      the pairs in PEFT's layers
    peft_layer.py      a layer merged by PEFT's own code
    pack.py            an adapter as the named tensors of a dynamic graph
    foreign.py         adapters that PEFT did not save, as PEFT folders
    dialects.py        the formats of foreign adapters
    renamed.py         names that modules had in Transformers 4
    module_names.py    module names of foreign adapters, found in the base
    peft_writer.py     adapter_config.json of known pairs

Imports artifact, base, carried, compat, contract, errors, folders, named, reading, site_choice.
"""
