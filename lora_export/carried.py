"""What a host needs beside the graph: tokenizer, processor, generation settings and licences, of base and adapters.

A trainer that adds tokens or a chat template saves the tokenizer beside its adapter. A merged export takes it in place
of the base's. A dynamic export does so if all of its adapters bring the same; else the base's stays, and each adapter
that brings another has it in `adapters/<name>/`. Files are taken a group at a time: parts of two tokenizers make none.
A tokenizer that has tokens without a row in the model is not taken.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from lora_export.artifact import ADAPTERS, sha256_of
from lora_export.errors import InputRefused, some_of
from lora_export.reading import json_of

_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_GROUPS = {
    "tokenizer": (
        *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
        "source.spm", "target.spm", "chat_template.jinja",
    ),
    "processor": ("preprocessor_config.json", "processor_config.json"),
    "generation settings": ("generation_config.json",),
}  # fmt: skip
_LICENCE_STEMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
# Of a fast tokenizer, what its last call left behind.
_OF_THE_LAST_CALL = ("padding", "truncation")
_OF_THE_SAVE = ("transformers_version", "_from_model_config", "_name_or_path")
_SAMPLE = "Bind a socket to an address, then listen.\n\n\tdef f(x): return x + 1  # Größe"


@dataclass(frozen=True)
class Carried:
    """Which files an export takes from where.

    Attributes:
        files: The source of each, by its path in the export.
        places: Where the groups lie that an adapter brought, relative to the export ("." or `adapters/<name>`), by the
            adapter's name; one that brought none, or the same as the base, is not in it.
        remarks: What is worth a word of all this.
    """

    files: Mapping[str, Path]
    places: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def carried_files(source: Path) -> list[Path]:
    """The tokenizer, processor, generation and licence files of a base or adapter folder."""
    return [path for path in sorted(source.iterdir()) if path.is_file() and is_carried(path.name)]


def is_carried(name: str) -> bool:
    """Whether a file of this name is one of them."""
    return any(name in group for group in _GROUPS.values()) or _is_licence(Path(name))


def plan_carried(
    base: Path,
    adapters: Mapping[str, Path],
    mode: str,
    *,
    vocabularies: Mapping[str, int | None] = MappingProxyType({}),
    base_stays: bool = False,
) -> Carried:
    """What an export of `mode` ("merge" or "dynamic") takes from the folders of its base and its adapters.

    Args:
        base_stays: Of a dynamic export: the base's files stay also where all adapters bring the same others.
        vocabularies: The number of tokens of each adapter's model, by its name; any number where it is not known.

    Raises:
        InputRefused: Adapters to be merged bring different tokenizers, of which the export can hold one, or an adapter
            was trained with tokens that its model has no rows for.
    """
    files = {path.name: path for path in carried_files(base)}
    places: dict[str, str] = {}
    remarks: list[str] = []
    for kind in _GROUPS:
        brought = _brought_by(kind, base, adapters, vocabularies=vocabularies, remarks=remarks)
        first = next(iter(brought), None)
        one_for_all = all(_equal(kind, adapters[name], adapters[first]) for name in brought)
        if brought and mode == "merge" and not one_for_all:
            raise InputRefused(
                f"The adapters were trained with different files of their own ({kind}); a merged export holds one",
                where=", ".join(str(adapters[name]) for name in brought),
                next_step="leave in one of the folders only what the merged model is to use, or serve them with "
                "`lora-export dynamic`",
            )
        in_all = len(brought) == len(adapters) and not base_stays
        if brought and one_for_all and (mode == "merge" or in_all):
            files = {name: path for name, path in files.items() if name not in _replaced(kind, brought[first])}
            files |= brought[first]
            places |= {name: places.get(name, ".") for name in brought}
            remarks.append(f"the export has the {kind} of {_named(brought)} in place of the base's")
        else:
            for name, found in brought.items():
                files |= {f"{ADAPTERS}/{name}/{file}": path for file, path in found.items()}
                places[name] = f"{ADAPTERS}/{name}"
                remarks.append(f"adapter {name!r} keeps its own {kind}, other than the base's, in {places[name]}/")
    return Carried(files | _licences(adapters), places, tuple(remarks))


def plan_added(
    export: Path, adapters: Mapping[str, Path], vocabularies: Mapping[str, int | None] = MappingProxyType({})
) -> Carried:
    """What adapters that are added to the dynamic `export` bring: licences, and what is other than the export's.

    Raises:
        InputRefused: An adapter was trained with tokens that the model has no rows for.
    """
    files: dict[str, Path] = {}
    remarks: list[str] = []
    for kind in _GROUPS:
        for name, found in _brought_by(kind, export, adapters, vocabularies=vocabularies, remarks=remarks).items():
            files |= {f"{ADAPTERS}/{name}/{file}": path for file, path in found.items()}
            remarks.append(f"adapter {name!r} keeps its own {kind}, other than the export's, in {ADAPTERS}/{name}/")
    own = dict.fromkeys(name for name in adapters if any(file.startswith(f"{ADAPTERS}/{name}/") for file in files))
    return Carried(files | _licences(adapters), {name: f"{ADAPTERS}/{name}" for name in own}, tuple(remarks))


def padding_token(folder: Path) -> int | None:
    """The padding token of the tokenizer in `folder`; None if there is none."""
    files = _files("tokenizer", folder)
    found = _behaviour(folder, _stamp(files)) if _is_whole("tokenizer", files) else None
    return found and found["vocabulary"].get(found["special"].get("pad_token"))


def copy_carried(carried: Carried, folder: Path) -> dict[str, str]:
    """Copy the files into `folder`; sha256 by path in it."""
    for target, source in carried.files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / target)
    return {target: sha256_of(folder / target) for target in carried.files}


def _is_licence(path: Path) -> bool:
    return path.name.upper().startswith(_LICENCE_STEMS)


def _licences(adapters: Mapping[str, Path]) -> dict[str, Path]:
    found = [(name, path) for name, folder in adapters.items() for path in carried_files(folder) if _is_licence(path)]
    return {f"{path.stem}.{name}{path.suffix}": path for name, path in found}


def licensed_adapter(file: str, names: Sequence[str]) -> str | None:
    """Which of the adapters `names` a licence file of an export is of, by its name (`LICENSE.<adapter>.md`)."""
    _, _, rest = file.partition(".")
    of = [name for name in names if rest == name or rest.startswith(f"{name}.")]
    return max(of, key=len, default=None) if "/" not in file and _is_licence(Path(file)) else None


def _files(kind: str, folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in _GROUPS[kind] if (folder / name).is_file()}


def _is_whole(kind: str, names: Mapping[str, Path]) -> bool:
    """Whether these files stand alone; a chat template alone goes with the base's tokenizer."""
    return kind != "tokenizer" or any(name in _VOCABULARIES for name in names)


def _replaced(kind: str, brought: Mapping[str, Path]) -> tuple[str, ...]:
    """The base's files that `brought` stand in for."""
    return _GROUPS[kind] if _is_whole(kind, brought) else tuple(brought)


def _named(names: Iterable[str]) -> str:
    return ", ".join(f"adapter {name!r}" for name in names)


def _brought_by(
    kind: str,
    base: Path,
    adapters: Mapping[str, Path],
    *,
    vocabularies: Mapping[str, int | None],
    remarks: list[str],
) -> dict[str, dict[str, Path]]:
    """What each adapter brings of a group, by its name; why a tokenizer is left out is added to `remarks`."""
    found = {}
    for name, folder in adapters.items():
        brought = _brought(kind, base, folder)
        if brought and kind == "tokenizer" and not _fits(name, folder, brought, n_tokens=vocabularies.get(name)):
            remarks.append(
                f"the tokenizer of adapter {name!r} pads with a token that the model has no row for: the base's is used"
            )
        elif brought:
            found[name] = brought
    return found


def _brought(kind: str, base: Path, adapter: Path) -> dict[str, Path]:
    """The files of a group that `adapter` has and that do something else than those of `base`; whole, or none."""
    own = _files(kind, adapter)
    if not own or _equal(kind, base, adapter):
        return {}
    return own


def _fits(name: str, folder: Path, brought: Mapping[str, Path], *, n_tokens: int | None) -> bool:
    """Whether the model has a row for every token of the tokenizer in `folder`, its padding token aside.

    Raises:
        InputRefused: Other tokens have none.
    """
    behaviour = _behaviour(folder, _stamp(brought)) if _is_whole("tokenizer", brought) else None
    if behaviour is None or n_tokens is None:
        return True
    beyond = {token: index for token, index in behaviour["vocabulary"].items() if index >= n_tokens}
    if set(beyond) - {behaviour["special"].get("pad_token")}:
        in_order = sorted(beyond.items(), key=lambda item: item[1])
        raise InputRefused(
            f"The tokenizer of adapter {name!r} has tokens that the model has no rows for",
            where=str(folder),
            expected=f"ids below {n_tokens}, the model's vocabulary with this adapter",
            found=some_of([f"{token!r} ({index})" for token, index in in_order], 4),
            next_step="save the adapter with the embedding that was trained (save_embedding_layers=True); if it was "
            "trained without these tokens, take the tokenizer's files out of its folder",
        )
    return not beyond


def _equal(kind: str, one: Path, other: Path) -> bool:
    """Whether the group of folder `other` does what that of `one` does, or lacks what it does not name."""
    files, others = _files(kind, one), _files(kind, other)
    if others.keys() <= files.keys() and all(_content(path) == _content(files[name]) for name, path in others.items()):
        return True
    if kind != "tokenizer" or not (_is_whole(kind, files) and _is_whole(kind, others)):
        return False
    behaviour = _behaviour(one, _stamp(files))
    return behaviour is not None and behaviour == _behaviour(other, _stamp(others))


def _stamp(files: Mapping[str, Path]) -> tuple[tuple[str, int, int], ...]:
    """What tells files from the same ones written anew."""
    states = {name: path.stat() for name, path in files.items()}
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states.items())


def _content(path: Path) -> object:
    """What a file says: of JSON its values, but for those that tell which release saved it."""
    if path.suffix == ".json":
        try:
            fields = json_of(path.read_text(encoding="utf-8"))
        except ValueError:
            return path.read_bytes()
        is_object = isinstance(fields, dict)
        return {key: fields[key] for key in fields if key not in _OF_THE_SAVE} if is_object else fields
    return path.read_bytes()


@functools.lru_cache(maxsize=2)  # the base's, which every adapter's is compared with, stays beside one of them
def _behaviour(folder: Path, stamp: tuple) -> dict | None:
    """All that decides what a tokenizer makes of a text; None if Transformers cannot load it from this folder alone."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    fields = {} if backend is None else json.loads(backend.to_str())
    return {
        "vocabulary": tokenizer.get_vocab(),
        "added": {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()},
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "backend": {key: value for key, value in fields.items() if key not in _OF_THE_LAST_CALL},
        "sample": tokenizer(_SAMPLE)["input_ids"],
    }
