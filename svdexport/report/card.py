"""The model card: `README.md` of the output folder, with the metadata that Hugging Face reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

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
    data["pipeline_tag"] = "text-generation"
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
    pairs = bool(figures.factorised(result))
    for artifact in _kept(result):
        where = f"{artifact.label} on {artifact.runtime}"
        yield f"### {markdown.escape(where)}: {markdown.code(artifact.path)}"
        if artifact.format == "gguf":
            yield from _gguf_usage(artifact, pairs)
        elif artifact.format == "onnx":
            yield from _onnx_usage(artifact)
        else:
            yield from _checkpoint_usage(artifact)


def _gguf_usage(artifact: ArtifactResult, pairs: bool) -> Iterator[str]:
    if pairs:
        yield (
            "It holds low-rank pairs, which a stock llama.cpp refuses to load. The llama.cpp that "
            "svdexport builds (`make setup` in its sources) runs it through llama-cpp-python:"
        )
    yield fence(
        "from llama_cpp import Llama\n\n"
        f"model = Llama({artifact.path!r}, n_ctx=2048)\n"
        'print(model("The capital of France is", max_tokens=32)["choices"][0]["text"])',
        "python",
    )


def _onnx_usage(artifact: ArtifactResult) -> Iterator[str]:
    yield fence(
        "import onnxruntime_genai as og\n\n"
        f"model = og.Model({artifact.path!r})\n"
        "tokenizer = og.Tokenizer(model)\n"
        "params = og.GeneratorParams(model)\n"
        "params.set_search_options(max_length=64, do_sample=False)\n"
        "generator = og.Generator(model, params)\n"
        'generator.append_tokens(tokenizer.encode("The capital of France is"))\n'
        "while not generator.is_done():\n"
        "    generator.generate_next_token()\n"
        "print(tokenizer.decode(generator.get_sequence(0)))",
        "python",
    )
    yield (
        "A plain onnxruntime session runs it as well: inputs `input_ids`, `attention_mask` and "
        "`past_key_values.N.key/value`, outputs `logits` and `present.N.key/value`."
    )


def _checkpoint_usage(artifact: ArtifactResult) -> Iterator[str]:
    yield fence(
        "import svdexport  # registers the low-rank layers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({artifact.path!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({artifact.path!r})",
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
