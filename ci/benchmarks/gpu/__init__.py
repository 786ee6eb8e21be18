"""What is measured on a GPU: stages that need no network, from a bundle that any machine makes beforehand.

plan.py       the stages in their order, what each answers, and which figures are owed
bundle.py     exports without their weights, and how to make the weights again
prepare.py    make the bundle: the exports, the peers' graphs, PyTorch's outputs
models.py     what is exported, and its shapes
timing.py     runs side by side, with and without a CUDA graph
…_stage.py    one file a stage
"""
