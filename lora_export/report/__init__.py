"""What people and programs read of a result: pure functions of frozen values, free of torch and onnxruntime.

    write.py           all renderings of a check or bench into a folder (extract: extract_html.py; fleet: fleet.py)
    as_json.py         for programs, by a published schema
    pages.py           pages from templates
    html.py            the page of a check or bench
    text.py            a terminal
    markdown.py        a CI job's summary
    junit.py           JUnit XML
    github.py          annotations of GitHub Actions
    summary.py         headline, key figures, findings
    allowances.py      the figures that an allowance limits
    measure_words.py   what the measures of a check are called
    tables.py          tables as text cells
    check_tables.py    the tables of a check
    layer_tables.py    the error by layer
    bench_tables.py    the tables of a bench
    provenance.py      what was examined, and where
    check_plots.py     the plot of a check
    bench_plots.py     the plots of a bench
    curves.py          curves on a logarithmic axis
    svg.py             axes, rows and marks
    extract_html.py    the report of an extract, and its files
    extract_tables.py  the tables of an extract
    extract_text.py    an extract on a terminal
    fleet.py           the report of a fleet, and its files
    scatter.py         points on logarithmic axes
    widths.py          ratios of a bench that are too uncertain to tell
    format.py          numbers and names as text

Imports artifact, bench, check, contract, extract, fleet, staging, verdict.
"""
