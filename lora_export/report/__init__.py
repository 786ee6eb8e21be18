"""What people and programs read of a `check` or a `bench`: pure functions of the values in `verify.results`.

`format`       numbers and names as text, the same way everywhere
`summary`      headline, one-sentence summary and findings of a report
`tables`       tables of text cells; filled by `check_tables`, `layer_tables`, `bench_tables` and `provenance`
`svg`          axes, rows and marks of the inline plots; drawn on by `check_plots` and `bench_plots`
`as_json`, `text`, `markdown`, `junit`, `html`  one renderer each; `templates/` holds the HTML, `schema/` what the
              JSON looks like
`github`      annotations on a run of GitHub Actions
`write`        all of them into a folder

A renderer imports neither PyTorch nor ONNX Runtime, so a stored report can be rendered anywhere.
"""
