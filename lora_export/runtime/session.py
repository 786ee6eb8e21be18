"""ONNX Runtime sessions on a provider that is really used: never a silent fall-back to the CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from lora_export.errors import EnvironmentUnusable, UsageProblem

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Operators whose place decides the latency; shape arithmetic belongs on the CPU and may stay there.
_COMPUTE = frozenset(
    {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "MultiHeadAttention", "GroupQueryAttention", "Attention",
     "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization", "BiasGelu", "Softmax", "MoE"}
)  # fmt: skip
# What the CUDA provider loads, in words and as the dynamic linker names it (CUDA 13, cuDNN 9).
_CUDA_LIBRARIES = (
    ("the NVIDIA driver", ("libcuda.so.1",)),
    ("CUDA's runtime", ("libcudart.so.13", "libcudart.so.12")),
    ("cuBLAS", ("libcublasLt.so.13", "libcublasLt.so.12")),
    ("cuDNN 9", ("libcudnn.so.9",)),
)


@dataclass(frozen=True)
class ProviderChoice:
    """The provider to run on, "cpu" or "cuda", and why."""

    name: str
    reason: str


def choose_provider(requested: str | None) -> ProviderChoice:
    """The provider asked for, or CUDA if it is usable here, else the CPU.

    Raises:
        EnvironmentUnusable: CUDA was asked for and is not usable; the message names what is missing.
    """
    if requested == "cpu":
        return ProviderChoice("cpu", "asked for")
    problem = cuda_problem()
    if problem is None:
        return ProviderChoice("cuda", "asked for" if requested else "CUDA is usable here")
    if requested == "cuda":
        raise EnvironmentUnusable(
            "The CUDA provider was asked for and is not usable here",
            found=problem,
            next_step="install what is missing (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use --provider cpu "
            "(in Python, provider='cpu')",
        )
    return ProviderChoice("cpu", f"CUDA is not usable here: {problem}")


def cuda_problem() -> str | None:
    """What keeps the CUDA provider from working, or None. Loads CUDA's libraries where Python packages bring them."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return f"this onnxruntime ({ort.__version__}) is built without the CUDA provider; it needs onnxruntime-gpu"
    if not _loads(_CUDA_LIBRARIES[0][1]):
        return f"{_CUDA_LIBRARIES[0][0]} is missing (libcuda.so.1): no NVIDIA GPU is set up on this machine"
    ort.preload_dlls()
    missing = [f"{what} ({names[0]})" for what, names in _CUDA_LIBRARIES[1:] if not _loads(names)]
    if missing:
        return "missing " + ", ".join(missing)
    return _device_problem()


def _loads(names: tuple[str, ...]) -> bool:
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _device_problem() -> str | None:
    count = ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return f"the NVIDIA driver answers with error {status}"
    return None if count.value else "the NVIDIA driver sees no GPU"


def device_name(provider: str) -> str:
    """The GPU's name as the driver gives it; "CPU" for the CPU provider."""
    if provider != "cuda":
        return "CPU"
    buffer = ctypes.create_string_buffer(256)
    ctypes.CDLL("libcuda.so.1").cuDeviceGetName(buffer, len(buffer), 0)
    return buffer.value.decode()


def open_session(
    graph: Path | bytes,
    provider: str,
    *,
    n_threads: int | None = None,
    stop_spinning: bool = False,
    weights: Path | None = None,
    prepack: bool = False,
    cuda_graph: bool = False,
    optimized: Path | None = None,
) -> ort.InferenceSession:
    """A session of `graph` on `provider`.

    Args:
        graph: A file, or a serialized model.
        weights: The folder with the external weights of a serialized model.
        prepack: Whether such a model's weights are put into the kernels' own layouts, which costs a copy and pays from
            the third run on.
        cuda_graph: Capture the first run in a CUDA graph and replay it from then on: the inputs and outputs of every
            run must be bound, in the same shapes and at the same places. For "cuda" only.
        optimized: Where to write the graph as ONNX Runtime runs it, to look at.

    TF32 is off, as in PyTorch's matmul, so that float32 means float32. ONNX Runtime's warnings about optional inputs
    are silenced; errors are not.

    Raises:
        EnvironmentUnusable: The session would not run on `provider`, or its compute would not.
        UsageProblem: ONNX Runtime cannot capture the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if stop_spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if n_threads is not None:
        options.intra_op_num_threads = n_threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    wanted: list = [PROVIDERS["cpu"]]
    if provider == "cuda":
        wanted.insert(0, (PROVIDERS["cuda"], {"use_tf32": "0", "enable_cuda_graph": "1" if cuda_graph else "0"}))
    with _refusals_told(str(weights or graph), provider, cuda_graph=cuda_graph):
        session = ort.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options, providers=wanted)
    if provider == "cuda":
        _require_on_gpu(session)
    return session


@contextlib.contextmanager
def _refusals_told(where: str, provider: str, *, cuda_graph: bool) -> Iterator[None]:
    """Why ONNX Runtime refuses a graph, in the words of `open_session`'s errors; all else is raised as it is."""
    try:
        yield
    except ort.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise EnvironmentUnusable(
            f"The {provider} provider has no kernel for an operator of this graph in its dtype",
            where=where,
            found=str(error),
            next_step="run it where it was fused for (--provider), or export with --dtype float32",
        ) from error
    except ort.capi.onnxruntime_pybind11_state.Fail as error:
        if not cuda_graph or "graph capture" not in str(error):
            raise
        raise UsageProblem(
            "ONNX Runtime cannot capture this graph in a CUDA graph",
            where="cuda_graph",
            found=str(error),
            next_step="leave out cuda_graph",
        ) from error


def placement(session: ort.InferenceSession) -> dict[str, Counter[str]]:
    """Operators by the provider that runs them."""
    found: dict[str, Counter[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        found.setdefault(subgraph.ep_name, Counter()).update(node.op_type for node in subgraph.get_nodes())
    return found


def _require_on_gpu(session: ort.InferenceSession) -> None:
    if session.get_providers()[0] != PROVIDERS["cuda"]:
        raise EnvironmentUnusable(
            "ONNX Runtime fell back to the CPU although CUDA was asked for",
            found=", ".join(session.get_providers()),
            next_step="run with ORT's log visible (LORA_EXPORT_DEBUG=1) to see what it could not load",
        )
    off = {op: n for op, n in placement(session).get(PROVIDERS["cpu"], Counter()).items() if op in _COMPUTE}
    if off:
        raise EnvironmentUnusable(
            "Compute of this graph runs on the CPU although CUDA was asked for",
            found=", ".join(f"{n} × {op}" for op, n in sorted(off.items())),
            next_step="export for CUDA (--provider cuda) in float16, or run it on --provider cpu",
        )
