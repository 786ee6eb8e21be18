"""`verify`: is an exported folder still what its manifest, its sources and its signature say? Needs no network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.artifact import MANIFEST, REPORTS, SIGNATURE, Manifest, read_manifest, sha256_of
from lora_export.errors import InputRefused
from lora_export.integrity.signature import signature_problem, verifier_with
from lora_export.own_hash import own_hash_problem

if TYPE_CHECKING:
    from lora_export.integrity.sources import SourceOverrides


class ProblemKind(StrEnum):
    MISSING = "missing"
    CHANGED = "changed"
    EXTRA = "extra"
    SOURCE = "source"
    SIGNATURE = "signature"


class SignatureState(StrEnum):
    GOOD = "good"
    BAD = "bad"
    UNCHECKED = "present, not checked"
    NONE = "none"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of the folder, a source ("base", "adapter topic") or the signature, and how."""

    kind: ProblemKind
    name: str
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        n_files: Files that the manifest names, each hashed.
        n_bytes: Their size as found.
        sources: Sources that were compared with their recorded hashes; empty if that was not asked for.
    """

    folder: str
    n_files: int
    n_bytes: int
    sources: tuple[str, ...]
    signature: SignatureState
    problems: tuple[Problem, ...]

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict:
        return asdict(self) | {"passed": self.passed}


def verify(
    folder: Path,
    overrides: SourceOverrides | None = None,
    *,
    signature_key: Path | None = None,
) -> Verification:
    """Compare every file of the export in `folder` with the manifest.

    Args:
        overrides: Where base and adapters are now, to compare them too; None to leave them out.
        signature_key: The public key that `model.sig` must have been made for; None to leave it unchecked.

    Raises:
        InputRefused: The folder holds no export, its manifest is damaged, or the key is none.
        EnvironmentUnusable: A signature is to be checked and model-signing is not installed.
    """
    verifier = verifier_with(signature_key) if signature_key is not None else None
    manifest = read_manifest(folder)
    problems = list(_file_problems(folder, manifest))
    sources = {} if overrides is None else _source_problems(manifest, overrides)
    problems += [problem for problem in sources.values() if problem is not None]
    signature = SignatureState.UNCHECKED if (folder / SIGNATURE).is_file() else SignatureState.NONE
    if verifier is not None:
        found = signature_problem(folder, verifier, [MANIFEST, *manifest.files])
        signature = SignatureState.GOOD if found is None else SignatureState.BAD
        problems += [] if found is None else [Problem(ProblemKind.SIGNATURE, SIGNATURE, found)]
    present = [folder / name for name in manifest.files if (folder / name).is_file()]
    n_bytes = sum(path.stat().st_size for path in present)
    return Verification(str(folder), len(manifest.files), n_bytes, tuple(sources), signature, tuple(problems))


def _file_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    if (found := own_hash_problem((folder / MANIFEST).read_bytes())) is not None:
        yield Problem(ProblemKind.CHANGED, MANIFEST, found)
    for name, expected in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            yield Problem(ProblemKind.MISSING, name)
        elif (found := sha256_of(path)) != expected:
            yield Problem(ProblemKind.CHANGED, name, f"expected sha256 {expected}, found sha256 {found}")
    known = {*manifest.files, MANIFEST, SIGNATURE}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_plain_folder = path.is_dir() and not path.is_symlink()
        if not (is_plain_folder or relative.parts[0] == REPORTS or relative.as_posix() in known):
            yield Problem(ProblemKind.EXTRA, relative.as_posix(), "the manifest does not know it")


def _source_problems(manifest: Manifest, overrides: SourceOverrides) -> dict[str, Problem | None]:
    """Each source by name, with what is wrong with it."""
    from lora_export.integrity.sources import locate_source  # brings torch, which hashes of files do without

    for name in overrides.adapters:
        manifest.adapter(name)
    wanted = {"base": (manifest.base, overrides.base, "base", "--base PATH")}
    for record in manifest.adapters:
        given, hint = overrides.adapters.get(record.name), f"--adapter {record.name}=PATH"
        wanted[f"adapter {record.name}"] = (record.source, given, "adapter", hint)
    found: dict[str, Problem | None] = {}
    for name, (source, given, kind, hint) in wanted.items():
        try:
            locate_source(source, given, kind, hint=hint)
            found[name] = None
        except InputRefused as error:
            parts = (error.what, error.where, error.expected, error.found, error.next_step)
            found[name] = Problem(ProblemKind.SOURCE, name, "; ".join(filter(None, parts)))
    return found
