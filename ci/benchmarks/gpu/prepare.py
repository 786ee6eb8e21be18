"""Make the bundle of a GPU run: the exports, the peers' graphs, the sources of the real ones.

python -m gpu.prepare BUNDLE --work WORK --demo .demo [--small] [--builder FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from results import provenance

from gpu.bundle import Writer, sizes
from gpu.models import (
    GPT2_MEDIUM,
    GPT2_SMALL,
    LLAMA,
    LLAMA_SMALL,
    decode_jobs,
    encoder_jobs,
    export_job,
    parity_jobs,
    table1_jobs,
)
from gpu.peers import write_builder_graph, write_optimized_bert


def prepare(bundle: Path, work: Path, demo: Path, builder: Path | None, *, small: bool) -> None:
    """Export what is not in `work` yet, and pack all of it into `bundle`.

    Args:
        demo: What `ci/demo` and `samples/tiny_decoder.py` made: real bases and adapters.
        builder: The folder of GenAI's builder.py; without it, no such graph.
        small: Small shapes in place of the real ones, to rehearse.
    """
    exports, models = work / "exports", work / "models"
    jobs = table1_jobs(models, GPT2_SMALL if small else GPT2_MEDIUM)
    jobs += decode_jobs(models, LLAMA_SMALL if small else LLAMA)
    jobs += encoder_jobs(models, demo / "minilm") + parity_jobs(demo)
    for job in jobs:
        if not (exports / job.name / "lora_export.json").exists():
            print(f"exporting {job.name}", file=sys.stderr, flush=True)
            export_job(job, exports / job.name)
    for dtype in ("float32", "float16"):
        peer = exports / f"minilm-optimizer-{dtype}"
        if not (peer / "model.onnx").exists():
            write_optimized_bert(demo / "minilm", peer, dtype)
    if builder is not None and not (exports / "llama-builder" / "model.onnx").exists():
        write_builder_graph(models / "llama", demo / "tiny-llama", exports / "llama-builder", builder)
    shutil.rmtree(bundle, ignore_errors=True)
    writer = Writer(bundle)
    for source in (demo / "minilm", demo / "tiny-llama", *(demo / "adapters").iterdir(), *_folders(demo)):
        writer.add_source(source, source.name)
    real = {job.name for job in jobs if job.real}
    wanted = {job.name for job in jobs} | {"minilm-optimizer-float32", "minilm-optimizer-float16", "llama-builder"}
    for folder in sorted(exports.iterdir()):
        if folder.name in wanted and (folder / "model.onnx").exists():
            writer.add_export(folder, folder.name, real=folder.name in real)
    writer.close()
    (bundle / "commit").write_text(provenance()["commit"])
    for part, n_bytes in sizes(bundle).items():
        print(f"{part}: {n_bytes / 1e6:.1f} MB", file=sys.stderr)


def _folders(demo: Path) -> list[Path]:
    return [path for path in sorted((demo / "decoder-adapters").iterdir()) if path.is_dir()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="for models and exports; what is there is reused")
    parser.add_argument("--demo", type=Path, default=Path(".demo"))
    parser.add_argument("--builder", type=Path, help="the folder of ONNX Runtime GenAI's builder.py")
    parser.add_argument("--small", action="store_true", help="small shapes, to rehearse")
    given = parser.parse_args()
    prepare(given.bundle, given.work, given.demo, given.builder, small=given.small)


if __name__ == "__main__":
    main()
