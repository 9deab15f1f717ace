"""Small valid files, and what spoils them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 12,
    "tie_word_embeddings": True,
}
Tensors = dict[str, np.ndarray]


def llama_tensors() -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (8, 8),
            f"{prefix}.self_attn.k_proj.weight": (4, 8),
            f"{prefix}.self_attn.v_proj.weight": (4, 8),
            f"{prefix}.self_attn.o_proj.weight": (8, 8),
            f"{prefix}.mlp.gate_proj.weight": (16, 8),
            f"{prefix}.mlp.up_proj.weight": (16, 8),
            f"{prefix}.mlp.down_proj.weight": (8, 16),
            f"{prefix}.input_layernorm.weight": (8,),
            f"{prefix}.post_attention_layernorm.weight": (8,),
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def safetensors_parts(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": {"float32": "F32", "float16": "F16", "int8": "I8"}[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def safetensors_bytes(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(path: Path, tensors: Tensors) -> None:
    path.write_bytes(safetensors_bytes(*safetensors_parts(tensors)))


def write_model(
    folder: Path, config: dict[str, Any] | None = None, tensors: Tensors | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    write_safetensors(folder / "model.safetensors", llama_tensors() if tensors is None else tensors)
    return folder


def write_sharded(folder: Path) -> dict[str, Any]:
    """Two shards and their index; gives the index's content."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = llama_tensors()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_u32(key: str, value: int) -> bytes:
    return gguf_string(key) + struct.pack("<II", 4, value)


def gguf_text(key: str, value: str) -> bytes:
    return gguf_string(key) + struct.pack("<I", 8) + gguf_string(value)


def gguf_strings(key: str, values: list[str], count: int | None = None) -> bytes:
    number = len(values) if count is None else count
    head = gguf_string(key) + struct.pack("<IIQ", 9, 8, number)
    return head + b"".join(gguf_string(value) for value in values)


def gguf_tensor(
    name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    head = gguf_string(name) + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    data: int = 128,
    alignment: int = 32,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF file of the given entries; by default a valid one with two tensors of 64 bytes."""
    if keys is None:
        keys = [gguf_text("general.architecture", "llama"), gguf_strings("tokens", ["a", "b"])]
    if tensors is None:
        tensors = [gguf_tensor("a.weight", (8, 2)), gguf_tensor("b.weight", (16,), offset=64)]
    head = magic + struct.pack(
        "<Iqq",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(data)


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def proto(*fields: tuple[int, int | bytes | str]) -> bytes:
    """A protobuf message of the given (number, value) pairs."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def onnx_external(entries: dict[str, str], dims: tuple[int, ...] = (4,)) -> bytes:
    """A float TensorProto with external data of the given entries."""
    pairs = [(13, proto((1, key), (2, value))) for key, value in entries.items()]
    return proto(*((1, dim) for dim in dims), (2, 1), (8, "w"), *pairs, (14, 1))


def onnx_model(tensor: bytes, place: str = "initializer") -> bytes:
    """A ModelProto with ``tensor`` at one of the places that can hold one."""
    node = {
        "attribute": proto((5, proto((1, "value"), (5, tensor)))),
        "attributes": proto((5, proto((1, "value"), (10, tensor)))),
        "subgraph": proto((5, proto((1, "body"), (6, proto((5, tensor)))))),
        "subgraphs": proto((5, proto((1, "body"), (11, proto((5, tensor)))))),
        "sparse attribute": proto((5, proto((1, "v"), (22, proto((1, tensor)))))),
    }
    graph = {
        "initializer": proto((5, tensor)),
        "sparse initializer": proto((15, proto((1, tensor)))),
        "sparse indices": proto((15, proto((2, tensor)))),
        **{place: proto((1, value)) for place, value in node.items()},
    }
    if place == "function":
        function = proto((1, "f"), (7, node["attribute"]))
        return proto((1, 10), (7, proto((2, "g"))), (25, function))
    if place == "training":
        return proto((1, 10), (7, proto((2, "g"))), (20, proto((1, graph["initializer"]))))
    return proto((1, 10), (7, graph[place]))


ONNX_PLACES = [
    "initializer",
    "sparse initializer",
    "sparse indices",
    "attribute",
    "attributes",
    "subgraph",
    "subgraphs",
    "sparse attribute",
    "function",
    "training",
]
