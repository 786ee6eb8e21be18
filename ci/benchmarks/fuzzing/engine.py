"""So many inputs of one kind, each judged: with Atheris, which follows the coverage of this package's code, or without.

Without it, inputs that came to something new are damaged further. The same seed tries the same inputs.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from fuzzing.judge import Verdict, judged, watch_hangs
from fuzzing.kind import Kind
from fuzzing.mutations import mutated

_MOST_SHOWN = 20
_MOST_BYTES = 200_000


@dataclass
class Tally:
    """What so many inputs of a kind came to.

    Attributes:
        outcomes: How often what came of one.
        findings: What is wrong, each kind of it once, with the first input's first bytes.
        most_bytes: The most memory that one took, as the process's peak tells.
    """

    n: int = 0
    n_refused: int = 0
    seconds: float = 0.0
    most_seconds: float = 0.0
    most_bytes: int = 0
    outcomes: Counter = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)

    def add(self, verdict: Verdict, content: bytes) -> None:
        self.n += 1
        self.n_refused += verdict.is_refused
        self.most_seconds = max(self.most_seconds, verdict.seconds)
        self.most_bytes = max(self.most_bytes, verdict.n_bytes)
        self.outcomes[verdict.outcome] += 1
        if verdict.finding is not None:
            self.findings.setdefault(verdict.outcome, f"{verdict.finding} from {content[:300]!r}")

    def to_dict(self) -> dict:
        fields = asdict(self) | {
            "outcomes": dict(self.outcomes.most_common(_MOST_SHOWN)),
            "different": len(self.outcomes),
        }
        return fields | {"seconds": round(self.seconds, 1), "most_seconds": round(self.most_seconds, 3)}


def seeded(kind: Kind, n: int, seed: str) -> Tally:
    """`n` inputs of `kind`, the valid ones first."""
    watch_hangs()
    tally, pool, known = Tally(), list(kind.seeds), set()
    kind.read(kind.seeds[0])  # what is made once is not an input's time or memory
    began = time.perf_counter()
    for number in range(n):
        rng = random.Random(f"{kind.name} {seed} {number}")
        content = pool[number] if number < len(kind.seeds) else mutated(rng.choice(pool), kind.form, kind.words, rng)
        verdict = judged(kind.read, content, kind.floor_bytes)
        tally.add(verdict, content)
        if verdict.outcome not in known and len(content) <= _MOST_BYTES:
            known.add(verdict.outcome)
            pool.append(content)
    tally.seconds = time.perf_counter() - began
    return tally


def guided(kind: Kind, n: int, seed: int, corpus: str, done: Callable[[Tally], None]) -> None:
    """`n` inputs of `kind` by Atheris; it ends the process, so `done` is called with the last.

    Args:
        corpus: The folder of inputs that reached something new, kept from run to run.
    """
    import atheris

    watch_hangs()
    tally = Tally()
    kind.read(kind.seeds[0])
    began = time.perf_counter()

    def one(content: bytes) -> None:
        tally.add(judged(kind.read, content, kind.floor_bytes), content)
        if tally.n == n:
            tally.seconds = time.perf_counter() - began
            done(tally)

    def other(content: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if not content or rng.random() < 0.05:
            content = rng.choice(kind.seeds)
        found = mutated(content, kind.form, kind.words, rng) if rng.random() < 0.7 else atheris.Mutate(content, most)
        return found[:most]

    most = max(4 * max(map(len, kind.seeds)), 1 << 17)
    # Findings are judged here: libFuzzer itself would end at the first.
    flags = ("-len_control=0", "-timeout=60", "-verbosity=0", "-handle_alrm=0", "-rss_limit_mb=0")
    flags += (f"-runs={n + 100}", f"-seed={seed}", f"-max_len={most}")
    atheris.Setup(["fuzz_inputs", *flags, corpus], one, custom_mutator=other)
    atheris.Fuzz()
