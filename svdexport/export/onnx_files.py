"""What stands beside model.onnx: tokenizer, chat template, config.json, genai_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def both_rope_forms(config: dict[str, Any]) -> dict[str, Any]:
    """The config with ``rope_parameters`` (transformers 5) and ``rope_theta``/``rope_scaling`` (4).

    transformers 4.57 silently takes theta = 10000 from a config that only has the new form.
    """
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config.setdefault("rope_theta", parameters["rope_theta"])
        if parameters.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    elif parameters is None and "rope_theta" in config:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {"rope_theta": config["rope_theta"], **scaling}
    return config


def write_side_files(source: Path, out: Path, genai: dict[str, Any] | None, graph: str) -> None:
    """Copy the tokenizer; write config.json, and genai_config.json for the file ``graph``.

    Encoders have no ``genai``.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if (out / "tokenizer_config.json").is_file():
        _write_json(out / "tokenizer_config.json", _for_other_readers(out))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(out / "config.json", both_rope_forms(config))
    if genai is not None:
        genai["model"]["decoder"]["filename"] = graph
        _write_json(out / "genai_config.json", genai)


def _for_other_readers(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4 and transformers.js take it.

    The former does not know the class that transformers 5 names, the latter looks for the chat
    template here alone.
    """
    text = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    template = folder / "chat_template.jinja"
    if template.is_file():
        config.setdefault("chat_template", template.read_text(encoding="utf-8"))
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
