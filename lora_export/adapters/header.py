"""Rank and scale that stand in a safetensors file's header, beside the tensors.

diffusers and trainers after it write `lora_adapter_metadata`: a JSON object of `LoraConfig`'s options, each under its
own name or, where a file adapts several models, under `<component>.<name>` (`text_encoder.lora_alpha`). kohya's
sd-scripts write `ss_network_dim` and `ss_network_alpha`. Sources: diffusers, `loaders/lora_base.py`
(`LORA_ADAPTER_METADATA_KEY`); sd-scripts, `train_network.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.adapters.support import options_in_use
from lora_export.compat import borrow
from lora_export.errors import InputRefused
from lora_export.reading import json_of

KEY = "lora_adapter_metadata"
# What is read here, or says only which modules have a pair, which the tensors tell.
_READ = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_modules",
     "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
)  # fmt: skip
_PATTERNS = ("rank_pattern", "alpha_pattern")
_COMPARED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "init_lora_weights")


@dataclass(frozen=True)
class HeaderOptions:
    """What a file's header says of its pairs.

    Attributes:
        components: Options of `LoraConfig` by the component that they are for; "" for those of no component.
        kohya: (rank, alpha), as written, of the pairs that have no alpha of their own; None if the header names none.
    """

    file: Path
    components: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    kohya: tuple[str, str] | None = None

    @classmethod
    def of(cls, file: Path, metadata: Mapping[str, str]) -> HeaderOptions:
        """Read the header's `metadata` of `file`.

        Raises:
            InputRefused: The options are no JSON object.
        """
        return cls(file, _components(file, metadata), _kohya(metadata))

    def require_enough(self) -> None:
        """Refuse a header that asks for more than ranks and scales, where no `adapter_config.json` says it.

        Raises:
            InputRefused: An option is set that is not read from a header; it is named.
        """
        usual = _usual()
        for options in self.components.values():
            set_here = [use for use in options_in_use(dict(options)) if use.value != usual.get(use.option.name)]
            extra = [use for use in set_here if use.option.name not in _READ]
            if extra:
                raise InputRefused(
                    "The file's header sets options that are read from adapter_config.json only",
                    where=f"{self.file}: {KEY}",
                    found=", ".join(f"{use.option.name} = {use.value!r}" for use in extra),
                    next_step="load it in PEFT or diffusers and save it as a PEFT adapter (save_pretrained)",
                )

    def alpha(self, name: str, rank: int, *, has_own: bool) -> float | None:
        """The alpha of the pair `name` of `rank`, of which alpha / rank is its scale; None if the header is silent.

        Args:
            has_own: Whether the file stores an alpha for the pair. kohya's header then does not speak of it: ranks may
                differ by module, and a resized file's header says "Dynamic".

        Raises:
            InputRefused: The header says another rank, or no number, or nothing of the pair's component.
        """
        if self.components:
            return self._alpha_of_component(name, rank)
        if has_own or self.kohya is None:
            return None
        said, alpha = self.kohya
        self._require_rank(name, rank, _number(self.file, "ss_network_dim", said))
        return _number(self.file, "ss_network_alpha", alpha)

    @property
    def start(self) -> object:
        """`init_lora_weights`, the same for all components; True if none says it.

        Raises:
            InputRefused: Components differ.
        """
        found = {json.dumps(options.get("init_lora_weights", True)) for options in self.components.values()}
        if len(found) > 1:
            self._refuse("init_lora_weights", "one start for all of the file's pairs", ", ".join(sorted(found)))
        return json.loads(found.pop()) if found else True

    def _alpha_of_component(self, name: str, rank: int) -> float | None:
        pattern_of = borrow("get_pattern_key")
        component = max((c for c in self.components if not c or name.startswith(f"{c}.")), key=len, default=None)
        if component is None and len(self.components) == 1:
            component = next(iter(self.components))
        if component is None:
            self._refuse(name, "options of its component", f"options of {', '.join(self.components)}")
        options, module = self.components[component], name.removeprefix(f"{component}.")
        if "lora_alpha" not in options:
            return None
        ranks, alphas = (dict(options.get(key) or {}) for key in _PATTERNS)
        said = ranks.get(pattern_of(list(ranks), module), options.get("r"))
        if said is not None:
            self._require_rank(name, rank, _number(self.file, "r", said))
        alpha = _number(self.file, "lora_alpha", alphas.get(pattern_of(list(alphas), module), options["lora_alpha"]))
        return alpha * math.sqrt(rank) if options.get("use_rslora") else alpha

    def _require_rank(self, name: str, rank: int, said: float) -> None:
        if said != rank:
            self._refuse(
                name,
                "the rank of the header's options and that of the tensors to be the same",
                f"{said:g} in the header, {rank} in the tensors",
            )

    def _refuse(self, name: str, expected: str, found: str) -> None:
        raise InputRefused(
            "The options in the file's header do not fit its tensors",
            where=f"{self.file}: {name}",
            expected=expected,
            found=found,
            next_step="save or fetch the file again; what scale it was trained with cannot be told",
        )

    def require_agreement(self, config: Mapping[str, object]) -> None:
        """Refuse a header whose options are other than those of the `adapter_config.json` beside it, or than PEFT's own
        where that is silent. Of several components, one must have the config's options: the folder is that one's.

        Raises:
            InputRefused: They differ; both are named.
        """
        config = {**_usual(), **config} if self.components else config
        differing = {
            component: [
                name for name in _COMPARED if name in options and (options[name] or None) != (config[name] or None)
            ]
            for component, options in self.components.items()
        }
        if not differing or not all(differing.values()):
            return
        names = dict.fromkeys(name for found in differing.values() for name in found)
        several = len(differing) > 1
        raise InputRefused(
            "The adapter's config and the header of its weights disagree",
            where=f"{self.file}: {KEY}",
            expected=", ".join(f"{name} = {config[name]!r}" for name in names),
            found=", ".join(
                f"{component + '.' if several and component else ''}{name} = {self.components[component][name]!r}"
                for component, found in differing.items()
                for name in found
            ),
            next_step="keep the pair of files that one training saved",
        )


def _usual() -> Mapping[str, object]:
    from peft import LoraConfig

    return vars(LoraConfig())


def _components(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, object]]:
    if KEY not in metadata:
        return {}
    try:
        fields = json_of(metadata[KEY])
    except ValueError as error:
        raise InputRefused("The file's header is not valid JSON", where=f"{file}: {KEY}", found=str(error)) from error
    if not isinstance(fields, dict):
        raise InputRefused("The file's header holds no JSON object", where=f"{file}: {KEY}", found=repr(fields)[:80])
    found: dict[str, dict[str, object]] = {}
    for key, value in fields.items():
        component, _, name = key.rpartition(".")
        if name in _PATTERNS and not isinstance(value, dict | type(None)):
            raise InputRefused(
                "An option in the file's header is not what it should be",
                where=f"{file}: {KEY}: {key}",
                expected="an object of numbers by pattern",
                found=repr(value)[:80],
                next_step="save or fetch the file again",
            )
        found.setdefault(component, {})[name] = value
    return found


def _kohya(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    rank, alpha = metadata.get("ss_network_dim"), metadata.get("ss_network_alpha")
    return None if rank in (None, "None") or alpha in (None, "None") else (rank, alpha)


def _number(file: Path, name: str, value: object) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputRefused("An option in the file's header is no number", where=f"{file}: {name}", found=repr(value))
    return number
