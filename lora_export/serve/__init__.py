"""`lora-export serve`: an export over HTTP, in the form of OpenAI's API and vLLM's; needs `lora-export[serve]`.

    server.py            from an export to a process that answers until it is told to end
    api.py               the routes
    schema.py            the bodies of requests
    forms.py             forms with files
    guard.py             what stands before every request: host, page, key, size, time; its line of the log
    service.py           how a request waits for its answer
    tasks.py             which tasks are served, and where
    batching.py          rows of different requests and adapters in one run
    encoders.py          a run of an encoder's rows
    tokens_api.py        the routes about tokens: their classes, questions, gaps
    data_urls.py         images and sounds in requests
    room.py              the bytes that images and sounds hold together
    ctc_words.py         a sound's frames as words
    reranking.py         the route of rerankers
    writing_api.py       the routes of models that write texts: completions and chats
    speech_api.py        the routes of speech recognition
    writing.py           texts of many requests on one scheduler
    pieces.py            their tokens as pieces of text
    counting.py          how many there were
    events.py            a stream of them
    models.py            the export's session, and the names that it is served under
    limits.py            how long a row may be, and how many texts are written at a time
    names.py             the field `model`: base, adapter, blend
    runtime_adapters.py  adapters that are loaded while it runs
    settings.py          what a model is asked with: all that is in one folder, read once
    texts.py             tokenizers
    metrics.py           for Prometheus and the Kubernetes gateway
    logs.py              JSON lines without texts
    problems.py          errors in the form of OpenAI's API
    options.py           what a server is started with

Imports answers, artifact, contract, errors, folders, reading, runtime, sentence.
"""
