"""`SiteChoice`: which modules of a base get adapter inputs in a graph, and of which kinds."""

from __future__ import annotations

from dataclasses import dataclass

from lora_export.contract import AdapterInputKind, spec_of


@dataclass(frozen=True)
class SiteChoice:
    """The modules that a graph gives adapter inputs, by what adapters bring there."""

    lora_modules: tuple[str, ...] = ()  # Linear modules with a pair
    replaced_modules: tuple[str, ...] = ()  # Linear modules replaced as a whole
    gain_modules: tuple[str, ...] = ()  # those of lora_modules with DoRA's gain
    bias_modules: tuple[str, ...] = ()  # modules whose bias is an input, replaced ones not counted
    embedding_modules: tuple[str, ...] = ()  # embeddings with a pair
    token_modules: tuple[str, ...] = ()  # embeddings with changed tokens
    convolution_modules: tuple[str, ...] = ()  # convolutions with a pair
    gate_modules: tuple[str, ...] = ()  # those of lora_modules whose pair may be active for some tokens only

    @property
    def parameters(self) -> frozenset[str]:
        """The base's parameters that inputs take the place of, by path."""
        weight, bias = spec_of(AdapterInputKind.WEIGHT), spec_of(AdapterInputKind.BIAS)
        biases = (*self.replaced_modules, *self.bias_modules)
        return frozenset([*map(weight.name, self.replaced_modules), *map(bias.name, biases)])
