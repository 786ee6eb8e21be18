"""Run an export with onnxruntime and numpy only; nothing else need be installed.

    session.py            an ONNX Runtime session on a provider that is really used
    adapter_session.py    `AdapterSession`
    seq2seq_session.py    `Seq2SeqSession`
    targets.py            how an encoder-decoder's texts start and end
    target_group.py       texts of one that are written together
    seq2seq_scheduler.py  many of them, which come and go between steps
    described.py          whether the manifest describes the graph that was opened
    host_inputs.py        a text model's inputs, completed from what a tokenizer gives
    positions.py          how many tokens a text may have
    residency.py          which adapters' tensors are in memory
    held_adapter.py       an adapter that is loaded
    bank.py               the adapters of a graph at one moment
    stacking.py           the adapters of a batch's rows as inputs
    composition.py        the same on the device, kept from run to run
    host_rows.py          its inputs, put together on the host
    device_rows.py        its inputs, picked from a bank on the device
    device_bank.py        the adapters and blends in that bank
    device_layout.py      how they lie there
    device_memory.py      buffers on the device, and rows picked from a table
    cache.py              a decoder's cache between runs
    batch.py              one batch: at once, or row by row
    captured.py           one batch, captured in a CUDA graph and replayed
    captured_places.py    where a captured batch reads its inputs and adapters
    adapter_file.py       an .onnx_adapter file
    invocation.py         where an activated LoRA is active
    sampling.py           how the next token is chosen
    row_cache.py          the caches of rows that come and go one by one
    decoder_limits.py     what a decoder can be asked for
    admission.py          when texts that wait are given free rows
    scheduler.py          many texts on one decoder, which join and leave between steps
    template_limits.py    how much a chat template may do
    chat_template.py      messages as a prompt
    tokenizer.py          texts to token ids and back
    text_stream.py        a text token by token
    generation_config.py  what the configuration says of generating
    end_tokens.py         which tokens end a text
    sound.py              WAV files as a speech model's inputs
    inputs.py             texts, images and sounds as a graph's inputs
    images.py             image files as a graph's inputs
    generate.py           texts, ids or messages to texts
    arrays.py             NumPy arrays to ONNX Runtime values
    intermediates.py      values inside a graph

Imports agreement, artifact, contract, errors, named, reading.
"""
