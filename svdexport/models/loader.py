"""Opening the user's model: a Hugging Face folder, or a GGUF file turned into one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdexport.errors import InputError, MissingExtraError
from svdexport.files import is_out_of_memory, stamp, write_atomic
from svdexport.models.blocks import Structure, discover
from svdexport.models.experts import separate_experts
from svdexport.recipe import Model
from svdexport.runtimes.gguf_file import FORM_KEY, LORA_FORM, GgufFile
from svdexport.runtimes.torch_rt import auto_class, quiet_transformers
from svdexport.safety.model_folder import check_model_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Source:
    """The user's model on disk.

    Attributes:
        folder: a Hugging Face folder of it (made from the GGUF where it came as one).
        gguf: the user's GGUF file, or None.
        trust_remote_code: whether code in the folder may run.
    """

    folder: Path
    gguf: Path | None
    trust_remote_code: bool = False

    @property
    def given(self) -> Path:
        return self.gguf or self.folder


def open_source(model: Model, work: Path) -> Source:
    """Check the model's files before any library reads them. Raises InputError.

    A GGUF is dequantised to float32 into ``work/source``, anew where the file has changed.
    """
    if model.path is not None:
        check_model_folder(model.path, model.trust_remote_code)
        return Source(model.path, None, model.trust_remote_code)
    assert model.gguf is not None
    _check_dense(model.gguf)
    folder, record = work / "source", work / "source.json"
    mark = json.dumps(stamp(model.gguf))
    known = record.is_file() and record.read_text(encoding="utf-8") == mark
    if not known or not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        convert_gguf(model.gguf, folder)
        write_atomic(record, mark)
    return Source(folder, model.gguf)


def _check_dense(path: Path) -> None:
    """Refuse a GGUF that holds less than all of its model's weights: transformers would fill in
    random ones without a word. Raises InputError."""
    file = GgufFile(path)
    if any(name.endswith((".lr_a.weight", ".lr_b.weight")) for name in file.tensors):
        raise InputError(f"{path}: holds low-rank pairs already; give the dense model's file")
    if file.value(FORM_KEY) == LORA_FORM:
        raise InputError(f"{path}: is the base of a LoRA adapter only; give the dense model's file")
    if file.value("general.type") == "adapter":
        raise InputError(f"{path}: is a LoRA adapter, not a model; give the dense model's file")


def convert_gguf(gguf: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a GGUF's weights, configuration and tokenizer as a Hugging Face folder.

    Raises InputError where transformers does not know the file's architecture.
    """
    try:
        import gguf as _gguf  # noqa: F401 (transformers needs it)
    except ImportError:
        raise MissingExtraError("gguf", "reading a GGUF model") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with quiet_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"{gguf}: transformers cannot read this GGUF ({error})") from None
    tied = getattr(model, "_tied_weights_keys", None) or ()
    if absent := sorted(set(loading["missing_keys"]) - set(tied)):
        raise InputError(f"{gguf}: has no {absent[0]}, which transformers needs; it is incomplete")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    making = folder.with_name(folder.name + ".making")
    with quiet_transformers():
        model.save_pretrained(making)
        split_as_llama_cpp(tokenizer, gguf)
        tokenizer.save_pretrained(making)
    config = both_rope_forms(json.loads((making / "config.json").read_text(encoding="utf-8")))
    (making / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    making.replace(folder)


def configuration_of(gguf: Path, folder: Path) -> Path:
    """A folder with the config.json of a GGUF's model; its tensors are not read.

    Raises InputError where transformers does not know the file's architecture.
    """
    try:
        import gguf as _gguf  # noqa: F401 (transformers needs it)
    except ImportError:
        raise MissingExtraError("gguf", "reading a GGUF model") from None
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"{gguf}: transformers cannot read this GGUF ({error})") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "float32"
    config.save_pretrained(folder)
    return folder


def split_as_llama_cpp(tokenizer: Any, gguf: Path) -> None:
    """Give the tokenizer the text splitting that the GGUF names (``tokenizer.ggml.pre``).

    transformers ignores that key and splits as GPT-2 does. Only ``smollm`` (single digits, then
    GPT-2's rule) is known here.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def both_rope_forms(config: dict[str, Any]) -> dict[str, Any]:
    """A config that transformers 4.57 (``rope_theta``) and 5.x (``rope_parameters``) both read."""
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        kind = rope.get("rope_type", "default")
        if kind != "default" and "rope_scaling" not in config:
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    elif "torch_dtype" in config:
        config["dtype"] = config["torch_dtype"]
    return config


def load_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The language model or encoder in float32, in evaluation mode; compressed checkpoints too.

    Experts of a mixture stand apart, each with linears of its own.

    Raises InputError where transformers refuses the folder.
    """
    try:
        with quiet_transformers():
            model = auto_class(folder).from_pretrained(
                str(folder),
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
            )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: transformers cannot load this model ({reason})") from None
    separate_experts(model)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: no tokenizer that transformers can load ({reason})") from None


def structure_of(folder: Path, trust_remote_code: bool = False) -> Structure:
    """Blocks, linears and shared inputs from the configuration alone, no weights read.

    Raises InputError where the model cannot be built or run on shapes alone.
    """
    try:
        return discover(skeleton(folder, trust_remote_code))
    except InputError:
        raise
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: this model's structure cannot be found ({reason})") from None


def skeleton(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model on the meta device, without weights, tied as its configuration says.

    Raises InputError where transformers cannot build it.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with torch.device("meta"):
                model = auto_class(folder).from_config(config, trust_remote_code=trust_remote_code)
            model.tie_weights()
            separate_experts(model)
            return model.eval()
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: this model's structure cannot be found ({reason})") from None
