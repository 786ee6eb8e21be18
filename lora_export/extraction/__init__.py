"""A full fine-tune as a low-rank adapter: `extract`, below its main path in `lora_export.extract`.

`svd`          the mathematics: truncated singular value decompositions, ranks, remaining errors
`differences`  which tensors of two checkpoints differ, and what each of them is
`placement`    how each difference is carried by a PEFT adapter: pair, whole module, left out, or refused
`pairs`        one decomposition after another, written as it is made
`peft_folder`  the adapter on disk, written tensor by tensor, and loaded by PEFT to prove it
`results`      what was found, as frozen values
"""
