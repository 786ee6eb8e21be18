"""A key pair to sign exports with."""

from __future__ import annotations

from pathlib import Path


def make_key(folder: Path) -> Path:
    """A private key in `folder/release.pem`, its public one in `folder/release.pub`; the private one's path."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, private = ec.generate_private_key(ec.SECP256R1()), folder / "release.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    private.with_suffix(".pub").write_bytes(public)
    return private
