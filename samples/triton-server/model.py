"""Triton's Python backend: an exported folder, with an adapter for each row of each request.

A request has the model's own inputs `[rows, …]` and `adapters` `[rows, 1]`: a name, "" for the base, or a blend as
JSON, such as {"topic": 0.5}. The rows of all requests that Triton gives at once are padded and run as one batch. A
request that names an adapter that is not there, or that cannot be run, gets an error; the others get their outputs.
"""

from __future__ import annotations

import json

import numpy as np
import triton_python_backend_utils as pb_utils

from lora_export import AdapterSession
from lora_export.errors import LoraExportError


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.outputs = [output["name"] for output in config["output"]]
        provider = "cuda" if args["model_instance_kind"] == "GPU" else "cpu"
        self.session = AdapterSession(config["parameters"]["folder"]["string_value"], provider, stop_spinning=True)
        # A classifier on a decoder reads a text at its last token that is not this one, whatever the mask says.
        self.fillers = {"input_ids": self.session.manifest.pad_token_id or 0}

    def execute(self, requests: list) -> list:
        answers: dict[int, object] = {}
        taken = []
        for index, request in enumerate(requests):
            try:
                inputs = {spec.name: self._input(request, spec.name) for spec in self.session.contract.inputs}
                rows = [_adapter(value) for value in self._input(request, "adapters").ravel()]
                self.session.bank.rows(rows, len(next(iter(inputs.values()))))  # refuses what is not there
                taken.append((index, inputs, rows))
            except (LoraExportError, ValueError) as error:
                answers[index] = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        if taken:
            answers |= self._run_all(taken)
        return [answers[index] for index in range(len(requests))]

    def _run_all(self, taken: list[tuple[int, dict[str, np.ndarray], list]]) -> dict[int, object]:
        """One run; if it fails, one a request, so that only those fail that are at fault."""
        try:
            return self._run(taken)
        except Exception as error:  # whatever ONNX Runtime raises is one request's, not the server's
            if len(taken) == 1:
                return {taken[0][0]: pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))}
        return {index: answer for each in taken for index, answer in self._run_all([each]).items()}

    def _run(self, taken: list[tuple[int, dict[str, np.ndarray], list]]) -> dict[int, object]:
        names = taken[0][1].keys()
        inputs = {name: _padded([inputs[name] for _, inputs, _ in taken], self.fillers.get(name, 0)) for name in names}
        results = self.session.run(inputs, [row for _, _, rows in taken for row in rows], self.outputs)
        answers, start = {}, 0
        for index, own, rows in taken:
            part = slice(start, start := start + len(rows))
            answers[index] = pb_utils.InferenceResponse(
                [self._output(name, results[name][part], own) for name in self.outputs]
            )
        return answers

    def _input(self, request: object, name: str) -> np.ndarray:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            raise ValueError(f"the request lacks the input {name!r}")
        return tensor.as_numpy()

    def _output(self, name: str, array: np.ndarray, own: dict[str, np.ndarray]) -> object:
        if name == "last_hidden_state":  # without the padding of longer requests
            array = array[:, : own["input_ids"].shape[1]]
        return pb_utils.Tensor(name, np.ascontiguousarray(array))


def _adapter(value: bytes | str) -> str | dict[str, float] | None:
    text = value.decode() if isinstance(value, bytes) else value
    return (json.loads(text) if text.startswith("{") else text) if text else None


def _padded(arrays: list[np.ndarray], filler: int) -> np.ndarray:
    """One array of all rows, filled up on the right; of the attention mask with zeros, which mark padding."""
    longest = max(array.shape[1] for array in arrays)
    wide = []
    for array in arrays:
        missing = [(0, 0), (0, longest - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
        wide.append(np.pad(array, missing, constant_values=filler))
    return np.concatenate(wide)
