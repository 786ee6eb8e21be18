"""Sound exports of random seeds, ranks, scales and strengths: `check` must pass every one of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from subjects import ARCHITECTURES, Subject, checked, export_subject, subjects
from trained_adapters import make_adapter

from lora_export.artifact import ExportKind
from lora_export.errors import LoraExportError
from lora_export.verdict import Verdict

# Of the noise that stands for a training: a change of a weight of a few percent of its size, to one as large as it.
_STRENGTHS = (0.003, 0.1)
# α over the rank, as it is usually chosen.
_SCALES = (0.5, 1, 2)


@dataclass(frozen=True)
class SoundExport:
    """One sound export and what `check` said of it.

    Attributes:
        seed: Of all that was drawn: what is exported, its ranks, scales and strength.
        strength: Standard deviation of the noise that stands for a training.
        effect_ratio: The smallest effect of an adapter over the error, in any case.
        share_used: The largest deviation of an effect's share from 1, over what it may be; a failure above 1.
        failure: Why it failed; "" where it passed.
        seconds: Adapters, export and check.
    """

    seed: int
    architecture: str
    option: str
    dtype: str
    kind: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    strength: float
    effect_ratio: float | None
    share_used: float | None
    failure: str
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.failure

    def line(self) -> str:
        what = f"{self.architecture:<15} {self.option:<16} {self.dtype:<8} {self.kind:<8} ranks {self.ranks}"
        how = f"alphas {self.alphas}, strength {self.strength:.3f}"
        measured = f"effect/error {self.effect_ratio or 0:.1e}, {self.share_used or 0:.2f} of what a share may be off"
        return f"sound {self.seed:>3}  {what} {how}  {measured}  {self.seconds:.1f} s  {self.failure or 'passes'}"


def sound_exports(n: int, bases: Mapping[str, Path], dtypes: Sequence[str], folder: Path) -> Iterator[SoundExport]:
    """`n` of them, seeds 0 to n - 1, in `folder`."""
    every = list(subjects(ARCHITECTURES, dtypes))
    for seed in range(n):
        draw = random.Random(seed)
        subject = draw.choice(every)
        yield sound_export(subject, seed, bases[subject.architecture], folder / str(seed))


def sound_export(subject: Subject, seed: int, base: Path, folder: Path) -> SoundExport:
    """One to three adapters of `subject`, drawn by `seed`, exported and checked."""
    started = time.monotonic()
    draw = random.Random(f"{seed} of {subject.architecture}")
    ranks = tuple(draw.randint(1, 12) for _ in range(draw.randint(1, 3)))
    if subject.kind is ExportKind.MERGED and subject.brings_head:
        ranks = ranks[:1]  # a merged graph holds one head
    alphas = tuple(rank * draw.choice(_SCALES) for rank in ranks)
    strength = math.exp(draw.uniform(*map(math.log, _STRENGTHS)))
    adapters = [
        make_adapter(
            subject.base, subject.option, base, rank, folder / f"adapter-{index}",
            strength=strength, seed=1000 * seed + index, alpha=alpha,
        )
        for index, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]  # fmt: skip
    export_subject(subject, base, adapters, folder / "export")
    report = checked(folder / "export")
    if isinstance(report, LoraExportError):
        failure, ratios, used = str(report), [], []
    else:
        ratios = [ratio for case in report.cases if (ratio := case.value("effect")) is not None]
        used = [share.used for case in report.cases if (share := case.measured("effect_share")) is not None]
        failure = "; ".join(f"{case.name}: {text}" for case in report.cases for text in case.failures)
        failure = failure or ("" if report.verdict is Verdict.PASS else "nothing was compared")
    return SoundExport(
        seed, subject.architecture, subject.option.name, subject.dtype, str(subject.kind), ranks, alphas, strength,
        min(ratios, default=None), max(used, default=None), failure, round(time.monotonic() - started, 2),
    )  # fmt: skip
