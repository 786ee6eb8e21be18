"""Providers: the one asked for or an error that names what is missing, never a silent fall-back."""

from __future__ import annotations

import onnxruntime as ort
import pytest

from lora_export.errors import EnvironmentUnusable
from lora_export.runtime import session
from lora_export.runtime.adapter_session import AdapterSession


def without(monkeypatch, *names: str) -> None:
    """Pretend that libraries whose first name starts with one of `names` are not there, and all others are."""
    monkeypatch.setattr(session, "_loads", lambda candidates: not any(candidates[0].startswith(n) for n in names))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)


def test_the_cpu_is_used_when_asked_for(monkeypatch):
    monkeypatch.setattr(session, "cuda_problem", lambda: pytest.fail("CUDA was looked for"))
    assert session.choose_provider("cpu") == session.ProviderChoice("cpu", "asked for")


def test_cuda_is_used_where_it_works(monkeypatch):
    monkeypatch.setattr(session, "cuda_problem", lambda: None)
    assert session.choose_provider(None) == session.ProviderChoice("cuda", "CUDA is usable here")
    assert session.choose_provider("cuda") == session.ProviderChoice("cuda", "asked for")


def test_without_cuda_the_cpu_is_chosen_with_the_reason(monkeypatch):
    without(monkeypatch, "libcuda.so")
    choice = session.choose_provider(None)
    assert choice.name == "cpu"
    assert choice.reason.startswith("CUDA is not usable here: the NVIDIA driver is missing")


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("libcuda.so", "the NVIDIA driver is missing (libcuda.so.1)"),
        ("libcudart", "missing CUDA's runtime (libcudart.so.13)"),
        ("libcublasLt", "missing cuBLAS (libcublasLt.so.13)"),
        ("libcudnn", "missing cuDNN 9 (libcudnn.so.9)"),
    ],
)
def test_cuda_asked_for_and_not_usable_is_an_error_that_names_what_is_missing(library, words, exports, monkeypatch):
    without(monkeypatch, library)
    with pytest.raises(EnvironmentUnusable, match="The CUDA provider was asked for and is not usable here") as refused:
        AdapterSession(exports["bert-merged"], "cuda")
    assert refused.value.found.startswith(words)
    assert refused.value.exit_code == 4 and "--provider cpu" in refused.value.next_step


def test_all_missing_libraries_are_named_at_once(monkeypatch):
    without(monkeypatch, "libcudart", "libcudnn")
    assert session.cuda_problem() == "missing CUDA's runtime (libcudart.so.13), cuDNN 9 (libcudnn.so.9)"


def test_a_build_without_cuda_is_told_apart(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "is built without the CUDA provider" in session.cuda_problem()


def test_a_session_that_fell_back_is_refused(exports, monkeypatch):
    """ONNX Runtime only warns when a provider does not load; the session then runs on the CPU."""
    monkeypatch.setattr(
        ort, "InferenceSession",
        lambda path, options, providers, real=ort.InferenceSession: real(path, options, providers=["CPUExecutionProvider"]),
    )  # fmt: skip
    with pytest.raises(EnvironmentUnusable, match="ONNX Runtime fell back to the CPU although CUDA was asked for"):
        session.open_session(exports["bert-merged"] / "model.onnx", "cuda")


def test_every_operator_is_placed(exports):
    opened = session.open_session(exports["bert-merged"] / "model.onnx", "cpu", n_threads=1)
    found = session.placement(opened)
    assert set(found) == {"CPUExecutionProvider"}
    assert found["CPUExecutionProvider"]["MatMul"] > 0
    assert session.device_name("cpu") == "CPU"
