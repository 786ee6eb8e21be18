"""Results of `inspect`, `--dry-run`, the exports and `run` as text for people: pure functions of their values."""

from __future__ import annotations

import re

from lora_export.errors import some_of


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def export_text(value: dict) -> str:
    """`describe.describe_export` for people."""
    sizes = value["bytes"]
    what = f"{value['task']} in {value['dtype']}, fused for {value['provider']}"
    head = f"{value['kind']} export of {value['base']} for {what}"
    lines = [head]
    if value["quantization"] is not None:
        lines.append(f"  {value['quantized_weights']} linear weights in {value['quantization']}; adapters in floats")
    if value["given_graph"] is not None:
        lines.append(f"  its graph is that of {value['given_graph']}")
    for graph in [f"{name}.onnx" for name in value.get("graphs", ("model",))]:
        n_bytes = sum(n for file, n in sizes.items() if file in (graph, f"{graph}.data"))
        lines.append(f"  {value['path']}/{graph}  {_megabytes(n_bytes)}")
    for adapter in value["adapters"]:
        ranks, scales = ", ".join(map(str, adapter["ranks"])), ", ".join(f"{scale:.4g}" for scale in adapter["scales"])
        pairs = f"rank {ranks}, scale {scales}" if ranks else "no pairs of LoRA"
        extra = f", replaces {some_of(adapter['replaced'], 4)}" if adapter["replaced"] else ""
        extra += f", weight {adapter['weight']:g}" if adapter["weight"] != 1 else ""
        files = list(adapter["files"].values()) if "files" in adapter else [adapter["file"]] if adapter["file"] else []
        for file in files:
            size = f"  {_megabytes(sizes[file])}" if file in sizes else ""
            lines.append(f"  {value['path']}/{file} {size}")
        if not files:
            lines.append(f"  folded in: {adapter['name']}")
        lines.append(f"      {pairs}, {adapter['targets']} modules{extra}")
        if adapter["preprocessing"] is not None:
            place = value["path"] if adapter["preprocessing"] == "." else f"{value['path']}/{adapter['preprocessing']}"
            lines.append(f"      its own tokenizer or processor, other than the base's, is in {place}/")
        lines += _conversion(adapter)
    if value["signed"]:
        lines.append(f"  {value['path']}/model.sig  a signature; `lora-export verify` checks it")
    return "\n".join(lines)


def _conversion(adapter: dict) -> list[str]:
    """What a conversion to LoRA lost, the worst modules first."""
    errors = sorted(adapter["conversion_errors"].items(), key=lambda item: -item[1])
    return [f"      converted: {module} lost {error:.1%} of its change" for module, error in errors[:6]] + (
        [f"      converted: {len(errors) - 6} more modules lost at most {errors[6][1]:.1%}"] if len(errors) > 6 else []
    )


_WOULD = {"merge": "fold the adapters into one graph", "dynamic": "write one graph whose adapters are inputs"}


def plan_text(value: dict) -> str:
    """`describe.describe_plan` for people."""
    write, read = value["write"], value["read"]
    parameters = sum(read["parameters_by_dtype"].values())
    lines = [
        f"would {_WOULD[value['mode']]} for {value['task']} in {value['dtype']}, fused for {value['provider']}; "
        "wrote nothing",
        *([f"linear weights in {value['quantization']}; adapters in floats"] if value["quantization"] else []),
        *([f"onto the graph {value['graph']['path']}"] if value["graph"] else []),
        *value["remarks"],
        f"read    {read['path']}: {read['tensors']} tensors, {parameters:,} parameters"
        + (f", quantized: {read['quantization']}" if read["quantization"] else ""),
    ]
    for adapter in value["adapters"]:
        lines.append(
            f"read    {adapter['path']}: {adapter['pairs']} pairs of rank {adapter['ranks']}, {adapter['becomes']}"
        )
        if adapter["replaced"]:
            lines.append(f"        replaces {some_of(adapter['replaced'], 4)}")
        if adapter["merged_by_peft"]:
            lines.append(f"        merged by PEFT's own code: {some_of(adapter['merged_by_peft'], 4)}")
        lines += _conversion(adapter)
    inputs = value["inputs"]
    if inputs["pairs"]:
        replaced = f" and {', '.join(inputs['replaced_modules'])}" if inputs["replaced_modules"] else ""
        lines.append(f"inputs  LoRA pairs of {inputs['pairs']} modules{replaced}")
    lines += [
        f"write   {write['folder']} ({write['state']}): {', '.join(write['files'])}",
        f"disk    {_megabytes(write['weight_bytes'])} of {_megabytes(write['disk_free_bytes'])} free",
        f"memory  about {_megabytes(value['memory_bytes'])} at the peak",
    ]
    return "\n".join(lines)


def _named_shapes(tensors: dict[str, list]) -> list[str]:
    """A line a tensor; those that differ by their layer only are one line: `present.{0 to 29}.key`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name, shape in tensors.items():
        found = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        layers.setdefault((pattern, str(shape)), []).append(int(found[1]) if found else -1)
    lines = []
    for (pattern, shape), numbers in layers.items():
        shown = str(numbers[0]) if len(numbers) == 1 else f"{{{numbers[0]} to {numbers[-1]}}}"
        lines.append(f"{pattern.replace('{}', shown)} {shape}")
    return lines


def inspect_text(value: dict) -> str:
    """`describe.inspect_path` for people."""
    if value["what"] == "export":
        lines = [export_text(value)]
        for name, graph in value.get("graphs", {"": value}).items():
            lines += [f"  {name}"] if name else []
            lines += [f"  in   {line}" for line in _named_shapes(graph["inputs"])]
            lines += [f"  out  {line}" for line in _named_shapes(graph["outputs"])]
            lines.append(f"  and {graph['adapter_inputs']} adapter inputs")
        return "\n".join(lines)
    if value["what"] == "base":
        kinds = ", ".join(f"{n:,} in {dtype}" for dtype, n in value["parameters_by_dtype"].items())
        lines = [f"base {value['path']}: {', '.join(value['architectures'])}", f"  {value['tensors']} tensors, {kinds}"]
        lines += [f"  quantized: {value['quantization']}; read as floats"] if value["quantization"] else []
        lines.append(f"  tasks of {value['model_type']}: {', '.join(value['tasks']) or 'none that is exported'}")
        lines.append("  an export with --dry-run says what becomes of an adapter of it")
        return "\n".join(lines)
    if "format" in value:
        return "\n".join(
            [
                f"adapter {value['name']} ({value['path']}) in the format {value['format']}, not PEFT's",
                f"  {value['tensors']} tensors, {value['parameters']:,} parameters, {len(value['modules'])} modules"
                f" of rank {', '.join(map(str, value['ranks']))}",
                f"  such as {', '.join(value['modules'][:3])}",
                "  made a PEFT adapter when it is used, once every name fits a module of the base",
            ]
        )
    lines = [
        f"adapter {value['name']} ({value['path']}) of {value['base']}",
        f"  {value['tensors']} tensors, {value['parameters']:,} parameters, task type {value['task_type']}",
        *([f"  trained on quantized weights: {value['trained_on']}"] if value["trained_on"] else []),
        f"  merge: {value['merge']}",
        f"  dynamic: {value['dynamic']}",
    ]
    for option in value["options"]:
        instead = f"; instead: {option['instead']}" if "refused" in (option["merge"], option["dynamic"]) else ""
        verdicts = f"{option['merge']} / {option['dynamic']}"
        lines.append(f"    {option['option']} = {option['value']!r}: {verdicts} ({option['note']}{instead})")
    return "\n".join(lines)


def trial_text(value: dict) -> str:
    """`trial.run_trial` for people."""
    lines = []
    for given, result in zip(value["inputs"], value["results"], strict=True):
        if "continuation" in result:
            written = result["continuation"] if value["chat"] else f"{given}{result['continuation']}"
            lines.append(f"{given}  →  {written}" if value["chat"] and len(value["inputs"]) > 1 else written)
            if "empty_because" in result:
                lines.append(f"(an empty answer: {result['empty_because']})")
        elif "text" in result:
            lines.append(f"{given}  →  {result['text']}")
        elif "sentence_embedding" in result:
            vector = result["sentence_embedding"]
            first = ", ".join(f"{number:.4f}" for number in vector[:6])
            lines.append(f"{len(vector)} numbers: {first} …   {given}")
        elif "values" in result:
            numbers = ", ".join(f"{name} {number:.3f}" for name, number in result["values"].items())
            lines.append(f"{numbers}   {given}")
        elif "labels" in result and "scores" in result:
            best = ", ".join(f"{name} {score:.1%}" for name, score in list(result["scores"].items())[:3])
            lines.append(f"{', '.join(result['labels']) or 'no label'}   ({best})   {given}")
        elif "label" in result:
            best = ", ".join(f"{name} {score:.1%}" for name, score in list(result["scores"].items())[:3])
            lines.append(f"{result['label']}   ({best})   {given}")
        else:
            lines.append(f"{result}   {given}")
    return "\n".join(lines)
