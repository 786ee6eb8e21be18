"""An adapter as the named tensors of a dynamic graph, and as a file that ONNX Runtime's own `LoraAdapter` loads.

`choose_sites` says which inputs adapters need, `pack` what one of them feeds to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lora_export.adapters.factors import Adapter, LoraFactors, TokenRows, dora_gain, fold, fold_dora, served_pair
from lora_export.contract import AdapterInput, AdapterInputKind, GraphContract, KindSpec, spec_of
from lora_export.errors import EnvironmentUnusable, InputRefused, some_of
from lora_export.site_choice import SiteChoice

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16
_PAIR = frozenset({AdapterInputKind.LORA_A, AdapterInputKind.LORA_B})
_WEIGHT, _BIAS = spec_of(AdapterInputKind.WEIGHT), spec_of(AdapterInputKind.BIAS)


def choose_sites(adapters: Sequence[Adapter], targets: Sequence[str] = ()) -> SiteChoice:
    """The union of what `adapters` touch, with `targets` added; a module replaced by one adapter takes no pair."""
    replaced = dict.fromkeys(module for adapter in adapters for module in adapter.replaced_modules)
    pairs = [pair for adapter in adapters for pair in adapter.lora.values() if pair.module not in replaced]
    biases = [module for adapter in adapters for module in _modules_of(_BIAS, adapter.replaced)]
    convolutions = [pair for adapter in adapters for pair in adapter.convolutions.values()]
    biases += [pair.module for pair in (*pairs, *convolutions) if pair.bias is not None]
    gated = [pair for adapter in adapters if adapter.invocation_tokens for pair in adapter.lora.values()]
    return SiteChoice(
        lora_modules=_unique([*(pair.module for pair in pairs), *(t for t in targets if t not in replaced)]),
        replaced_modules=tuple(replaced),
        gain_modules=_unique(pair.module for pair in pairs if pair.magnitude is not None),
        bias_modules=_unique(module for module in biases if module not in replaced),
        embedding_modules=_unique(module for adapter in adapters for module in adapter.embeddings),
        convolution_modules=_unique(pair.module for pair in convolutions),
        gate_modules=_unique(pair.module for pair in gated if pair.module not in replaced),
        token_modules=_unique(module for adapter in adapters for module in _modules_of(_WEIGHT, adapter.token_rows)),
    )


def _modules_of(spec: KindSpec, paths: Iterable[str]) -> list[str]:
    """The modules that have those of `paths` that are the parameter of `spec`."""
    return [path.removesuffix(f".{spec.suffix}") for path in paths if path.endswith(f".{spec.suffix}")]


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def pack(
    adapter: Adapter,
    contract: GraphContract,
    base_weight: Callable[[str], torch.Tensor],
    *,
    elsewhere: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The tensors `adapter` feeds to a graph of `contract`, by input name, sorted; absent inputs keep their default.

    1. A pair on a module with LoRA inputs: `[1, in, rank]` and `[1, rank, out]`, scale folded in; DoRA's gain
       `[1, 1, out]`. Where modules share a pair: `[1, in, Σ rank]`, and `[1, Σ rank, Σ out]`, block-diagonal.
    2. A replaced Linear: weight `[1, in, out]`, bias `[1, 1, out]`.
    3. A pair on a module that the graph takes as a whole (another adapter replaces it): folded into the base's.
    4. A bias, trained or added to: `[1, 1, out]`.
    5. A pair on an embedding: `[1, vocabulary, rank]` and `[1, rank, dim]`.
    6. A pair on a convolution: `[1, in·∏kernel, rank]` and `[1, rank, out]`.
    7. Changed tokens: ids `[1, n]`, and their rows less the base's, `[1, n, dim]`.

    Args:
        base_weight: Reads a parameter of the base by path.
        elsewhere: Modules that another graph of the export takes, and this one need not.

    Raises:
        InputRefused: The adapter needs modules that the graph has no inputs for; all are named.
    """
    packer = _Packer(contract, base_weight, adapter.replaced)
    for pair in adapter.lora.values():
        packer.add_linear(pair)
    for module in adapter.replaced_modules:
        packer.put(module, AdapterInputKind.WEIGHT, adapter.replaced[_WEIGHT.name(module)].float().T)
    added_to = {module for module, pair in adapter.pairs.items() if pair.bias is not None}
    for module in _modules_of(_BIAS, adapter.replaced):
        if module not in added_to:
            packer.put(module, AdapterInputKind.BIAS, adapter.replaced[_BIAS.name(module)].float().reshape(1, -1))
    for pair in (*adapter.embeddings.values(), *adapter.convolutions.values()):
        packer.add_pair(pair, gain=None)
        packer.add_bias(pair)
    for module in _modules_of(_WEIGHT, adapter.token_rows):
        packer.add_tokens(module, adapter.token_rows[_WEIGHT.name(module)])
    packer.put_packed()
    missing = {module: kinds for module, kinds in packer.missing.items() if module not in elsewhere}
    if missing:
        takes_pairs = all(kinds <= _PAIR and module in adapter.lora for module, kinds in missing.items())
        or_targets = ", or name its modules with --targets (all-linear for all)" if takes_pairs else ""
        raise InputRefused(
            f"Adapter {adapter.name!r} needs modules that the graph has no inputs for",
            where=some_of(list(missing), 6),
            expected=f"one of the {len(contract.modules)} modules that the graph serves, in the same way",
            next_step=f"export again with `lora-export dynamic`: list this adapter among the others{or_targets}",
        )
    return dict(sorted(packer.tensors.items()))


class _Packer:
    """Collects tensors by input name, and the modules and kinds that the graph has no input for."""

    def __init__(
        self,
        contract: GraphContract,
        base_weight: Callable[[str], torch.Tensor],
        replaced: Mapping[str, torch.Tensor],
    ) -> None:
        self._contract, self._base_weight, self._replaced = contract, base_weight, replaced
        self.tensors: dict[str, torch.Tensor] = {}
        self.missing: dict[str, set[AdapterInputKind]] = {}
        self._parts: dict[AdapterInput, dict[str, torch.Tensor]] = {}

    def put(self, module: str, kind: AdapterInputKind, tensor: torch.Tensor) -> None:
        """Give the module's input of `kind` the value `tensor`, without its axis of rows."""
        entry = self._contract.of_module(module).get(kind)
        if entry is None:
            self.missing.setdefault(module, set()).add(kind)
        elif entry.parts:
            self._parts.setdefault(entry, {})[module] = tensor
        else:
            self._put(entry, tensor)

    def _put(self, entry: AdapterInput, tensor: torch.Tensor) -> None:
        self.tensors[entry.name] = tensor.unsqueeze(0).to(_TORCH_DTYPES[entry.dtype]).contiguous()

    def put_packed(self) -> None:
        """Give the inputs that several modules share what was put for them: A side by side, B block-diagonal."""
        for entry, tensors in self._parts.items():
            modules = [part.module for part in entry.parts if part.module in tensors]
            if entry.kind is AdapterInputKind.LORA_A:
                self._put(entry, torch.cat([tensors[module] for module in modules], dim=1))
                continue
            whole = torch.zeros(sum(len(each) for each in tensors.values()), sum(n.out_features for n in entry.parts))
            row = column = 0
            for part in entry.parts:
                if part.module in tensors:
                    block = tensors[part.module]
                    whole[row : row + len(block), column : column + part.out_features] = block
                    row += len(block)
                column += part.out_features
            self._put(entry, whole)

    def add_linear(self, pair: LoraFactors) -> None:
        inputs = self._contract.of_module(pair.module)
        if AdapterInputKind.WEIGHT in inputs:
            weight = self._base_weight(_WEIGHT.name(pair.module))
            folded = fold(weight, [pair], torch.float32) if pair.magnitude is None else fold_dora(weight, pair)
            self.put(pair.module, AdapterInputKind.WEIGHT, folded if pair.weight_is_in_out else folded.T)
        else:
            is_dora = pair.magnitude is not None
            self.add_pair(pair, dora_gain(self._base_weight(_WEIGHT.name(pair.module)), pair) if is_dora else None)
        self.add_bias(pair)

    def add_bias(self, pair: LoraFactors) -> None:
        if pair.bias is None:
            return
        added = pair.scale * pair.bias.float()
        path, entry = _BIAS.name(pair.module), self._contract.of_module(pair.module).get(AdapterInputKind.BIAS)
        if path in self._replaced:  # trained as well
            added = added + self._replaced[path].float()
        elif entry is not None and entry.base_has_default:
            added = added + self._base_weight(path).float()
        self.put(pair.module, AdapterInputKind.BIAS, added.reshape(1, -1))

    def add_pair(self, pair: LoraFactors, gain: torch.Tensor | None) -> None:
        a, b = served_pair(pair, gain)
        self.put(pair.module, AdapterInputKind.LORA_A, a)
        self.put(pair.module, AdapterInputKind.LORA_B, b)
        if gain is not None:
            self.put(pair.module, AdapterInputKind.GAIN, gain.reshape(1, -1))

    def add_tokens(self, module: str, rows: TokenRows) -> None:
        base = self._base_weight(_WEIGHT.name(module))[rows.indices]
        self.put(module, AdapterInputKind.TOKEN_IDS, rows.indices)
        self.put(module, AdapterInputKind.TOKEN_DELTA, rows.rows.float() - base.float())


def write_onnx_adapter(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as an `.onnx_adapter` file (ONNX Runtime's flatbuffer format, version 1).

    Raises:
        EnvironmentUnusable: The disk is full or broken; ONNX Runtime does not say which.
    """
    import onnxruntime as ort

    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: _ort_value(tensor) for name, tensor in tensors.items()})
    try:
        adapter.export_adapter(str(path))
    except Exception as error:
        said = str(error)
        if (start := max(map(said.find, ("Failed to open file", "Failed to write")))) < 0:
            raise
        raise EnvironmentUnusable(
            "The adapter's file could not be written; nothing was published",
            where=str(path),
            found=said[start:],
            next_step="free some space, or name another folder, and run again",
        ) from error


def _ort_value(tensor: torch.Tensor):
    import onnxruntime as ort

    if tensor.dtype is torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
