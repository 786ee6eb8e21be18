"""Passes over an onnx-ir model, and the graph as it is written. The only room with onnx-ir beside base.trace.

    sites.py                 the nodes that compute a module
    tape.py                  insert nodes, and restore the axis of rows
    shared_by_rows.py        what all rows share, once adapters tell them apart
    adapter_inputs.py        give a traced graph its adapter inputs
    declare.py               inputs as the contract's table says
    embedding_inputs.py      adapter inputs of embeddings
    convolution_inputs.py    adapter inputs of convolutions
    bias_inputs.py           adapter inputs of biases
    packed_pairs.py          which modules share one pair, on CUDA: those that share an input
    linear_inputs.py         adapter inputs of linear modules
    unbound.py               initializers without a value
    attention_node.py        the standard attention, as it is traced
    heads.py                 heads merged, and taken apart
    evaluate.py              a graph's nodes, run
    mask.py                  what an attention mask lets through
    key_mask.py              masks that are of keys alone
    head.py                  a decoder's head, for the last tokens only
    token_order.py           a cache's order of tokens
    pack.py                  projections of one input, packed
    rotary.py                rotary embedding inside the attention
    grouped_projections.py   queries, keys and values packed for the attention
    grouped_attention.py     one attention operator a layer, the cache in place
    encoder_attention.py     attention without a cache, in one operator
    reshapes.py              reshapes that undo each other
    shape_sums.py            no length is copied to the GPU
    batch_transposes.py      a fused transpose that ONNX Runtime refuses
    fuse.py                  optimize and fuse for a provider
    sentence.py              the embedding of a text as an output
    quantize.py              linear maps by small integers
    given.py                 a graph that another tool wrote
    matching.py              which of the base's weights the given graph's are
    unpacking.py             a given graph's packed projections, taken apart
    joining.py               a module that a given graph has in parts, made one
    given_names.py           what was matched, by the base's paths
    runnable.py              whether a provider can run a graph
    derived.py               what is made of a norm's weight, by its name
    layer_names.py           which layer a name is of
    stamp.py                 one layer of a finished graph, copied
    cache.py                 finished graphs, kept on disk
    bind.py                  write graphs with their weights
    stored_integers.py       the quantized weights of a written graph, for check
    taking_apart.py          packed projections, taken apart to be looked at
    module_values.py         find modules in a written graph, and look into it

Imports base, compat, contract, errors, folders, packed, quantization, quiet, sentence, site_choice.
"""
