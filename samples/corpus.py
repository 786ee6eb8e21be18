"""Real English and source code found wherever the project's dependencies are installed.

Text comes from the standard library, from site-packages (numpy, scipy, scikit-learn, torch) and
from the licences and descriptions of the installed distributions. The order is always sorted,
never the file system's.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "__pycache__", "lib2to3", "idlelib"}
DOCSTRING_CHARACTERS = 90
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TEXT_CHARACTERS = (50, 320)
SECTION = re.compile(r"\n\s*[A-Z][A-Za-z ]+:?\n\s*(-{3,}|={3,}|~{3,})|\n\s*(Args|Arguments|Returns):")


@dataclass(frozen=True)
class Passage:
    """A piece of text and the file it came from."""

    text: str
    source: str


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the samples need the package {name}: install it and run again")
    return Path(next(iter(spec.submodule_search_locations)))


def files(root: Path, *patterns: str) -> list[Path]:
    """The files below `root` that match any of the glob patterns, tests left out, sorted."""
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return sorted(p for p in found if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def docstrings(paths: Iterable[Path]) -> Iterator[Passage]:
    """The prose at the start of every docstring in the given Python files."""
    for path in paths:
        for node in nodes(path):
            if isinstance(node, DOCUMENTED):
                text = _summary(ast.get_docstring(node) or "")
                if len(text) >= DOCSTRING_CHARACTERS:
                    yield Passage(text, _relative(path))


def error_messages(paths: Iterable[Path]) -> Iterator[Passage]:
    """The messages of `raise` statements, with the names of what they put in left in braces."""
    for path in paths:
        for node in nodes(path):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _cut(" ".join(_literal(node.exc.args[0]).split()))
                if len(text) >= TEXT_CHARACTERS[0]:
                    yield Passage(text, _relative(path))


def licences() -> Iterator[Passage]:
    """Paragraphs of the licences that installed distributions carry."""
    for name, distribution in _distributions():
        for entry in sorted(distribution.files or [], key=str):
            if re.search(r"licen[cs]e|copying|notice", str(entry), re.IGNORECASE) and (
                entry.suffix in {"", ".txt", ".md", ".rst"}
            ):
                for text in _paragraphs(_read(Path(str(distribution.locate_file(entry))))):
                    yield Passage(text, f"{name}:{entry}")


def descriptions() -> Iterator[Passage]:
    """Pieces of the Markdown descriptions of installed distributions, code blocks left out."""
    for name, distribution in _distributions():
        if "markdown" in distribution.metadata.get("Description-Content-Type", ""):
            body = distribution.metadata.get_payload()  # type: ignore[attr-defined]
            prose = re.sub(r"^\s*```.*?^\s*```", "", str(body), flags=re.DOTALL | re.MULTILINE)
            for text in _chunks(prose):
                yield Passage(text, f"{name}:METADATA")


def snippets(paths: Iterable[Path], telling: str) -> Iterator[Passage]:
    """Pieces of a few lines of source that match the pattern `telling` at least twice.

    The pattern keeps out pieces that are all prose or that could be in another language.
    """
    for path in paths:
        for text in _chunks(_read(path)):
            if len(re.findall(telling, text, flags=re.MULTILINE)) >= 2:
                yield Passage(text, _relative(path))


def unique(passages: Iterable[Passage]) -> list[Passage]:
    """The passages without those whose letters were all seen before."""
    seen: set[str] = set()
    kept = []
    for passage in passages:
        letters = re.sub(r"[^a-z]", "", passage.text.lower())
        if letters not in seen:
            seen.add(letters)
            kept.append(passage)
    return kept


def spread(passages: Iterable[Passage], count: int) -> list[Passage]:
    """Up to `count` passages, taken from as many different files as possible."""
    by_source: dict[str, list[Passage]] = defaultdict(list)
    for passage in sorted(passages, key=lambda p: _hash(p.text)):
        by_source[passage.source].append(passage)
    ranked = [(rank, _hash(p.text), p) for own in by_source.values() for rank, p in enumerate(own)]
    return [passage for _, _, passage in sorted(ranked, key=lambda item: item[:2])[:count]]


def is_heldout(source: str) -> bool:
    """Whether a file's text is kept for testing: about one file in three, by its name."""
    return _hash(source) % 3 == 0


def word_runs(text: str, length: int = 6) -> set[tuple[str, ...]]:
    """All runs of `length` words in the text, to find near copies by."""
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def nodes(path: Path) -> Iterator[ast.AST]:
    """All nodes of a Python file; none of one that does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(_read(path))
        except SyntaxError:
            return
    yield from ast.walk(tree)


def _literal(node: ast.expr) -> str:
    """The text of a string literal, plain or formatted; nothing for any other expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    return "".join(map(_literal, node.values)) if isinstance(node, ast.JoinedStr) else ""


def _summary(docstring: str) -> str:
    """The prose before the first section heading or example, on one line, cut at a word."""
    prose = SECTION.split(docstring.split(">>>")[0], maxsplit=1)[0]
    prose = re.sub(r":\w+:`~?([^`]*)`|\.\. \w+::.*|`+", r"\1", prose)
    return _cut(" ".join(prose.split()))


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        line = _cut(" ".join(re.sub(r"^[\s#*/;]+", " ", paragraph, flags=re.MULTILINE).split()))
        if len(line) >= TEXT_CHARACTERS[0] and len(re.findall(r"[A-Za-z]{2,}", line)) >= 8:
            yield line


def _chunks(text: str, lines: int = 7) -> Iterator[str]:
    """Consecutive pieces of `lines` non-blank lines, indentation removed."""
    kept = [line.rstrip() for line in text.expandtabs(4).splitlines() if line.strip()]
    for start in range(0, len(kept), lines):
        chunk = textwrap.dedent("\n".join(kept[start : start + lines]))[: TEXT_CHARACTERS[1]]
        if len(re.findall(r"[A-Za-z]{2,}", chunk)) >= 8:
            yield chunk.strip()


def _cut(text: str) -> str:
    limit = TEXT_CHARACTERS[1]
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0]


def _distributions() -> list[tuple[str, metadata.Distribution]]:
    found = {d.metadata["Name"].lower(): d for d in metadata.distributions()}
    return sorted(found.items())


def _relative(path: Path) -> str:
    for root in (STDLIB, package("numpy").parent):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
