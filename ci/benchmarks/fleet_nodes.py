"""A fleet on a Ray cluster of several nodes, one of which is killed while it works: what is lost, and what differs.

    python ci/benchmarks/fleet_nodes.py --work /tmp/fleet-nodes

The nodes are Ray's own (`ray.cluster_utils.Cluster`), all on this machine: each a raylet with an object store and one
processor. The one that is killed, by SIGKILL, is not the one that leads, and its worker has an adapter then. The same
list is made by processes before, and the two folders are compared to the last byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import textwrap
import threading
import time
from pathlib import Path

from fleet import adapters_of
from random_models import LlamaShape, write_llama
from readme_tables import write_into_readme
from results import RESULTS, heading, provenance, table, write_json

from lora_export.artifact import REPORTS
from lora_export.fleet.options import FleetOptions
from lora_export.fleet.outcomes import FleetReport, Outcome
from lora_export.pipeline import fleet

RESULT = RESULTS / "fleet-nodes.json"
_SHAPE = LlamaShape(2, 64, 128, 4, 2, 16, 259, "float32")
_N_NODES, _N_ADAPTERS, _STORE_BYTES = 3, 40, 80_000_000
_MOST_SECONDS = 400


class Killer(threading.Thread):
    """Kills a node that does not lead as soon as a worker of it has an adapter.

    Attributes:
        killed: Whether it has.
    """

    def __init__(self, cluster: object) -> None:
        super().__init__(daemon=True)
        self._cluster, self.killed = cluster, False

    def run(self) -> None:
        until = time.monotonic() + _MOST_SECONDS
        while not self.killed and time.monotonic() < until:
            for node in tuple(self._cluster.worker_nodes):
                if _works(node.all_processes["raylet"][0].process.pid):
                    self._cluster.remove_node(node, allow_graceful=False)
                    self.killed = True
                    break
            time.sleep(0.01)


def _works(raylet: int) -> bool:
    """Whether a worker that process `raylet` started answers an assignment now."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == raylet and (path.parent / "cmdline").read_bytes().startswith(b"ray::_Actor.answer"):
                return True
        except OSError:
            continue
    return False


def measured(work: Path) -> dict:
    """What became of the adapters on the cluster, and how its folder differs from that of processes."""
    from ray.cluster_utils import Cluster

    shutil.rmtree(work, ignore_errors=True)
    os.environ["LORA_EXPORT_CACHE"] = str(work / "cache")
    base = write_llama(work / "base", _SHAPE)
    listed = adapters_of(_SHAPE, work / "list", base, _N_ADAPTERS, 4)
    by_processes, _ = fleet(listed, str(base), FleetOptions(work / "processes", provider="cpu", n_rows=2))
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as sockets:  # whose paths must be short
        os.environ["RAY_TMPDIR"] = sockets
        one = {"num_cpus": 1, "object_store_memory": _STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=one | {"include_dashboard": False})
        try:
            for _ in range(_N_NODES - 1):
                cluster.add_node(**one)
            killer = Killer(cluster)
            killer.start()
            options = FleetOptions(work / "cluster", provider="cpu", n_rows=2, ray=cluster.address)
            by_cluster, _ = fleet(listed, str(base), options)
        finally:
            cluster.shutdown()
    return {
        "n_nodes": _N_NODES,
        "n_workers": by_cluster.n_workers,
        "n_killed": int(killer.killed),
        "n_adapters": _N_ADAPTERS,
        "n_lost": len(_served(by_processes) - _served(by_cluster)),
        "n_tried_again": sum(outcome.attempts > 1 for outcome in by_cluster.adapters),
        "files": len(_files(work / "processes")),
        "differ": sorted(_different(work / "processes", work / "cluster")),
        "seconds": by_cluster.seconds,
        "seconds_of_processes": by_processes.seconds,
    }


def _served(report: FleetReport) -> set[str]:
    return {outcome.name for outcome in report.adapters if outcome.outcome is Outcome.SERVED}


def _files(folder: Path) -> dict[str, bytes]:
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.read_bytes() for name, path in names.items() if name.parts[0] != REPORTS}


def _different(one: Path, other: Path) -> set[str]:
    mine, theirs = _files(one), _files(other)
    return {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}


def summary(result: dict) -> str:
    """The page's table of a result."""
    found = result["figures"]
    rows = [
        ("nodes, of which killed at work", f"{found['n_nodes']}, {found['n_killed']}"),
        ("adapters, of which tried again", f"{found['n_adapters']}, {found['n_tried_again']}"),
        ("adapters lost", str(found["n_lost"])),
        ("files, of which differ from those of processes", f"{found['files']}, {len(found['differ'])}"),
        ("seconds, with processes", f"{found['seconds']:.0f}, {found['seconds_of_processes']:.0f}"),
    ]
    told = table(("a fleet on a Ray cluster", "found"), rows)
    return f"{textwrap.fill(heading(result['environment']), 128)}\n\n{told}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    where = provenance()
    result = {"environment": where, "figures": measured(parser.parse_args().work)}
    write_json(RESULT, result)
    write_into_readme("fleet_nodes", summary(result))
    print(summary(result))


if __name__ == "__main__":
    main()
