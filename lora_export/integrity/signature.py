"""A folder's signature in the OpenSSF model signing format (`model.sig`), made and checked with a key pair, offline.

Signed is every file of the folder but `reports/`, which `check` and `bench` write later, and the signature itself.
Needs the extra `lora-export[sign]`. Keyless signatures need a network and are left to model-signing's own command.
"""

from __future__ import annotations

import base64
import contextlib
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.artifact import REPORTS, SIGNATURE, sha256_of
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.named import no_such
from lora_export.reading import json_of, read_json

if TYPE_CHECKING:
    from model_signing import hashing, signing, verifying

_KEYS = "an elliptic curve key (P-256, P-384 or P-521) as PEM"
# What model-signing and the libraries under it raise for content that is not what they expect.
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError)


def signer_with(private_key: Path) -> signing.Config:
    """What signs with an unencrypted private key.

    Raises:
        EnvironmentUnusable: model-signing is not installed.
        InputRefused: The file is missing or holds no key that model-signing takes.
    """
    with _needed_by("--sign-key"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from model_signing import signing
    try:
        return signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(_hashed())
    except (*_MALFORMED, UnsupportedAlgorithm, OSError) as error:
        raise _no_key(private_key, "private", error) from error


def sign(folder: Path, signer: signing.Config) -> None:
    """Write `folder/model.sig`, by rename."""
    temporary = folder / f".{SIGNATURE}.{uuid.uuid4().hex[:8]}"
    try:
        signer.sign(folder, temporary)  # hashes first, so that this file is not among those signed
        temporary.replace(folder / SIGNATURE)
    finally:
        temporary.unlink(missing_ok=True)


def verifier_with(public_key: Path) -> verifying.Config:
    """What verifies with a public key.

    Raises:
        EnvironmentUnusable: model-signing is not installed.
        InputRefused: The file is missing or holds no key that model-signing takes.
    """
    with _needed_by("--signature-key"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from model_signing import verifying
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(_hashed())
    except (*_MALFORMED, UnsupportedAlgorithm, OSError) as error:
        raise _no_key(public_key, "public", error) from error


def signature_problem(folder: Path, verifier: verifying.Config, files: Iterable[str]) -> str | None:
    """Why `folder/model.sig` does not vouch for the folder and for `files` in it; None if it does."""
    from cryptography.exceptions import InvalidSignature

    path = folder / SIGNATURE
    if not path.is_file():
        return "there is none"
    try:
        verifier.verify(folder, path)
        # The signer may have left out more than `reports/`; a signature that does not cover a file says nothing of it.
        uncovered = sorted(set(files) - set(_signed_files(path)))
    except InvalidSignature:
        return "its content was changed, or it was made with another key"
    except InputRefused as error:
        return f"{error.what}: {error.found}"
    except _MALFORMED as error:
        # model-signing says so once the signature itself has proved good; its list of differences is not for people.
        if str(error).startswith("Signature mismatch"):
            return f"not as they were signed: {', '.join(_differing(folder, _signed_files(path)))}"
        return str(error).strip() or type(error).__name__
    return f"it does not cover {', '.join(uncovered)}" if uncovered else None


def _signed_files(signature: Path) -> dict[str, str]:
    """The files that a signature lists, with their sha256: the in-toto statement in its DSSE envelope."""
    bundle = read_json(signature)
    statement = json_of(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return {resource["name"]: resource["digest"] for resource in statement["predicate"]["resources"]}


def _differing(folder: Path, signed: dict[str, str]) -> list[str]:
    """Files that were changed, removed or added since."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {name: path for name, path in paths.items() if name != SIGNATURE and not name.startswith(f"{REPORTS}/")}
    return sorted(name for name in {*signed, *found} if name not in found or sha256_of(found[name]) != signed.get(name))


def _hashed() -> hashing.Config:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[REPORTS, SIGNATURE], ignore_git_paths=False)


@contextlib.contextmanager
def _needed_by(option: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EnvironmentUnusable(
            "Signatures need the package model-signing, which is not installed",
            where=option,
            found=str(error),
            next_step="pip install 'lora-export[sign]'",
        ) from error


def _no_key(path: Path, kind: str, error: Exception) -> InputRefused:
    expected = f"{_KEYS}, {kind}" + (" and not encrypted" if kind == "private" else "")
    if isinstance(error, FileNotFoundError):
        return no_such(f"{kind} key", path, expected=expected)
    found = error.strerror if isinstance(error, OSError) else str(error)
    return InputRefused(f"The {kind} key cannot be used", where=str(path), expected=expected, found=found)
