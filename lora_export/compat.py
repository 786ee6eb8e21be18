"""Every private or patched symbol of another library: which, why, since which release, and what happens without it.

The rest of the package takes them from here by name, so a library that moves one is met in one place: by a slower way
where there is one, else by an error that names versions. Attributes of a library's own objects (a model's class, its
config) are used where they are needed, and listed here. Tests walk the table; nothing else that is private is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from lora_export.errors import EnvironmentUnusable


class Without(StrEnum):
    """What happens where a symbol is not there."""

    SLOWER = "a slower way is taken"
    REFUSED = "an error names the versions"


@dataclass(frozen=True)
class Borrowed:
    """A symbol that its library does not promise to keep.

    Attributes:
        place: `module:attribute`, with dots for attributes of attributes; where releases differ, several, with `|`
            between them, tried in turn.
        distribution: The library.
        since: The oldest release that is known to have it, as used here.
        why: What it is for.
        is_patched: Whether it is replaced while in use, and put back.
    """

    place: str
    distribution: str
    since: str
    why: str
    without: Without
    is_patched: bool = False

    @property
    def name(self) -> str:
        """What the rest of the package asks for it by: its last name."""
        return self.place.partition("|")[0].rpartition(":")[2].rpartition(".")[2]


BORROWED = (
    Borrowed(
        "torch:Tensor._version", "torch", "2.13",
        "a fleet's worker sees that PEFT has written into the base that its adapters share", Without.REFUSED,
    ),
    Borrowed(
        "torch.onnx._internal.exporter._fx_passes:decompose_with_registry", "torch", "2.13",
        "the trace decomposes operator by operator instead of tracing the whole again", Without.SLOWER, is_patched=True,
    ),
    Borrowed(
        "torch.onnx._internal.exporter._decomp:get_onnx_implemented_overloads", "torch", "2.13",
        "which operators the exporter has ONNX functions for", Without.SLOWER,
    ),
    Borrowed(
        "torch._dynamo.config:fake_tensor_cache_enabled", "torch", "2.13",
        "the trace computes a shape anew instead of looking it up, which is quicker with symbols in shapes",
        Without.SLOWER, is_patched=True,
    ),
    Borrowed(
        "torch.fx.config:do_not_emit_stack_traces", "torch", "2.13",
        "the trace does not note where in a model's code each operation stands", Without.SLOWER, is_patched=True,
    ),
    Borrowed(
        "torch.utils._python_dispatch:TorchDispatchMode", "torch", "2.13",
        "check records the results of every operation of one module", Without.REFUSED,
    ),
    Borrowed(
        "onnxscript.rewriter._matcher:SimplePatternMatcher.match", "onnxscript", "0.7.2",
        "a pattern's operator is compared first, so that fusing is not quadratic in the layers", Without.SLOWER,
        is_patched=True,
    ),
    Borrowed(
        "onnxscript.rewriter._matcher:SimplePatternMatcher._match_constant", "onnxscript", "0.7.2",
        "what is added to or multiplied by something near 0 or 1 is not dropped", Without.REFUSED, is_patched=True,
    ),
    Borrowed(
        "onnxscript.rewriter._basics:MatchResult", "onnxscript", "0.7.2",
        "what that comparison gives where operators differ", Without.SLOWER,
    ),
    Borrowed(
        "transformers.exporters.exporter_onnx:OnnxExporter", "transformers", "5.23",
        "the trace; the module is new and may move", Without.REFUSED,
    ),
    Borrowed(
        "transformers.exporters.exporter_onnx:OnnxConfig", "transformers", "5.23",
        "the trace's settings", Without.REFUSED,
    ),
    Borrowed(
        "transformers.exporters.onnxruntime_fusions:fuse_for_onnxruntime", "transformers", "5.23",
        "fusions into ONNX Runtime's operators; the module is new and may move", Without.REFUSED,
    ),
    Borrowed(
        "transformers.exporters.onnxruntime_fusions:_unfuse_mixed_dtype_skip_norms", "transformers", "5.23",
        "taken again after the last fusion: T5 in float16, whose residual is float32", Without.REFUSED,
    ),
    Borrowed(
        "transformers.core_model_loading:rename_source_key", "transformers", "5.23",
        "how stored names become a model's", Without.REFUSED,
    ),
    Borrowed(
        "transformers.core_model_loading:dot_natural_key", "transformers", "5.23",
        "the order in which Transformers converts tensors", Without.REFUSED,
    ),
    Borrowed(
        "transformers.core_model_loading:WeightConverter", "transformers", "5.23",
        "how stored tensors become a model's parameters", Without.REFUSED,
    ),
    Borrowed(
        "transformers.core_model_loading:WeightRenaming", "transformers", "5.23",
        "renamings among these", Without.REFUSED,
    ),
    Borrowed(
        "transformers.conversion_mapping:get_model_conversion_mapping", "transformers", "5.23",
        "which of these a model has", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_utils:PreTrainedModel._from_config", "transformers", "5.23",
        "builds a class that is no auto class (CLIP's encoders with a projection) from its config", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_utils:PreTrainedModel._keep_in_fp32_modules", "transformers", "5.23",
        "what stays in float32 when a model is loaded in float16", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_utils:PreTrainedModel._init_weights", "transformers", "5.23",
        "computes what a checkpoint may lack (sinusoidal positions)", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_utils:PreTrainedModel._keys_to_ignore_on_load_missing", "transformers", "5.23",
        "which tensors a checkpoint may lack", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_utils:PreTrainedModel._is_stateful", "transformers", "5.23",
        "tells a decoder with a state beside keys and values", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_utils:PreTrainedModel._can_set_experts_implementation", "transformers", "5.23",
        "tells a mixture, whose grouped product has no shape in float32", Without.REFUSED,
    ),
    Borrowed(
        "torch._subclasses.fake_tensor:FakeTensorMode", "torch", "2.13",
        "the shapes of a decoder's cache, by a run of shapes alone", Without.REFUSED,
    ),
    Borrowed(
        "torch.fx.experimental.symbolic_shapes:ShapeEnv", "torch", "2.13",
        "lets that run meet sizes that depend on numbers (mixtures)", Without.REFUSED,
    ),
    Borrowed(
        "transformers.configuration_utils:PretrainedConfig._attn_implementation", "transformers", "5.23",
        "put back after check has looked into an attention", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_gguf_pytorch_utils:TENSOR_PROCESSORS", "transformers", "5.23",
        "what undoes llama.cpp's layout of a GGUF file's weights, by architecture", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_gguf_pytorch_utils:TensorProcessor", "transformers", "5.23",
        "the same for the others", Without.REFUSED,
    ),
    Borrowed(
        "transformers.integrations.ggml:GGUF_CONFIG_MAPPING", "transformers", "5.23",
        "which keys of a GGUF file are read into a config", Without.REFUSED,
    ),
    Borrowed(
        "transformers.modeling_gguf_pytorch_utils:get_gguf_hf_weights_map", "transformers", "5.23",
        "which parameters a GGUF file's tensors are", Without.REFUSED,
    ),
    Borrowed(
        "peft.tuners.lora.conversion:_convert_module_to_lora", "peft", "0.21",
        "one layer of another tuner as the nearest pair, computed as PEFT does", Without.REFUSED,
    ),
    Borrowed(
        "peft.utils.transformers_weight_conversion:convert_peft_adapter_state_dict_for_transformers", "peft", "0.21",
        "how the keys of an adapter's file become those of PEFT's layers", Without.REFUSED,
    ),
    Borrowed(
        "peft.utils.other:get_pattern_key", "peft", "0.21",
        "which pattern of ranks and alphas a module takes", Without.REFUSED,
    ),
    Borrowed(
        "onnxruntime.capi._pybind_state:quantize_matmul_4bits", "onnxruntime", "1.30",
        "ONNX Runtime's own rounding of weights to 4 bits", Without.REFUSED,
    ),
    Borrowed(
        "onnxruntime.capi._pybind_state:quantize_matmul_8bits", "onnxruntime", "1.30",
        "the same, to 8 bits", Without.REFUSED,
    ),
    Borrowed(
        "onnxruntime.quantization.neural_compressor.weight_only:quant_tensor_k_quant_cpu", "onnxruntime", "1.30",
        "ONNX Runtime's own k-quant of one weight", Without.REFUSED,
    ),
    Borrowed(
        "onnxruntime.quantization.matmul_nbits_quantizer:HQQWeightOnlyQuantizer", "onnxruntime", "1.30",
        "ONNX Runtime's own HQQ of one weight; its module sets up Python's logging, which is put back", Without.REFUSED,
    ),
)  # fmt: skip
# torch.isfinite is public and replaced for the trace of encoder-decoders (base.seq2seq); tensors are marked with
# Transformers' `_is_hf_initialized`, without which weightless parameters would be initialized (base.weightless).

_BY_NAME = {entry.name: entry for entry in BORROWED}


def version_of(distribution: str) -> str:
    """The installed version; ONNX Runtime's with CUDA has another name."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{distribution}-gpu")


def borrow(name: str) -> object:
    """The symbol `name`, an entry of the table.

    Raises:
        EnvironmentUnusable: It is not there; the message names versions.
    """
    found = _find(name)
    if found is _MISSING:
        entry = _BY_NAME[name]
        raise EnvironmentUnusable(
            f"This release of {entry.distribution} lacks something that lora-export uses: {entry.why}",
            where=f"{entry.distribution} {version_of(entry.distribution)}",
            expected=f"{entry.place.replace(':', '.')}, as release {entry.since} has it",
            next_step="install a release that was tested: see `dependencies` in pyproject.toml",
        )
    return found


def borrow_if_there(name: str) -> object | None:
    """The symbol `name`, an entry of the table; None where this release has none."""
    found = _find(name)
    return None if found is _MISSING else found


@contextlib.contextmanager
def replaced(name: str, replacement: object) -> Iterator[None]:
    """While open, `replacement` stands in the module or class of the symbol `name`, which is there."""
    original = borrow(name)
    places = map(_owner_of, _BY_NAME[name].place.split("|"))
    owner, attribute = next((each, own) for each, own in places if getattr(each, own, None) is original)
    setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


_MISSING = object()


def _owner_of(place: str) -> tuple[object | None, str]:
    """The module, or the class in it, that has the symbol at `place`, and the symbol's name there."""
    module, _, path = place.partition(":")
    *owners, attribute = path.split(".")
    try:
        found: object = importlib.import_module(module)
    except ImportError:
        return None, attribute
    for each in owners:
        found = getattr(found, each, None)
    return found, attribute


def _find(name: str) -> object:
    for owner, attribute in map(_owner_of, _BY_NAME[name].place.split("|")):
        found = getattr(owner, attribute, _MISSING)
        if found is not _MISSING:
            return found
    return _MISSING


def untested() -> Iterator[str]:
    """A sentence for each installed library that is newer or older than what the tests were run with."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("lora-export") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield f"untested: {requirement.name} {installed}; tested with {requirement.specifier}"
