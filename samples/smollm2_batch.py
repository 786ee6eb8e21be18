"""One batch on the export of SmolLM2: the base in its first row, another adapter in each of the others."""

from __future__ import annotations

import sys
from pathlib import Path

from common import print_table
from smollm2 import NEW_TOKENS, PROMPTS
from transformers import AutoTokenizer

from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import generate


def main() -> None:
    """Generate with the export in the folder that the command line names, and print each row."""
    folder = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [(None, PROMPTS["describe"][0]), *((name, prompts[0]) for name, prompts in PROMPTS.items())]
    tokens = generate(
        AdapterSession(folder),
        [tokenizer(prompt)["input_ids"] for _, prompt in rows],
        [adapter for adapter, _ in rows],
        max_new_tokens=NEW_TOKENS,
        eos_ids=frozenset({tokenizer.eos_token_id}),
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    written = [(str(adapter), prompt, repr(text)) for (adapter, prompt), text in zip(rows, texts, strict=True)]
    print_table(("adapter", "prompt", "goes on"), written)


if __name__ == "__main__":
    main()
