"""Fixtures shared by all tests: tiny bases, adapters and exports, made once a run when first asked for."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix", action="store_true", help="run every cell of ci/benchmarks/matrix.py instead of a few"
    )
    parser.addoption(
        "--all-mutations", action="store_true", help="run every cell of ci/benchmarks/mutations.py instead of a few"
    )

    parser.addoption("--update-goldens", action="store_true", help="write the files in tests/goldens anew")
    parser.addoption("--fuzz", type=float, default=1, help="how many times as many inputs the fuzz tries")
    parser.addoption("--seed", default="", help="other random weights for the tiny models: any text")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["LORA_EXPORT_TEST_SEED"] = config.getoption("--seed")


# What takes longest, measured; the last of these should be over when the many short files begin.
_FIRST = (
    "test_install.py", "test_seq2seq_export.py", "test_options.py", "test_cli.py", "test_where.py",
    "test_mutations.py", "test_readme.py", "test_reproducible.py", "test_report_schema.py", "test_matrix.py",
    "test_gate_kit.py", "test_pipeline.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: workers take whole files in this order (`--no-loadscope-reorder`)."""
    places = {name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(_FIRST)))


@pytest.fixture(scope="session", autouse=True)
def _one_core_each() -> None:
    """Pin each of several workers to a core: the waiting threads of one would take the other's."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    is_alone = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1"  # another run's only worker has the same core
    if worker is not None and not is_alone and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session", autouse=True)
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Graphs are cached in a folder of this session, or where LORA_EXPORT_CACHE says."""
    given = os.environ.get("LORA_EXPORT_CACHE")
    # Workers of one run share it: a graph's name says all that decides it, and it appears whole.
    shared = tmp_path_factory.getbasetemp().parent / "graph-cache" if "PYTEST_XDIST_WORKER" in os.environ else None
    folder = Path(given) if given else shared or tmp_path_factory.mktemp("graph-cache")
    os.environ["LORA_EXPORT_CACHE"] = str(folder)
    yield folder
    if not given:
        del os.environ["LORA_EXPORT_CACHE"]


@pytest.fixture(scope="session")
def _silent_libraries() -> None:
    # As the command line does: PEFT imports it for layers that nothing uses. A test that wants it takes this out.
    sys.modules.setdefault("bitsandbytes", None)
    import torch
    import transformers

    # Tiny matrices: a second thread only waits, and on a busy machine for long.
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # The exporter's trace log would bury a failure's own messages.
    logging.getLogger("torch.__trace").propagate = False
    # Modules are no garbage, and looking for some after every 700 objects takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(50_000)
    _one_registry_a_session()


def _one_registry_a_session() -> None:
    """torch.onnx reads its table of operators anew for every trace, which takes a second; here, once."""
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = functools.cache(ONNXRegistry.from_torchlib)

        def from_torchlib(*arguments: int, **options: int) -> ONNXRegistry:
            found = copy.copy(read(*arguments, **options))
            found.functions = {operator: list(functions) for operator, functions in found.functions.items()}
            return found

        ONNXRegistry.from_torchlib = staticmethod(from_torchlib)


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run; its workers have it in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


@pytest.fixture(scope="session")
def bases(_shared: Path, _silent_libraries: None):
    """Folders of tiny bases by name (`catalogue.BASES`)."""
    import catalogue

    found = catalogue.Lazy(
        _shared / "bases", catalogue.BASES, lambda name, folder: catalogue.make_base(name, folder, found)
    )
    yield found
    found.refuse_changes()


@pytest.fixture(scope="session")
def adapters(_shared: Path, bases):
    """Folders of tiny PEFT adapters by name (`catalogue.ADAPTERS`)."""
    import catalogue

    found = catalogue.Lazy(
        _shared / "adapters", catalogue.ADAPTERS, lambda name, folder: catalogue.make_adapter(name, folder, bases)
    )
    yield found
    found.refuse_changes()


@pytest.fixture(scope="session")
def exports(_shared: Path, bases, adapters):
    """Exported folders by name (`catalogue.EXPORTS`); read-only, copy one before changing it (`own`)."""
    import catalogue

    def make(name: str, folder: Path) -> None:
        catalogue.export_to(folder, catalogue.EXPORTS[name], bases, adapters)

    found = catalogue.Lazy(_shared / "exports", catalogue.EXPORTS, make)
    yield found
    found.refuse_changes()


@pytest.fixture(scope="session")
def traces(bases):
    """Unoptimized graphs: `traces(base, task)` gives the graph and the weightless model. Read-only."""
    from transformers import AutoConfig

    from lora_export.base.tasks import Task
    from lora_export.base.trace import trace
    from lora_export.base.weightless import build_weightless

    made = {}

    def get(base: str, task: str):
        if base not in made:
            model = build_weightless(Task(task), AutoConfig.from_pretrained(bases[base]), "float32")
            before = {name: (id(t), t.stride()) for name, t in model.state_dict(keep_vars=True).items()}
            made[base] = trace(Task(task), model).graph, model, before
        return made[base]

    return get


@pytest.fixture
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` in this process warms up and samples for a hundredth of its time, where what it finds is not the point."""
    from command_line import SHORT_TIMING

    for place, seconds in SHORT_TIMING.items():
        monkeypatch.setattr(place, seconds)


@pytest.fixture
def own(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a shared folder so that a test may damage it."""

    def copy(folder: Path) -> Path:
        target = tmp_path / folder.name
        shutil.copytree(folder, target)
        return target

    return copy
