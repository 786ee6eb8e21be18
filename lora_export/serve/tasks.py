"""The tasks that are served, and the path that answers for each."""

from __future__ import annotations

GENERATION, TEXT2TEXT, SPEECH = "text-generation", "text2text-generation", "automatic-speech-recognition"
CLASSIFICATION, FEATURES, TOKENS = "text-classification", "feature-extraction", "token-classification"
QUESTIONS, GAPS, IMAGES = "question-answering", "fill-mask", "image-classification"
SOUNDS, CTC = "audio-classification", "ctc-speech-recognition"

# Whose rows are no texts, and are prepared before they wait.
OF_SIGNALS = (IMAGES, SOUNDS, CTC)
# Whose models write texts, token by token.
WRITING = (GENERATION, TEXT2TEXT, SPEECH)
PATH_OF_TASK = {
    GENERATION: "/v1/completions and /v1/chat/completions",
    TEXT2TEXT: "/v1/completions",
    SPEECH: "/v1/audio/transcriptions",
    CLASSIFICATION: "/v1/classify",
    TOKENS: "/v1/classify",
    FEATURES: "/v1/embeddings",
    QUESTIONS: "/v1/question-answering",
    GAPS: "/v1/fill-mask",
    IMAGES: "/v1/classify",
    SOUNDS: "/v1/classify",
    CTC: "/v1/audio/transcriptions",
}
TASKS = tuple(PATH_OF_TASK)
# Why an export for another task is refused.
_NO_FORM = {
    "multiple-choice": "there is no usual form of such a request",
    "semantic-segmentation": "its answer is an image",
    "depth-estimation": "its answer is an image",
    "zero-shot-image-classification": "its rows are images beside texts",
}


def why_not_served(task: str) -> str:
    """Why exports for `task`, which is none of `TASKS`, are not served."""
    return _NO_FORM.get(task, "it is not known")
