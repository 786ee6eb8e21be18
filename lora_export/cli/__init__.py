"""The command line, and all of Click: parse, one call of the pipeline, render, exit code. The only room that exits.

    entry.py    the installed command
    main.py     the group of commands; merge, dynamic, add, remove, inspect
    check.py    check
    bench.py    bench
    verify.py   verify
    extract.py  extract
    fleet.py    fleet
    run.py      run
    serve.py    serve
    options.py  options that several commands share, each written once
    adapter_options.py  how base and adapters are read
    quantize_options.py  those of --quantize
    names.py    paths and names, looked at before anything is loaded
    output.py   results, errors, progress, exit codes
    pace.py     how long the rest of a work takes
    mapped_files.py  files that fail where they are read
    text.py     values of inspect, --dry-run, exports and run as text

Imports artifact, base, bench, check, compat, errors, export, extract, fleet, folders, integrity, named, pipeline,
quantization, quiet, report, sentence, serve, trial, verdict.
"""
