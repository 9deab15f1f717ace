"""The model card: `README.md` of the output folder, with the metadata that Hugging Face reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from svdexport.checkpoint import is_encoder
from svdexport.files import write_atomic
from svdexport.report import figures, markdown
from svdexport.report.result import ArtifactResult, RunResult

NAME = "README.md"


def write(result: RunResult, folder: Path) -> Path:
    """Write the card into `folder`."""
    write_atomic(folder / NAME, render(result))
    return folder / NAME


def render(result: RunResult) -> str:
    """Front matter, what it is, how to run it, results, limits, recipe."""
    front = yaml.safe_dump(metadata(result), sort_keys=False, allow_unicode=True)
    body = "\n\n".join(_sections(result))
    return f"---\n{front}---\n\n{body}\n"


def metadata(result: RunResult) -> dict[str, Any]:
    """Metadata of the card. `base_model` is left out where the source does not say its name on
    the Hub, and `license` where it states none: neither can be guessed."""
    data: dict[str, Any] = {}
    if result.source.license:
        data["license"] = result.source.license.lower()
    if result.source.base_model:
        data["base_model"] = result.source.base_model
        data["base_model_relation"] = "quantized"
    formats = dict.fromkeys(a.format for a in _kept(result))
    if "checkpoint" in formats:
        data["library_name"] = "transformers"
    data["pipeline_tag"] = "feature-extraction" if _is_encoder(result) else "text-generation"
    data["tags"] = ["svdexport", "low-rank", *(f for f in formats if f != "checkpoint")]
    return data


def _kept(result: RunResult) -> list[ArtifactResult]:
    return [a for a in result.artifacts if a.kept]


def _sections(result: RunResult) -> Iterator[str]:
    name = markdown.escape(result.source.name)
    ratio = figures.kept_ratio(result)
    kept = "" if ratio is None else f" {ratio:.1%} of the parameters of its linear layers are left."
    pairs = len(figures.factorised(result))
    yield f"# {name}, low rank"
    yield (
        f"{name} ({markdown.escape(result.source.architecture)}, "
        f"{result.source.params / 1e6:,.1f} M parameters) with {pairs} of {len(result.plan)} "
        f"linear layers replaced by pairs of smaller ones, y = B (A x).{kept} Made and measured "
        "by svdexport; `report.html` shows every figure, `manifest.json` every hash, and "
        "`svdexport verify .` checks the files and repeats parity in each runtime."
    )
    yield f"Verdict: **{result.verdict.word}**. {figures.headline(result)}"
    yield "## How to run it"
    yield from _usage(result)
    yield "## Results"
    yield markdown.results(result)
    yield _conditions(result)
    if result.gates:
        yield "## Gates"
        yield markdown.gates(result)
        yield "The value is the pessimistic end of what was measured."
    samples = list(_samples(result))
    if samples:
        yield "## What it writes"
        yield "Greedy, without a system prompt:"
        yield "\n".join(samples)
    yield "## Limits"
    yield "\n".join(f"- {line}" for line in _limits(result))
    yield "## Recipe"
    yield fence(result.recipe_text, "yaml")
    if result.overrides:
        yield "With " + ", ".join(markdown.code(f"--set {o}") for o in result.overrides) + "."
    yield f"sha256 of the recipe with its defaults: `{result.recipe_sha256}`"


def _usage(result: RunResult) -> Iterator[str]:
    pairs, encoder = bool(figures.factorised(result)), _is_encoder(result)
    for artifact in _kept(result):
        where = f"{artifact.label} on {artifact.runtime}"
        yield f"### {markdown.escape(where)}: {markdown.code(artifact.path)}"
        if artifact.format == "gguf":
            yield from _gguf_usage(artifact, pairs)
        elif artifact.format == "checkpoint":
            yield from _checkpoint_usage(artifact, encoder)
        elif encoder:
            yield fence(_EMBED.format(folder=artifact.path), "python")
        else:
            yield from _onnx_usage(artifact)


def _is_encoder(result: RunResult) -> bool:
    return is_encoder({"architectures": [result.source.architecture]})


def _gguf_usage(artifact: ArtifactResult, pairs: bool) -> Iterator[str]:
    adapter = next((name for name in artifact.files if name.endswith(".lora.gguf")), None)
    if adapter is not None:
        yield (
            f"A base and, in {markdown.code(adapter)}, a LoRA adapter: any llama.cpp runs the two "
            "together (`--lora` of its own programs)."
        )
        if not artifact.type.endswith("-weight"):
            yield "The base alone is what the adapter leaves of the model, and writes nonsense."
    elif pairs and "-stock" not in artifact.type:
        yield (
            "It holds low-rank pairs, which a stock llama.cpp refuses to load. The llama.cpp that "
            "svdexport builds (`make setup` in its sources) runs it through llama-cpp-python:"
        )
    beside = "" if adapter is None else f"lora_path={adapter!r}, "
    yield fence(
        "from llama_cpp import Llama\n\n"
        f"model = Llama({artifact.path!r}, {beside}n_ctx=2048)\n"
        'print(model("The capital of France is", max_tokens=32)["choices"][0]["text"])',
        "python",
    )


_GENAI = """\
import onnxruntime_genai as og

model = og.Model({folder!r})
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("The capital of France is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""

_SESSION = """\
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = {folder!r}
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
session = onnxruntime.InferenceSession(folder + "/model.onnx")
inputs = {{value.name: value for value in session.get_inputs()}}
outputs = [value.name for value in session.get_outputs()]
cache = {{}}
for name, value in inputs.items():
    if name.startswith("past_key_values."):
        kind = np.float16 if value.type == "tensor(float16)" else np.float32
        cache[name] = np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
ids = tokenizer.encode("The capital of France is").ids
step = ids
for _ in range(32):
    places = range(len(ids) - len(step), len(ids))
    feeds = {{"input_ids": step, "attention_mask": [1] * len(ids), "position_ids": places}}
    feeds = {{k: np.array([list(v)], np.int64) for k, v in feeds.items() if k in inputs}}
    found = dict(zip(outputs, session.run(outputs, feeds | cache)))
    cache = {{name: found[name.replace("past_key_values", "present")] for name in cache}}
    step = [int(found["logits"][0, -1].argmax())]
    ids = ids + step
print(tokenizer.decode(ids))"""

_EMBED = """\
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = {folder!r}
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
session = onnxruntime.InferenceSession(folder + "/model.onnx")
text = tokenizer.encode("The capital of France is Paris.")
feeds = {{
    "input_ids": np.array([text.ids], np.int64),
    "attention_mask": np.array([text.attention_mask], np.int64),
}}
print(session.run(["sentence_embedding"], feeds)[0])  # of length 1"""


def _onnx_usage(artifact: ArtifactResult) -> Iterator[str]:
    if artifact.runtime != "onnxruntime-genai":  # a latent cache
        yield "A plain onnxruntime session runs it, onnxruntime-genai does not:"
        yield fence(_SESSION.format(folder=artifact.path), "python")
        return
    yield fence(_GENAI.format(folder=artifact.path), "python")
    yield (
        "A plain onnxruntime session runs it as well: inputs `input_ids`, `attention_mask` and "
        "`past_key_values.N.key/value`, outputs `logits` and `present.N.key/value`."
    )


def _checkpoint_usage(artifact: ArtifactResult, encoder: bool) -> Iterator[str]:
    kind = "AutoModel" if encoder else "AutoModelForCausalLM"
    code = any(name.endswith(".py") for name in artifact.files)
    trust = ", trust_remote_code=True" if code else ""
    if code:
        yield "It brings Python code of its own, which runs with your rights: read it first."
    yield fence(
        "import svdexport  # registers the low-rank layers\n"
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f"model = {kind}.from_pretrained({artifact.path!r}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({artifact.path!r}{trust})",
        "python",
    )


def _conditions(result: RunResult) -> str:
    cpu = result.machine.get("cpu", "unknown processor")
    first = next((a.quality for a in result.artifacts if a.quality is not None), None)
    parts = []
    if first is not None:
        parts.append(
            f"Quality on {first.windows} windows of {first.context} tokens "
            f"({markdown.escape(figures.text_name(result))}); KLD and same top token against the "
            "original model in float32; ± is the standard error over windows."
        )
    if figures.timed(result):
        parts.append(
            f"Speed with {result.threads} threads on {markdown.escape(str(cpu))}: prefill of the "
            "longest prompt, decode one token at a time, speedup against the dense twin of the "
            "same type on the same runtime, timed in turn, with its 95 % interval."
        )
    return " ".join(parts)


def _samples(result: RunResult) -> Iterator[str]:
    for artifact in _kept(result):
        if artifact.quality is None:
            continue
        for sample in artifact.quality.generations[:3]:
            loop = " *(repeats itself)*" if sample.looping else ""
            yield (
                f"- {markdown.escape(artifact.label)}: {markdown.escape(sample.prompt)} "
                f"**{markdown.escape(sample.text)}**{loop}"
            )


def _limits(result: RunResult) -> Iterator[str]:
    yield (
        "Compression changed the model: it knows less and errs more than the original. "
        "The table says by how much on one text; measure on yours before relying on it."
    )
    for baseline, artifact in _pairs(result):
        if artifact.quality is None or baseline.quality is None:
            continue
        if artifact.quality.perplexity > baseline.quality.perplexity:
            growth = artifact.quality.perplexity / baseline.quality.perplexity - 1
            label = markdown.escape(artifact.label)
            yield f"{label}: perplexity is {growth:.0%} above that of its dense twin."
    for line in figures.equal_bytes(result):
        yield markdown.escape(f"At equal bytes: {line}.")
    if not result.source.license:
        yield "The source model states no licence: ask its author before passing this on."
    for note in result.notes:
        yield markdown.escape(note)
    for artifact in _kept(result):
        for note in artifact.notes:
            yield markdown.escape(f"{artifact.label}: {note}")


def _pairs(result: RunResult) -> Iterator[tuple[ArtifactResult, ArtifactResult]]:
    for artifact in _kept(result):
        baseline = result.baseline_of(artifact)
        if baseline is not None:
            yield baseline, artifact


def fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    body = text.rstrip("\n")
    return f"{ticks}{language}\n{body}\n{ticks}"
