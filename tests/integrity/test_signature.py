"""Signatures with real keys: what they vouch for, and everything that ends them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command_line import call, fails
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from lora_export.artifact import read_manifest, sha256_of, write_manifest
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.export.plan import Request
from lora_export.integrity.signature import sign, signer_with, verifier_with
from lora_export.integrity.sources import SourceOverrides
from lora_export.integrity.verify import SignatureState, verify
from lora_export.pipeline import ExportOptions, add_adapter, export


def write_keys(folder: Path, name: str, key) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "release", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def signed(exports, own, keys) -> Path:
    folder = own(exports["bert-dynamic"])
    sign(folder, signer_with(keys[0]))
    return folder


def reason(folder: Path, public: Path) -> str:
    """Why the signature is bad."""
    found = verify(folder, signature_key=public)
    assert found.signature is SignatureState.BAD and not found.passed
    return next(problem.detail for problem in found.problems if problem.kind == "signature")


def test_a_signed_export_is_good_for_its_key_only(signed, keys, tmp_path):
    found = verify(signed, signature_key=keys[1])
    assert found.signature is SignatureState.GOOD and found.passed
    _, other = write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP256R1()))
    assert "does not match the provided public key" in reason(signed, other)


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1])
def test_other_curves(curve, exports, own, tmp_path):
    private, public = write_keys(tmp_path, "key", ec.generate_private_key(curve()))
    folder = own(exports["bert-merged"])
    sign(folder, signer_with(private))
    assert verify(folder, signature_key=public).passed


def test_a_forger_who_fits_the_manifest_is_found_by_the_signature_alone(signed, keys):
    (signed / "config.json").write_text("{}")
    manifest = read_manifest(signed)
    manifest.files["config.json"] = sha256_of(signed / "config.json")
    write_manifest(signed, manifest)
    assert verify(signed).passed, "by the manifest alone, nothing is wrong"
    assert reason(signed, keys[1]) == "not as they were signed: config.json, lora_export.json"


def test_files_that_come_and_go_end_it(signed, keys):
    (signed / "extra.txt").write_text("x")
    assert reason(signed, keys[1]) == "not as they were signed: extra.txt"
    (signed / "extra.txt").unlink()
    (signed / "adapters/kind.onnx_adapter").unlink()
    assert reason(signed, keys[1]) == "not as they were signed: adapters/kind.onnx_adapter"


@pytest.mark.parametrize("flaw", ["changed payload", "another's signature", "no JSON", "no bundle", "empty"])
def test_a_damaged_signature_is_bad(flaw, signed, keys):
    path = signed / "model.sig"
    bundle = json.loads(path.read_text())
    match flaw:
        case "changed payload":
            bundle["dsseEnvelope"]["payload"] = "A" + bundle["dsseEnvelope"]["payload"][1:]
        case "another's signature":
            bundle["dsseEnvelope"]["signatures"] = []
        case "no bundle":
            bundle = []
    path.write_text({"no JSON": "{", "empty": ""}.get(flaw, json.dumps(bundle)))
    assert reason(signed, keys[1])


def test_a_symbolic_link_is_not_signed_content(signed, keys, tmp_path):
    shutil.move(signed / "model.onnx.data", tmp_path / "elsewhere")
    (signed / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    assert "symlink" in reason(signed, keys[1])


def test_a_signature_must_cover_every_file(signed, keys):
    """model-signing honours what the signer ignored; this export's files may not be among it."""
    command = [sys.executable, "-m", "model_signing", "sign", "key", signed, "--signature", signed / "model.sig"]
    command += ["--private_key", keys[0], "--ignore-paths", signed / "model.onnx.data"]
    subprocess.run(command, check=True, capture_output=True)
    assert reason(signed, keys[1]) == "it does not cover model.onnx.data"


def test_model_signing_itself_agrees(signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed, "--signature", signed / "model.sig"]
    command += ["--public_key", keys[1]]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (signed / "config.json").write_text("{}")
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_reports_written_later_leave_it_good(signed, keys):
    result = call("check", signed, "--provider", "cpu", "--rows", 4, "--quiet")
    assert result.exit_code == 0 and (signed / "reports/check.html").is_file()
    assert verify(signed, signature_key=keys[1]).signature is SignatureState.GOOD


def test_no_signature_where_one_is_wanted(exports, keys):
    assert reason(exports["bert-merged"], keys[1]) == "there is none"
    text = fails(1, "verify", exports["bert-merged"], "--signature-key", keys[1])
    assert "signature  model.sig  there is none" in text
    assert "signature  none" in call("verify", exports["bert-merged"]).output


def test_export_signs_as_its_last_act(bases, adapters, keys, tmp_path):
    request = Request(str(bases["classifier"]), ((str(adapters["plain"]), "plain"),), "merge", provider="cpu")
    export(request, ExportOptions(tmp_path / "out", sign_key=keys[0]))
    assert verify(tmp_path / "out", signature_key=keys[1]).signature is SignatureState.GOOD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert "model.sig" not in read_manifest(tmp_path / "out").files
    assert "model.sig  a signature" in call("inspect", tmp_path / "out").output
    assert "model.sig" not in call("inspect", bases["classifier"]).output


@pytest.fixture
def signed_and_fits(exports, own, bases, keys, tmp_path) -> tuple[Path, Path]:
    out = own(exports["classifier-targets"])
    sign(out, signer_with(keys[0]))
    return out, tiny.adapter(
        bases["classifier"], tmp_path / "fits", "BertForSequenceClassification", r=2, lora_alpha=2,
        target_modules=["query"],
    )  # fmt: skip


def test_add_ends_a_signature_and_says_so(signed_and_fits, keys):
    out, fits = signed_and_fits
    result = call("add", out, fits)
    assert result.exit_code == 0 and not (out / "model.sig").exists()
    assert f"removed {out / 'model.sig'}: it signed the folder without this adapter" in result.output
    assert verify(out).signature is SignatureState.NONE


def test_add_signs_anew(signed_and_fits, keys):
    out, fits = signed_and_fits
    result = call("add", out, fits, "--sign-key", keys[0])
    assert result.exit_code == 0 and "removed" not in result.output
    assert verify(out, signature_key=keys[1]).signature is SignatureState.GOOD


def test_an_add_that_is_refused_leaves_the_signature(signed_and_fits, adapters, keys):
    out, _ = signed_and_fits
    with pytest.raises(InputRefused, match="needs modules that the graph has no inputs for"):
        add_adapter(out, [(str(adapters["shades"]), None)], SourceOverrides())
    assert verify(out, signature_key=keys[1]).signature is SignatureState.GOOD


def test_keys_that_are_none_are_refused_before_any_work(exports, bases, tmp_path):
    rsa_private, rsa_public = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    (tmp_path / "text").write_text("no key")
    encrypted = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    (tmp_path / "encrypted").write_bytes(encrypted)
    for path in (rsa_private, tmp_path / "text", tmp_path / "nowhere", tmp_path / "encrypted"):
        what = "The private key cannot be used" if path.exists() else "There is no such private key"
        with pytest.raises(InputRefused, match=what) as refused:
            signer_with(path)
        assert refused.value.where == str(path) and refused.value.found
        assert refused.value.expected.endswith("as PEM, private and not encrypted")
    for path in (rsa_public, tmp_path / "text", tmp_path / "nowhere", rsa_private):
        what = "The public key cannot be used" if path.exists() else "There is no such public key"
        with pytest.raises(InputRefused, match=what):
            verifier_with(path)
    for dry in ((), ("--dry-run",)):
        out = tmp_path / "out"
        assert "private key cannot be used" in fails(
            3, "merge", bases["bert"], "-o", out, "--sign-key", tmp_path / "text", *dry
        )
        assert not out.exists()


def test_without_the_extra_it_says_what_to_install(bases, exports, keys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(EnvironmentUnusable, match="Signatures need the package model-signing"):
        signer_with(keys[0])
    commands = {
        "--sign-key": ("merge", bases["bert"], "-o", tmp_path / "out", "--sign-key", keys[0]),
        "--signature-key": ("verify", exports["bert-merged"], "--signature-key", keys[1]),
    }
    for option, arguments in commands.items():
        text = fails(4, *arguments)
        assert "pip install 'lora-export[sign]'" in text and option in text
    assert not (tmp_path / "out").exists()
    assert call("verify", exports["bert-merged"]).exit_code == 0, "hashes need no extra"


def test_verify_loads_nothing_heavy(exports):
    """Also where torch is not installed: a host verifies before it loads."""
    code = (
        "import sys; from lora_export.integrity.verify import verify; verify(__import__('pathlib').Path(sys.argv[1]));"
    )
    code += "sys.exit(', '.join({'torch', 'transformers', 'peft', 'onnx', 'onnxruntime'} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code, exports["bert-merged"]], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
