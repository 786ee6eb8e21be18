"""How much is compared: less of a large base, so that a check takes about a minute and bounded memory.

A row costs its tokens times the base's bytes. A language model also gives a score for every entry of its vocabulary at
every token, which are kept several times over in float64. So the built-in rows together, and those of a language
model's file, have at most

    min(2e11 / bytes of the graphs, 2**23 / vocabulary)

tokens, and never fewer than 8 rows of 16. SmolLM2-135M (538 MB in float32, 49,152 entries): 170 tokens, 8 rows of 21. A
base of 91 MB with two classes: 2,197 tokens, so 16 rows of 96, as for any small one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.artifact import Manifest
from lora_export.base.tasks import Task
from lora_export.check.inputs.examples import BUILT_IN_ROWS, MOST_TOKENS, Examples, spread

_MOST_WORK = 2e11
_MOST_SCORES = 2**23
_FEWEST_ROWS, _FEWEST_TOKENS = 8, 16
# A score for every entry of the vocabulary at every token.
_SCORES_BY_TOKEN = (Task.TEXT_GENERATION, Task.FILL_MASK, Task.TEXT2TEXT_GENERATION)


@dataclass(frozen=True)
class Amount:
    """What a check compares.

    Attributes:
        n_rows: Of the built-in texts.
        n_tokens: Most of a row.
        is_bounded: Whether that is less than for a small base.
        is_by_vocabulary: Whether every token has a score for each entry of a vocabulary.
    """

    n_rows: int = BUILT_IN_ROWS
    n_tokens: int = MOST_TOKENS
    is_bounded: bool = False
    is_by_vocabulary: bool = False

    def of_file(self, examples: Examples) -> Examples:
        """As many of a file's rows as fit, spread evenly; all of them where a row has no scores of a vocabulary."""
        rows = examples.rows
        if self.is_bounded and self.is_by_vocabulary and len(rows) > self.n_rows:
            chosen = spread(rows, self.n_rows)
            examples = Examples(chosen, f"{len(chosen)} rows of {examples.description}")
        return self.described(examples)

    def described(self, examples: Examples) -> Examples:
        """`examples`, saying what is cut of them."""
        if not self.is_bounded:
            return examples
        cut = f"{examples.description}, cut to {self.n_tokens} tokens each, as the base is large"
        return replace(examples, description=cut)


def amount_of(folder: Path, manifest: Manifest) -> Amount:
    """What a check of the export in `folder` compares."""
    n_bytes = manifest.weights_bytes(folder)
    by_vocabulary = Task(manifest.task) in _SCORES_BY_TOKEN
    n_tokens = _MOST_WORK / max(n_bytes, 1)
    if by_vocabulary:
        n_tokens = min(n_tokens, _MOST_SCORES / max(_vocabulary(manifest), 1))
    if n_tokens >= BUILT_IN_ROWS * MOST_TOKENS:
        return Amount(is_by_vocabulary=by_vocabulary)
    n_rows = BUILT_IN_ROWS if n_tokens >= BUILT_IN_ROWS * MOST_TOKENS / 3 else _FEWEST_ROWS
    longest = min(MOST_TOKENS, max(_FEWEST_TOKENS, int(n_tokens / n_rows)))
    return Amount(n_rows, longest, is_bounded=True, is_by_vocabulary=by_vocabulary)


def _vocabulary(manifest: Manifest) -> int:
    graphs = manifest.graphs.values()
    logits = [spec.dims[-1] for graph in graphs for spec in graph.outputs if spec.name == "logits"]
    return next((size for size in logits if isinstance(size, int)), 0)
