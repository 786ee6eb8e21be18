"""Hostile input, hundreds of thousands of times: each ends in an answer or in a refusal, soon, and in little memory.

    python ci/benchmarks/fuzz_inputs.py --work /tmp/fuzz                               # all kinds
    python ci/benchmarks/fuzz_inputs.py --work /tmp/fuzz --kind manifest --inputs 1000 # one of them

Each kind runs in a process of its own, in pieces, and what is recorded of earlier pieces of this commit's code is added
to: it can be stopped and run again, with another `--seed`. With Atheris installed (`pip install atheris`, no dependency
of this project), inputs that reach new code of this package are kept in `--work` and damaged further; without it, those
that come to a new answer.

A finding is another exception than a refusal, an answer of a server that is neither a 2xx nor a 4xx, more than 10 s, or
more memory than twice the file and 32 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

from readme_tables import write_into_readme
from results import RESULTS, heading, provenance, table, write_json

RESULT = RESULTS / "fuzz.json"
_PACKAGE = Path(__file__).parents[2] / "lora_export"
_PIECE = 60_000
# The most that a piece's processes may be silent for: no input takes longer than ten seconds, of which it is told.
_SILENT_SECONDS = 1800
# Thousands of inputs of each kind: more where there is more to get wrong, fewer where each takes long.
THOUSANDS = {
    "adapter config": 130, "adapter header": 100, "base header": 80, "base config": 10, "base index": 120,
    "manifest": 30, "signature": 110, "adapter file": 120, "sentence modules": 30, "examples": 130, "roster": 80,
    "sound": 30, "image": 10, "graph": 10, "chat template": 10, "tokenizer": 10, "settings": 10,
    "encoder requests": 10, "writer requests": 10,
}  # fmt: skip


def code_hash() -> str:
    """Of the package's code: pieces of other code do not count."""
    found = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def recorded(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"kinds": {}}


def merged(before: dict | None, piece: dict) -> dict:
    """The figures of a kind with one more piece."""
    if before is None or before["code"] != piece["code"]:
        return {**piece, "pieces": 1}
    found = {**before, **piece, "pieces": before["pieces"] + 1}
    for name in ("n", "n_refused", "seconds"):
        found[name] = round(before[name] + piece[name], 1)
    for name in ("most_seconds", "most_bytes", "different"):
        found[name] = max(before[name], piece[name])
    names = {**before["outcomes"], **piece["outcomes"]}
    found["outcomes"] = {name: before["outcomes"].get(name, 0) + piece["outcomes"].get(name, 0) for name in names}
    found["findings"] = piece["findings"] | before["findings"]
    return found


def summary(result: dict) -> str:
    """The page's table of a result."""
    columns = ("input", "tried", "refused", "guided by coverage", "slowest", "most memory", "findings")
    rows = []
    for name, of in result["kinds"].items():
        guided = "yes" if of["engine"] == "atheris" else "no"
        memory = f"{of['most_bytes'] / 2**20:.1f} MiB"
        slowest = f"{of['most_seconds']:.1f} s"
        rows.append((name, f"{of['n']:,}", f"{of['n_refused']:,}", guided, slowest, memory, str(len(of["findings"]))))
    of = result["kinds"].values()
    total = [f"{sum(each[name] for each in of):,}" for name in ("n", "n_refused")]
    rows.append(("all", *total, "", "", "", str(sum(len(each["findings"]) for each in of))))
    return f"{textwrap.fill(heading(result['environment']), 128)}\n\n{table(columns, rows)}\n"


def _instrumented() -> contextlib.AbstractContextManager:
    """What this package's modules are imported in, so that Atheris sees which of their branches are taken."""
    import atheris

    return atheris.instrument_imports(include=["lora_export"])


def run_piece(options: argparse.Namespace) -> None:
    """In a process of its own: `--inputs` inputs of `--kind`, the figures to a file."""
    has_atheris = importlib.util.find_spec("atheris") is not None and not options.unguided
    place = options.work / options.kind.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    with _instrumented() if has_atheris else contextlib.nullcontext():
        from fuzzing.engine import guided, seeded
        from fuzzing.kinds import kinds
        from fuzzing.subjects import make_subjects

        from lora_export.errors import LoraExportError

        kind = kinds(make_subjects(options.work / "subjects"), place)[options.kind]()
        for seed in kind.seeds:  # what is imported when it is first needed
            with contextlib.suppress(LoraExportError):
                kind.read(seed)

    def done(tally) -> None:
        fields = {"engine": "atheris" if has_atheris else "seeded", "code": code_hash(), "seed": options.seed}
        write_json(place / "piece.json", tally.to_dict() | fields)

    if not has_atheris:
        done(seeded(kind, options.inputs, str(options.seed)))
        return
    corpus = place / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(kind.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    guided(kind, options.inputs, options.seed, str(corpus), done)


def run_kind(name: str, options: argparse.Namespace) -> int:
    """Pieces of one kind until it has as many inputs as were asked for; how many findings there are."""
    wanted = options.inputs or 1000 * THOUSANDS[name]
    found, number = None, options.seed
    while True:
        found = recorded(options.result)["kinds"].get(name)
        tried = 0 if found is None or found["code"] != code_hash() else found["n"]
        if tried >= wanted or (tried and found["findings"] and not options.go_on):
            return len(found["findings"])
        number += 1
        place = options.work / name.replace(" ", "-") / "piece.json"
        place.unlink(missing_ok=True)
        arguments = ["--work", options.work, "--piece", "--kind", name, "--inputs", min(_PIECE, wanted - tried),
                     "--seed", 1000 * options.seed + number + tried // _PIECE]  # fmt: skip
        arguments += ["--unguided"] * options.unguided
        command = [sys.executable, __file__, *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SILENT_SECONDS, check=False)
        if not place.exists():
            raise SystemExit(f"{name}: a piece ended with {ended.returncode}: {ended.stderr[-3000:]}")
        result = recorded(options.result)
        result["environment"] = provenance()
        result["kinds"][name] = merged(found, json.loads(place.read_text(encoding="utf-8")))
        write_json(options.result, result)
        of = result["kinds"][name]
        print(f"{name}: {of['n']:,} of {wanted:,}, {of['n'] / of['seconds']:.0f}/s", flush=True)
        for finding in of["findings"].values():
            print("   ", finding[:700], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kind", action="append", choices=sorted(THOUSANDS))
    parser.add_argument("--inputs", type=int, help="of each kind; a million in all where this is left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--unguided", action="store_true", help="without Atheris, where it is installed")
    parser.add_argument("--go-on", action="store_true", help="after a piece with findings, too")
    parser.add_argument("--piece", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.piece:
        (options.kind,) = options.kind
        run_piece(options)
        return
    n_findings = sum(run_kind(name, options) for name in options.kind or THOUSANDS)
    if options.result == RESULT and set(THOUSANDS) <= set(recorded(RESULT)["kinds"]):
        write_into_readme("fuzz_inputs", summary(recorded(RESULT)))
    raise SystemExit(min(1, n_findings))


if __name__ == "__main__":
    main()
