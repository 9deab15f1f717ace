"""The graph for generation: the LM head sees the last position alone.

A prompt of T tokens then costs no T x vocabulary product and no buffer of that size (800 MB for
4,096 tokens of SmolLM2). Evaluation needs every position: both graphs stand over one data file.
"""

from __future__ import annotations

from typing import Any

HEAD = "/lm_head/MatMul"
_PICK = "/lm_head/last_position"


def last_position_graph(model: Any) -> Any:
    """A copy of the ModelProto ``model`` whose logits are (batch, 1, vocabulary).

    Raises ValueError where the graph has no LM head by the builder's name.
    """
    import numpy as np
    from onnx import ModelProto, helper, numpy_helper

    last = ModelProto()
    last.CopyFrom(model)
    nodes = list(last.graph.node)
    place = next((i for i, node in enumerate(nodes) if node.name == HEAD), None)
    if place is None:
        raise ValueError(f"no node named {HEAD}")
    index = helper.make_node(
        "Constant",
        [],
        [f"{_PICK}/index"],
        name=f"{_PICK}/Constant",
        value=numpy_helper.from_array(np.array([-1], np.int64)),
    )
    pick = helper.make_node(
        "Gather",
        [nodes[place].input[0], f"{_PICK}/index"],
        [f"{_PICK}/output_0"],
        name=f"{_PICK}/Gather",
        axis=1,
    )
    nodes[place].input[0] = pick.output[0]
    del last.graph.node[:]
    last.graph.node.extend([*nodes[:place], index, pick, *nodes[place:]])
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


def differences(every: Any, last: Any) -> list[str]:
    """What a last-position ModelProto has that the one it was made of does not explain."""
    if last_position_graph(every).SerializeToString(deterministic=True) == last.SerializeToString(
        deterministic=True
    ):
        return []
    return ["the graph of the last position is not that of every position but for the LM head"]
