"""Workers that are Ray actors: on this machine, or on a cluster.

Actors, not Ray Data: a row of a Dataset that takes its process with it is retried with its whole block, without a
time or a memory of its own, and what cannot be done is dropped unnamed. What is done is kept by adapter, as always.

All nodes must have this package, and must see the fleet's folder, the adapters and the base under the same paths.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType

from lora_export.environment import n_cores
from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.answering import Answer, Broken, Work, answer_to, resident_bytes, work_of
from lora_export.fleet.pool import Worker

# In place of an address: Ray is started on this machine, for this run.
HERE = "local"
# What goes through the object store is small: assignments and outcomes.
_STORE_BYTES = 100_000_000


class Actors:
    """Starts an actor for each worker.

    Args:
        work: What a worker runs, see `work_of`.
        address: Of a cluster, as `ray.init` takes it ("auto", "ray://host:10001"), or `HERE`.

    Raises:
        EnvironmentUnusable: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, work: str, address: str) -> None:
        self._work, self._ray = work, _ray()
        options = {"include_dashboard": False, "num_cpus": n_cores(), "object_store_memory": _STORE_BYTES}
        where = options if address == HERE else {"address": address}
        with _own_signal_handler():
            try:
                self._ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                raise EnvironmentUnusable(
                    "Ray cannot be used",
                    where=f"--ray {address}",
                    found=f"{type(error).__name__}: {error}",
                    next_step="see `ray status`; `--ray local` starts Ray here, and without --ray processes are used",
                ) from error

    @property
    def n_cpus(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def start(self) -> Worker:
        return _ActorWorker(self._ray, self._work)

    def answered(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        pending = {worker.pending: worker for worker in workers}
        if not pending:
            return []
        done, _ = self._ray.wait(list(pending), num_returns=1, timeout=seconds)
        more, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=0)
        return [pending[each] for each in dict.fromkeys([*done, *more])]

    def close(self) -> None:
        with _own_signal_handler():
            self._ray.shutdown()


class _ActorWorker(Worker):
    def __init__(self, ray: ModuleType, work: str) -> None:
        super().__init__()
        self._ray, self._cause, self._bytes = ray, "", 0
        # A second thread answers how much memory there is.
        options = {"num_cpus": 1, "max_concurrency": 2, "max_restarts": 0, "max_task_retries": 0}
        self._actor = ray.remote(_Actor).options(**options).remote(work)
        self._started = self._asked = self._actor.resident.remote()
        self.pending: object = None

    def send(self, assignment: object) -> None:
        self.pending = self._actor.answer.remote(assignment)

    def answer(self) -> Answer | None:
        try:
            return self._ray.get(self.pending)
        except self._ray.exceptions.RayTaskError as error:  # outside of what `answer_to` guards
            return Broken(f"a defect: {error.cause}")
        except self._ray.exceptions.RayError as error:
            self._cause = " ".join(str(error).split())
            return None

    def has_place(self) -> bool:
        return bool(self._ray.wait([self._started], timeout=0)[0])

    def resident(self) -> int:
        """As it was when it was last asked for: nothing waits for the answer."""
        if self._asked is None:
            self._asked = self._actor.resident.remote()
        elif self._ray.wait([self._asked], timeout=0)[0]:
            with contextlib.suppress(self._ray.exceptions.RayError):  # `answer` tells of its death
                self._bytes = self._ray.get(self._asked)
            self._asked = None
        return self._bytes

    def ending(self) -> str:
        return f"its worker died (Ray: {self._cause[:200]})"

    def kill(self) -> None:
        self._ray.kill(self._actor, no_restart=True)


class _Actor:
    """A worker on some node. What its work needs is loaded for the first assignment, whose time has that on top."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._work: Work | None = None

    def answer(self, assignment: object) -> Answer:
        if self._work is None:
            self._work = work_of(self._named)
        return answer_to(assignment, self._work)

    def resident(self) -> int:
        return resident_bytes()


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Today's default says at every start that it will change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise EnvironmentUnusable(
            "--ray needs Ray", found=str(error), next_step="pip install 'lora-export[fleet]', or leave --ray out"
        ) from error
    return ray


@contextlib.contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, in whose place Ray puts its own."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
