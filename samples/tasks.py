"""The three labelled data sets: what the classes are and where their text comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import corpus
from corpus import STDLIB, Passage

Classes = dict[str, list[Passage]]


@dataclass(frozen=True)
class Example:
    """A text and the name of its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Dataset:
    """Labelled text; no file gives text to both parts."""

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]


@dataclass(frozen=True)
class Task:
    """A data set to make: `train` and `heldout` are the most examples per class."""

    name: str
    collect: Callable[[], Classes]
    train: int
    heldout: int

    def dataset(self) -> Dataset:
        """Collect the text and split it by file."""
        classes = self.collect()
        train: list[Example] = []
        heldout: list[Example] = []
        for label in sorted(classes):
            learn, test = _split(classes[label], self.train, self.heldout)
            train += [Example(passage.text, label) for passage in learn]
            heldout += [Example(passage.text, label) for passage in test]
        return Dataset(tuple(sorted(classes)), tuple(train), tuple(heldout))


def topics() -> Classes:
    """Docstrings by what the code is for."""
    return {
        "concurrency": _docs(
            _stdlib("asyncio", "threading", "multiprocessing", "concurrent", "queue", "subprocess"),
            _stdlib("selectors", "sched", "_threading_local"),
            corpus.files(corpus.package("torch"), "futures/*.py", "multiprocessing/*.py"),
        ),
        "files": _docs(
            _stdlib("os", "pathlib", "shutil", "tarfile", "zipfile", "tempfile", "gzip", "bz2"),
            _stdlib("lzma", "glob", "fnmatch", "filecmp", "fileinput", "posixpath", "ntpath"),
            _stdlib("genericpath", "stat", "_pyio", "zipimport", "zipapp", "mimetypes", "netrc"),
        ),
        "networking": _docs(
            _stdlib("http", "urllib", "email", "smtplib", "imaplib", "ftplib", "poplib", "socket"),
            _stdlib("socketserver", "ssl", "xmlrpc", "wsgiref", "ipaddress", "mailbox"),
        ),
        "neural networks": _docs(
            corpus.files(corpus.package("torch"), "nn/**/*.py", "optim/*.py"),
        ),
        "signals": _docs(
            corpus.files(corpus.package("scipy"), "signal/*.py", "ndimage/*.py", "fft/*.py"),
        ),
        "statistics": _docs(
            corpus.files(corpus.package("scipy"), "stats/**/*.py"),
            corpus.files(corpus.package("torch"), "distributions/*.py"),
            _stdlib("statistics", "random"),
        ),
    }


def kinds() -> Classes:
    """Text by what it is there for."""
    paths = corpus.files(corpus.package("sklearn"), "*/*.py") + corpus.files(STDLIB, "[a-z]*.py")
    return {
        "documentation": _docs(paths),
        "error message": corpus.unique(corpus.error_messages(paths)),
        "licence": corpus.unique(corpus.licences()),
        "read-me": corpus.unique(corpus.descriptions()),
    }


def languages() -> Classes:
    """Pieces of source files by the language they are written in."""
    scipy, sklearn, torch = map(corpus.package, ("scipy", "sklearn", "torch"))
    cython = corpus.files(sklearn, "**/*.pyx", "**/*.pxd") + corpus.files(scipy, "**/*.pyx", "**/*.pxd")
    python = corpus.files(STDLIB, "[a-m]*.py") + corpus.files(sklearn, "[a-e]*/*.py")
    classes = {
        "c++": corpus.snippets(corpus.files(torch, "include/c10/[a-u]*/*.h"), r"[;{}]$"),
        "cmake": corpus.snippets(corpus.files(torch, "share/cmake/**/*.cmake"), r"\w ?\(|\$\{"),
        "cython": corpus.snippets(cython, r"\b(cdef|cpdef|cimport|nogil|intp_t)\b|\[::?1?[,\]]"),
        "markdown": corpus.descriptions(),
        "python": corpus.snippets(python, r"^ *(def|return|if|for|raise|import|from|class)\b|self\."),
    }
    return {name: corpus.unique(passages) for name, passages in classes.items()}


TASKS = (
    Task("topic", topics, train=160, heldout=35),
    Task("kind", kinds, train=220, heldout=50),
    Task("language", languages, train=160, heldout=40),
)


def _stdlib(*modules: str) -> list:
    """The files of the named standard modules; one this Python lacks gives none."""
    patterns = [form for name in modules for form in (f"{name}.py", f"{name}/**/*.py")]
    return corpus.files(STDLIB, *patterns)


def _docs(*groups: Iterable) -> list[Passage]:
    return corpus.unique(corpus.docstrings(path for group in groups for path in group))


def _split(passages: list[Passage], train: int, heldout: int) -> tuple[list[Passage], list[Passage]]:
    """Passages to learn from and to test with, from different files and without near copies."""
    learn = corpus.spread((p for p in passages if not corpus.is_heldout(p.source)), train)
    known = Counter(run for p in learn for run in corpus.word_runs(p.text))
    test = [passage for passage in passages if corpus.is_heldout(passage.source) and _share(passage, known) < 0.3]
    return learn, corpus.spread(test, heldout)


def _share(passage: Passage, known: Counter) -> float:
    """The share of the passage's word runs that training text has too."""
    runs = corpus.word_runs(passage.text)
    return sum(run in known for run in runs) / max(1, len(runs))
