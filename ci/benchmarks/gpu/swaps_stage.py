"""What a change of adapters costs: a swap for the whole batch, and a new composition of its rows.

The 1.24 B Llama shape, all linears, r = 16, float16: `AdapterSession`, and tensors written in place on the device, as
a CUDA graph needs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from gpu.bundle import restore
from gpu.stage import Stage
from gpu.timing import Device, adapter_arrays
from lora_export.artifact import read_manifest
from lora_export.runtime.adapter_session import AdapterSession

_RANK, _N_ADAPTERS = 16, 32


def run(stage: Stage) -> dict:
    """Median microseconds of each way."""
    folder = restore(stage.bundle, "llama-all-float16", stage.work)
    contract = read_manifest(folder).contract
    session = AdapterSession(folder, stage.provider)
    n_adapters = 4 if stage.small else _N_ADAPTERS
    adapters = [adapter_arrays(contract, 1, _RANK, seed) for seed in range(n_adapters)]
    names = [f"task{number:02}" for number in range(n_adapters)]
    for name, tensors in zip(names, adapters, strict=True):
        session.hold(name, tensors)
    binding, device = session.session.io_binding(), Device(stage.provider)
    values = device.values(adapters[0])
    n_bytes = sum(array.nbytes for array in adapters[0].values())
    found: dict = {"bytes_of_an_adapter": n_bytes, "tensors": len(values), "median_us": {}, "samples_us": {}}
    rng = np.random.default_rng(0)

    def bind(rows: list[str] | str) -> None:
        session.bind_adapters(binding, rows, n_adapters)

    def write_in_place(number: int) -> None:
        for name, value in values.items():
            value.update_inplace(adapters[number][name])

    def timed(name: str, change: Callable[[int], None], n: int) -> None:
        change(0)
        samples = []
        for number in range(n):
            start = time.perf_counter()
            change(number)
            samples.append((time.perf_counter() - start) * 1e6)
        found["samples_us"][name], found["median_us"][name] = samples, statistics.median(samples)
        stage.say(name, [f"  median {found['median_us'][name]:.0f} µs"])
        stage.save(found)

    timed("bind an adapter held on the device", lambda number: bind(names[number % 2]), 50)
    timed("write an adapter in place, tensor by tensor", lambda number: write_in_place(number % 2), 30)
    timed("a new composition of all rows", lambda _: bind(list(rng.permutation(names))), 8)
    return found
