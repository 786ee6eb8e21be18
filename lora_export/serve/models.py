"""`Models`: an export's session and the names that it is served under; what a request sees is one `View`."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from lora_export.artifact import AdapterRecord, Manifest, read_manifest
from lora_export.contract import DECODER, SINGLE, has_own_head
from lora_export.errors import InputRefused, UsageProblem
from lora_export.reading import model_settings
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.bank import Bank
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.runtime.stacking import RowSpec
from lora_export.serve.limits import longest_row
from lora_export.serve.metrics import BLEND
from lora_export.serve.names import parse_model, unknown_model
from lora_export.serve.options import ServeOptions
from lora_export.serve.problems import Problem
from lora_export.serve.settings import Settings, open_settings
from lora_export.serve.tasks import OF_SIGNALS, TASKS, WRITING, why_not_served

Session = AdapterSession | Seq2SeqSession


@dataclass(frozen=True)
class Served:
    """An adapter under its name.

    Attributes:
        place: The folder of the tokenizer, template and settings that it was trained with.
        root: Where its file is, relative to the export or to the folder of adapters loaded at run time.
    """

    record: AdapterRecord
    place: Path
    root: str
    created: int


@dataclass(frozen=True)
class Target:
    """What a request's `model` means.

    Attributes:
        label: Its name in metrics and logs: a blend's is one for all, as clients make up any number of them.
        adapter: As `AdapterSession.run` takes a row's.
        labels: The names of classes, by number.
        settings: What it is asked with, and its answers are read with: those of the moment in which it meant that.
        banks: The adapters of that moment, by graph.
    """

    model: str
    label: str
    adapter: Mapping[str, float] | None
    settings: Settings
    labels: Mapping[int, str]
    banks: Mapping[str, Bank]

    @property
    def rows(self) -> tuple[RowSpec, ...]:
        """What its rows run: another one where an adapter was replaced by one of the same name."""
        return tuple(bank.rows(self.adapter, 1)[0] for bank in self.banks.values())

    def require_blend(self) -> None:
        """Refuse a blend that cannot be made, such as of heads of different sizes.

        Raises:
            UsageProblem: It is one.
        """
        blend = self.adapter or {}
        if len(blend) > 1 or any(weight != 1 for weight in blend.values()):
            for bank in self.banks.values():
                bank.stacked(bank.rows(self.adapter, 1))


@dataclass(frozen=True)
class View:
    """The session and the adapters of one moment, which no later change reaches.

    Attributes:
        has_base: Whether the base answers by itself: an encoder without a head is no classifier.
        settings: By the folder that they are of.
    """

    session: Session
    base: str
    base_labels: Mapping[int, str]
    has_base: bool
    adapters: Mapping[str, Served]
    settings: Mapping[Path, Settings]

    def target(self, model: str) -> Target:
        """What `model` means now.

        Raises:
            Problem: It is not served (404), or it is no blend (400).
        """
        blend = parse_model(model, self.base, list(self.adapters))
        if not blend and not self.has_base:
            raise Problem(
                404, f"The base {model!r} has no head of its own, so it answers with an adapter only", param="model",
                code="model_not_found",
            )  # fmt: skip
        folder = self.session.folder
        parts = [self.adapters[name] for name in blend]
        places = {part.place for part in parts} or {folder}
        if len(places) > 1:
            raise Problem(
                400, "The blend's adapters were trained with different tokenizers", param="model", code="bad_blend"
            )
        named = [part.record.labels or {} for part in parts] or [self.base_labels]
        labels = named[0] if all(each == named[0] for each in named) else {}
        label = BLEND if len(blend) > 1 or (blend and model not in blend) else model
        return Target(model, label, blend or None, self.settings[places.pop()], labels, self.session.banks)


class Models:
    """An export that is served, and its adapters.

    Raises:
        InputRefused: The export's task is not served, or its tokenizer cannot be read.
        UsageProblem: The base and an adapter would have the same name.
    """

    def __init__(self, folder: Path, options: ServeOptions) -> None:
        manifest = read_manifest(folder)
        _require_task(manifest, folder)
        self.folder, self.manifest, self.task = folder, manifest, manifest.task
        self.base = options.model_name or _base_name(manifest, folder)
        self.started = int(time.time())
        self._changing = threading.Lock()
        opened = Seq2SeqSession if DECODER in manifest.graphs else AdapterSession
        self.session: Session = opened(
            folder, options.provider, n_threads=options.n_threads, max_bytes=options.max_resident_bytes,
            map_adapters=options.map_adapters,
        )  # fmt: skip
        served = [record for record in manifest.adapters if record.files]
        _require_free_base(self.base, [record.name for record in served])
        adapters = {record.name: self._served(record, folder, next(iter(record.files.values()))) for record in served}
        self.config = model_settings(folder)
        has_base = has_own_head(manifest.adapter_inputs)
        labels = _labels_of(manifest, self.config)
        places = {folder, *(each.place for each in adapters.values())}
        settings = {place: open_settings(place, folder, manifest) for place in places}
        self.view = View(
            self.session.snapshot(), self.base, labels, has_base, MappingProxyType(adapters), MappingProxyType(settings)
        )
        self.longest = self._longest(options)

    @property
    def writes(self) -> bool:
        """Whether the models write texts."""
        return self.task in WRITING

    @property
    def settings(self) -> Settings:
        """Those of the export itself, which its base is asked with."""
        return self.view.settings[self.folder]

    def put(
        self, name: str, served: Served, tensors: Mapping[str, Mapping[str, np.ndarray]], *, in_place: bool
    ) -> None:
        """Serve an adapter from now on.

        Args:
            tensors: By graph.

        Raises:
            Problem: 400 if the name is taken and it is not `in_place`.
        """
        place, opened = served.place, {}
        if place != self.folder:  # it may have changed since an adapter of that place was loaded
            opened = {place: open_settings(place, self.folder, self.manifest)}
        with self._changing:
            if name in self.view.adapters and not in_place:
                raise Problem(
                    400, f"The adapter {name!r} is loaded already; load_inplace replaces it", param="lora_name",
                    code="already_loaded",
                )  # fmt: skip
            if isinstance(self.session, Seq2SeqSession):
                self.session.hold(name, tensors)
            else:
                self.session.hold(name, tensors[SINGLE], served.record.invocation_tokens)
            self._show({**self.view.adapters, name: served}, {**self.view.settings, **opened})

    def read(self, file: Path, graph: str) -> dict[str, np.ndarray]:
        """The tensors of an adapter's file for `graph`; see `AdapterSession.read` for what is refused."""
        session = self.session.sessions[graph] if isinstance(self.session, Seq2SeqSession) else self.session
        return session.read(file)

    def remove(self, name: str) -> None:
        """Serve an adapter no longer; rows that wait for it are refused.

        Raises:
            Problem: 404 if there is none.
        """
        with self._changing:
            if name not in self.view.adapters:
                raise unknown_model(name, self.base, list(self.view.adapters))
            self.session.unload(name)
            adapters = {key: value for key, value in self.view.adapters.items() if key != name}
            self._show(adapters, self.view.settings)

    def _show(self, adapters: Mapping[str, Served], settings: Mapping[Path, Settings]) -> None:
        used = {self.folder, *(each.place for each in adapters.values())}
        self.view = replace(
            self.view, session=self.session.snapshot(), adapters=MappingProxyType(dict(adapters)),
            settings=MappingProxyType({place: settings[place] for place in used}),
        )  # fmt: skip

    def _longest(self, options: ServeOptions) -> int | None:
        if self.task in OF_SIGNALS:
            return None
        made_for = None if self.writes else self.settings.texts.longest
        return longest_row(self.manifest, self.config, options, made_for=made_for)

    def _served(self, record: AdapterRecord, folder: Path, root: str) -> Served:
        place = folder if record.preprocessing in (None, ".") else folder / record.preprocessing
        return Served(record, place, root, self.started)


def _require_task(manifest: Manifest, folder: Path) -> None:
    if manifest.task not in TASKS:
        raise InputRefused(
            "The server does not serve this task",
            where=str(folder),
            expected=", ".join(TASKS),
            found=f"{manifest.task}: {why_not_served(manifest.task)}",
            next_step="run it from Python, with AdapterSession or Seq2SeqSession",
        )


def _require_free_base(base: str, adapters: Sequence[str]) -> None:
    if base in adapters:
        raise UsageProblem(
            f"The base and an adapter would both be called {base!r}", next_step="give the base another: --model-name"
        )


def _base_name(manifest: Manifest, folder: Path) -> str:
    """A hub id as it is, a folder's last part; a merged export with adapters is no base, and has its folder's name."""
    if any(not record.files for record in manifest.adapters):
        return folder.resolve().name
    given = manifest.base.given
    return given if given.count("/") == 1 and not given.startswith((".", "/", "~")) else Path(given).name


def _labels_of(manifest: Manifest, config: dict) -> Mapping[int, str]:
    """The classes of a run without an adapter: of the one adapter that is folded in, or else the configuration's."""
    folded = [record.labels for record in manifest.adapters if not record.files and record.labels]
    if folded:
        return folded[0] if len(folded) == 1 else {}
    return {int(index): label for index, label in (config.get("id2label") or {}).items()}
