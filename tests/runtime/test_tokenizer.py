"""The tokenizer and the chat template of an export, against Transformers' own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from tokenizers import processors

from lora_export import carried
from lora_export.errors import EnvironmentUnusable, InputRefused, UsageProblem
from lora_export.runtime import chat_template
from lora_export.runtime.tokenizer import TOKENIZER_FILES, open_tokenizer

TEXT = "def f(x):\n    return Größe + 語  # 🙂"
CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)
LOOPS = (
    "{%- for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}{% endif %}\n{{ m | tojson }}\n"
    "  {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}\n{%- endfor %}"
    "{{ tools is none }}{{ namespace(n=1).n }}{{ dict(a=1) }}"
)
MESSAGES = [
    {"role": "system", "content": "be <brief>"},
    {"role": "user", "content": " Größe? "},
    {"role": "assistant", "content": "1", "name": None},
]


@pytest.fixture
def folder(bases, own) -> Path:
    copy = own(bases["llama"])
    change(copy, bos_token="[CLS]", eos_token="[SEP]")
    return copy


def change(folder: Path, **fields: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_texts_are_those_of_transformers(folder):
    found, expected = open_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = expected(TEXT)["input_ids"]
    assert found.encode(TEXT) == ids and len(ids) > 20
    assert found.decode([1, *ids, 2]) == expected.decode([1, *ids, 2], skip_special_tokens=True) == TEXT
    assert found.eos_id == expected.eos_token_id == 2


@pytest.mark.parametrize("explicit", [{"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": False}, {}])
def test_what_begins_a_text_is_that_of_transformers(explicit, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="[SEP] $A", special_tokens=[("[SEP]", 2)]
    )
    tokenizer.save_pretrained(folder)
    change(folder, **explicit)
    expected = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert open_tokenizer(folder).encode(TEXT) == expected


def test_a_prompt_is_not_ended(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 2)]
    )
    tokenizer.save_pretrained(folder)
    assert tokenizer("ab")["input_ids"] == [*open_tokenizer(folder).encode("ab"), 2]


@pytest.mark.parametrize("template", [CHATML, LOOPS], ids=["chatml", "loops"])
@pytest.mark.parametrize("place", ["file", "configuration"])
def test_a_chat_is_that_of_transformers(template, place, folder):
    if place == "file":
        (folder / "chat_template.jinja").write_text(template)
    else:
        change(folder, chat_template=template)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    found = open_tokenizer(folder)
    text = expected.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert found.chat_text(MESSAGES) == text and "Größe" in text
    assert found.encode_chat(MESSAGES) == expected(text, add_special_tokens=False)["input_ids"]


def test_a_template_s_own_refusal_is_said(folder):
    change(folder, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageProblem, match="The chat template refuses these messages") as refused:
        open_tokenizer(folder).encode_chat(MESSAGES)
    assert refused.value.found == "roles must alternate"


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for %}"],
    ids=["class", "change", "syntax"],
)
def test_a_template_stays_in_its_sandbox(template, folder):
    change(folder, chat_template=template)
    with pytest.raises(InputRefused, match="The chat template cannot be used"):
        open_tokenizer(folder).encode_chat(MESSAGES)


def test_without_a_template_or_a_tokenizer_that_is_said(folder):
    with pytest.raises(UsageProblem, match="The export has no chat template"):
        open_tokenizer(folder).encode_chat(MESSAGES)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputRefused, match="The tokenizer cannot be read"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputRefused, match="The export has no tokenizer"):
        open_tokenizer(folder)


def test_packages_that_are_missing_are_named(folder, monkeypatch):
    change(folder, chat_template=CHATML)
    tokenizer = open_tokenizer(folder)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.ext", None)
    with pytest.raises(EnvironmentUnusable, match="needs jinja2"):
        tokenizer.encode_chat(MESSAGES)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(EnvironmentUnusable, match="need the package `tokenizers`"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentUnusable, match="it needs Transformers"):
        open_tokenizer(folder)


def test_an_old_jinja_is_refused(folder, monkeypatch):
    import jinja2

    change(folder, chat_template=CHATML)
    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(EnvironmentUnusable, match="known ways out"):
        open_tokenizer(folder).encode_chat(MESSAGES)


def test_a_chat_is_read_without_transformers(folder):
    change(folder, chat_template=CHATML)
    code = (
        "import sys; from pathlib import Path; from lora_export.runtime.tokenizer import open_tokenizer\n"
        f"open_tokenizer(Path({str(folder)!r})).encode_chat([{{'role': 'user', 'content': 'a'}}])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_template_by_name(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert chat_template.read_template(tmp_path, {"chat_template": named}) == "d"
    assert chat_template.read_template(tmp_path, {}) is None


def test_the_files_of_a_tokenizer_are_those_that_an_export_carries():
    assert set(TOKENIZER_FILES) == set(carried._GROUPS["tokenizer"])


def test_a_place_with_a_template_alone_goes_with_the_export_s_tokenizer(folder, tmp_path):
    """And one with a vocabulary goes with nothing of the export's."""
    place = tmp_path / "place"
    place.mkdir()
    change(folder, chat_template="export")
    assert open_tokenizer(place, folder).chat_template == "export"
    (place / "chat_template.jinja").write_text("own")
    found, export = open_tokenizer(place, folder), open_tokenizer(folder)
    assert (found.encode(TEXT), found.eos_id, found.chat_template) == (export.encode(TEXT), export.eos_id, "own")
    assert export.chat_template == "export" and export.eos_id is not None
    (place / "chat_template.jinja").unlink()
    (place / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    own = open_tokenizer(place, folder)
    assert (own.eos_id, own.chat_template) == (None, None)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2,000,000 lines"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ 9 ** 9999999 }}", "more than 10,000,000"),
        ("{{ 'x' * 10 ** 9 }}", "more than 10,000,000"),
        ("{{ '%999999999d' % 1 }}", "more than 10,000,000"),
        ("{{ 'x'|center(10 ** 9) }}", "asks for 1,000,000,000"),
        ("{{ 'x'.ljust(width=10 ** 9) if false else 'x'.ljust(10 ** 9) }}", "asks for 1,000,000,000"),
        (
            "{% set n = namespace(x='xxxxxxxxxx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "keeps",
        ),
        ("{{ lipsum(99) }}", "'lipsum' is undefined"),
    ],
)
def test_a_template_without_end_is_refused_soon(template, found, folder):
    change(folder, chat_template=template)
    began, tracer = time.monotonic(), sys.gettrace()
    with pytest.raises(InputRefused if "lipsum" not in template else UsageProblem) as refused:
        open_tokenizer(folder).encode_chat(MESSAGES)
    assert found in refused.value.found and time.monotonic() - began < 10 and sys.gettrace() is tracer


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ 'x'|int(base=99) + 'x' }}", "{{ nothing.at.all }}"])
def test_what_a_template_raises_is_a_refusal(template, folder):
    change(folder, chat_template=template)
    with pytest.raises(UsageProblem, match="The chat template refuses these messages"):
        open_tokenizer(folder).encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"eos_token": {"x": 1}}, "eos_token"),
        ({"bos_token": [1]}, "bos_token"),
        ({"chat_template": 3}, "tokenizer_config"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(fields, where, folder):
    change(folder, **fields)
    with pytest.raises(InputRefused) as refused:
        open_tokenizer(folder)
    assert where in refused.value.where
