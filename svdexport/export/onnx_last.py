"""The graph for generation: the LM head sees the last position of each row alone.

A prompt of T tokens then costs no T x vocabulary product and no buffer of that size (800 MB for
4,096 tokens of SmolLM2). Evaluation needs every position: both graphs stand over one data file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

HEAD = "/lm_head/MatMul"
_PICK = "/lm_head/last_position"


def last_position_graph(model: Any) -> Any:
    """A copy of the ModelProto ``model`` whose logits are (batch, 1, vocabulary).

    A row's position is the last of the input that ``attention_mask`` does not hide, so that the
    prompts of a batch may be padded on either side. Raises ValueError where the graph has no LM
    head by the builder's name.
    """
    from onnx import ModelProto

    last = ModelProto()
    last.CopyFrom(model)
    nodes = list(last.graph.node)
    place = next((i for i, node in enumerate(nodes) if node.name == HEAD), None)
    if place is None:
        raise ValueError(f"no node named {HEAD}")
    picking = _picking(nodes[place].input[0])
    nodes[place].input[0] = picking[-1].output[0]
    del last.graph.node[:]
    last.graph.node.extend([*nodes[:place], *picking, *nodes[place:]])
    for value in last.graph.output:
        if value.name == "logits":
            dimension = value.type.tensor_type.shape.dim[1]
            dimension.Clear()
            dimension.dim_value = 1
    stale = {name for node in nodes[place:] for name in node.output}
    kept = [value for value in last.graph.value_info if value.name not in stale]
    del last.graph.value_info[:]
    last.graph.value_info.extend(kept)
    return last


def _picking(states: str) -> list[Any]:
    """Nodes from ``states`` (batch, length, width) to those of one position a row."""
    from onnx import helper, numpy_helper

    def node(kind: str, inputs: list[str], name: str, **settings: Any) -> Any:
        path = f"{_PICK}/{name}"
        return helper.make_node(kind, inputs, [f"{path}/output_0"], name=path, **settings)

    def constant(name: str, value: int) -> Any:
        return node(
            "Constant", [], name, value=numpy_helper.from_array(np.array([value], np.int64))
        )

    one, end = constant("One", 1), constant("End", np.iinfo(np.int64).max)
    length = node("Shape", [states], "Length", start=1, end=2)
    start = node("Neg", [length.output[0]], "Start")
    # The mask also covers the cache: its last columns are the input's.
    mask = ["attention_mask", start.output[0], end.output[0], one.output[0]]
    columns = node("Slice", mask, "Mask")
    position = node("ArgMax", [columns.output[0]], "Position", axis=1, select_last_index=1)
    index = node("Unsqueeze", [position.output[0], one.output[0]], "Index")
    pick = node("GatherND", [states, index.output[0]], "GatherND", batch_dims=1)
    return [one, end, length, start, columns, position, index, pick]


def differences(every: Any, last: Any) -> list[str]:
    """What a last-position ModelProto has that the one it was made of does not explain."""
    if last_position_graph(every).SerializeToString(deterministic=True) == last.SerializeToString(
        deterministic=True
    ):
        return []
    return ["the graph of the last position is not that of every position but for the LM head"]
