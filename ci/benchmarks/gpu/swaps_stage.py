"""What a change of adapters costs: a swap for the whole batch, and a new composition of its rows.

The 1.24 B Llama shape, all linears, r = 16, float16: `AdapterSession`, and tensors written in place on the device, as
a CUDA graph needs. What a composition puts on the device is compared with what the host stacks of the same rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from gpu.bundle import restore
from gpu.stage import Stage, device_facts
from gpu.timing import Device, adapter_arrays
from lora_export.artifact import read_manifest
from lora_export.runtime.adapter_session import AdapterSession

_RANK, _N_ADAPTERS = 16, 32


def run(stage: Stage) -> dict:
    """Median microseconds of each way, and the device's bytes."""
    folder = restore(stage.bundle, "llama-all-float16", stage.work)
    contract = read_manifest(folder).contract
    session = AdapterSession(folder, stage.provider)
    n_adapters = 4 if stage.small else _N_ADAPTERS
    adapters = [adapter_arrays(contract, 1, _RANK, seed) for seed in range(n_adapters + 1)]
    names = [f"task{number:02}" for number in range(n_adapters)]
    binding, device = session.session.io_binding(), Device(stage.provider)
    values = device.values(adapters[0])
    n_bytes = sum(array.nbytes for array in adapters[0].values())
    found: dict = {"bytes_of_an_adapter": n_bytes, "tensors": len(values), "median_us": {}, "samples_us": {}}
    found["memory_used"] = {"before": device_facts().get("nvidia_smi", [])}
    rng = np.random.default_rng(0)

    def hold_all() -> None:
        """All adapters as others than before: none of them is on the device."""
        for name, tensors in zip(names, adapters, strict=False):
            session.hold(name, tensors)

    def compose(rows: Sequence[str]) -> None:
        """As `run` does it."""
        bank = session.bank
        with bank.lent(bank.rows(rows, len(rows))):
            pass

    def bind(rows: Sequence[str] | str) -> None:
        session.bind_adapters(binding, rows, n_adapters)

    def write_in_place(number: int) -> None:
        for name, value in values.items():
            value.update_inplace(adapters[number][name])

    def change_a_row(number: int) -> None:
        compose([names[number % 2], *names[1:]])

    def timed(name: str, change: Callable[[int], None], n: int, *, warm_up: int = 1, before=lambda: None) -> None:
        for number in range(warm_up):
            change(number)
        samples = []
        for number in range(n):
            before()
            start = time.perf_counter()
            change(number)
            samples.append((time.perf_counter() - start) * 1e6)
        found["samples_us"][name], found["median_us"][name] = samples, statistics.median(samples)
        stage.say(name, [f"  median {found['median_us'][name]:.0f} µs"])
        stage.save(found)

    def new_rows() -> list[str]:
        return list(rng.permutation(names))

    hold_all()
    timed("bind an adapter held on the device", lambda number: bind(names[number % 2]), 50)
    timed("write an adapter in place, tensor by tensor", lambda number: write_in_place(number % 2), 30)
    timed("the first composition of a session, all adapters new", lambda _: compose(new_rows()), 1, warm_up=0)
    timed("a composition of adapters that are all new", lambda _: compose(new_rows()), 3, warm_up=0, before=hold_all)
    timed("a new composition of all rows", lambda _: compose(new_rows()), 30, warm_up=3)
    timed("the adapter of one row changes", change_a_row, 30)
    rows = new_rows()
    timed("the same composition again", lambda _: compose(rows), 30)
    timed("a new composition, bound by a host", lambda _: bind(new_rows()), 8)
    found["memory_used"]["after"] = device_facts().get("nvidia_smi", [])
    found["device_bytes"] = dict(zip(("bank", "picked"), session.bank.compositions.device_bytes, strict=True))
    found["inputs_that_differ"] = _that_differ(session, [*rows[:-1], None])
    stage.say("inputs that differ from the host's", [f"  {found['inputs_that_differ']}", f"  {found['device_bytes']}"])
    return found


def _that_differ(session: AdapterSession, rows: Sequence[str | None]) -> list[str]:
    """The inputs of `rows` that are others on the device than as the host stacks them."""
    expected, bank = session.stacked(rows, len(rows)), session.bank
    with bank.lent(bank.rows(rows, len(rows))) as values:
        arrays = {name: value.numpy() for name, value in values.items()}
    return sorted(
        name
        for name in expected.keys() | arrays.keys()
        if not (name in expected and name in arrays and np.array_equal(expected[name], arrays[name]))
    )
