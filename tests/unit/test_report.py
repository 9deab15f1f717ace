"""Reports: every figure appears, nothing is fetched, hostile text stays text."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from svdexport.core.measures import GateResult, Speedup, Verdict
from svdexport.files import sha256_file
from svdexport.report import card, figures, html, manifest, markdown, svg, table
from svdexport.report.equal_bytes import comparisons
from svdexport.report.result import ArtifactResult, PlanRow, RunResult, SourceModel, StageTime
from tests.unit.report_example import artifact, example_result

EVIL = "<script>alert('x')</script>\"'`|*_[a](javascript:x)"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting, collects tags with their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def failed() -> RunResult:
    gates = (
        GateResult("max_mean_kld", 0.2, 0.245, False, "quality", "model-Q8_0.gguf"),
        GateResult(
            "min_decode_speedup", 1.2, 1.1, False, "speed", "onnx-int4", True, "decode_64: noise"
        ),
    )
    reasons = ("model-Q8_0.gguf: max_mean_kld failed: 0.245 against 0.2",)
    return dataclasses.replace(
        example_result(), gates=gates, verdict=Verdict("fail", 4, reasons), overrides=("a.b=1",)
    )


def bare() -> RunResult:
    """A run that measured nothing and planned nothing."""
    one = ArtifactResult("model.gguf", "gguf", "F16", "compressed", "llama.cpp", 10)
    return dataclasses.replace(
        example_result(),
        plan=(),
        artifacts=(one,),
        gates=(),
        stages=(StageTime("load", 0.0, True),),
        source=SourceModel("m", "X", 0),
    )


def hostile() -> RunResult:
    base = example_result()
    first = dataclasses.replace(
        base.artifacts[1], path=EVIL, type=EVIL, runtime=EVIL, notes=(EVIL,), round_trip=(EVIL,)
    )
    row = PlanRow(EVIL, (4, 4), 16, 16, None, 0, None, EVIL)
    return dataclasses.replace(
        base,
        name=EVIL,
        command=EVIL,
        recipe_text=EVIL + "\n```\n# x",
        source=SourceModel(EVIL, EVIL, 1, EVIL, EVIL, {EVIL: EVIL}),
        plan=(row, *base.plan),
        artifacts=(first, *base.artifacts),
        stages=(StageTime(EVIL, 1.0),),
        versions={EVIL: EVIL},
        evaluation_text=EVIL,
        overrides=(EVIL,),
        verdict=Verdict("fail", 4, (EVIL,)),
        notes=(EVIL,),
    )


def terminal(result: RunResult, width: int = 80) -> str:
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(table.summary(result))
    return out.getvalue()


RESULTS = {"passed": example_result, "failed": failed, "bare": bare, "hostile": hostile}


@pytest.mark.parametrize("kind", list(RESULTS))
def test_page_is_well_formed_and_fetches_nothing(kind: str) -> None:
    text = html.render(RESULTS[kind]())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & {
        t for t, _ in page.tags
    }
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "srcset", "onload", "onclick"} & set(attributes)
    assert "url(" not in text and "@import" not in text
    assert "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text


def test_page_shows_the_verdict_first_and_every_figure() -> None:
    result = failed()
    text = " ".join("".join(Page(html.render(result)).texts).split())
    body = text[text.index("fail SmolLM2") :]
    assert body.index("1 of 2 gates failed") < body.index("Results") < body.index("Layers")
    assert "max_mean_kld failed: 0.245 against 0.2" in body and "decode_64: noise" in body
    for row in figures.rows(result):
        for value in dataclasses.astuple(row):
            assert value in body, value
    for word in ("Kept dense, and why", "break-even: 9 linears", "Time per stage", "1 min 36 s"):
        assert word in body
    assert "Paris, a city on the Seine." in body and result.recipe_sha256 in body


def test_page_keeps_the_users_folders_and_unmeasured_speed_to_itself() -> None:
    recipe = dict(example_result().recipe) | {"evaluate": {"text": "/home/me/secret/wiki.txt"}}
    place = "/home/me/secret/wiki.txt"
    result = dataclasses.replace(bare(), recipe=recipe, evaluation_text=place)
    for text in (html.render(result), card.render(result)):
        assert "/home/me" not in text
    text = "".join(Page(html.render(result)).texts)
    assert "divergence on wiki.txt" in text and "Speed with" not in text
    assert "x86-64, 2 cores, 26 GB of memory" in text
    assert "Speed with 2 threads" in "".join(Page(html.render(example_result())).texts)


def test_charts_are_well_formed_and_inside_of_their_frame() -> None:
    text = html.render(example_result())
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 3 + 3
    for picture in pictures:
        root = ET.fromstring(picture)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
        for node in root.iter():
            for key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(node.attrib.get(key, 0)) <= width
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(node.attrib.get(key, 0)) <= height


def test_heat_map_has_a_cell_for_each_linear() -> None:
    result = example_result()
    heat = html.rank_heat(result)
    assert heat is not None and heat.layers == 30 and len(heat.lines) == 7
    cells = [c for _, line in heat.lines for c in line if c is not None]
    assert len(cells) == 210 and sum(c.value is None for c in cells) == 9
    assert max(c.value for c in cells if c.value is not None) == 1.0
    assert "dense (break-even)" in next(c.title for c in cells if c.value is None)
    errors = html.error_heat(result)
    assert errors is not None and errors.high == "0.38"
    assert html.rank_heat(bare()) is None and html.error_heat(bare()) is None


@pytest.mark.parametrize("kind", list(RESULTS))
def test_terminal_table_fits_80_columns(kind: str) -> None:
    text = terminal(RESULTS[kind]())
    assert max(len(line) for line in text.splitlines()) <= 80


def test_terminal_table_has_every_figure_and_the_verdict() -> None:
    text = terminal(example_result())
    for word in ("gguf Q8_0", "121.3", "30.9", "±0.62", "0.231", "1,089", "1.21x", "1.19–1.22"):
        assert word in text
    assert "PASS  All 5 gates passed." in text and "in all 3 min 42 s" in text
    assert "FAIL  1 of 2 gates failed (exit code 4)." in terminal(failed())
    noisy = dataclasses.replace(failed(), verdict=Verdict("inconclusive", 7))
    assert "INCONCLUSIVE  The machine was too noisy to judge 1 of 2 gates" in terminal(noisy)


def test_card_has_the_metadata_that_the_hub_reads() -> None:
    text = card.render(example_result())
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["svdexport", "low-rank", "gguf", "onnx"],
    }
    assert "a stock llama.cpp refuses" in body and "onnxruntime_genai" in body
    assert "perplexity is 30% above that of its dense twin" in body
    assert (
        "At equal bytes: gguf Q8\\_0 against plain gguf Q4\\_0, 121.3 against 91.7 MB: plain "
        "quantisation is better (perplexity 30.9 against 28.0, decode 1.12x against 1.21x)."
    ) in body
    for block in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        compile(block, "card", "exec")


def test_card_guesses_neither_licence_nor_base() -> None:
    text = card.render(bare())
    data = yaml.safe_load(text.split("---\n", 2)[1])
    assert "license" not in data and "base_model" not in data
    assert "states no licence" in text
    assert "refuses" not in text  # no pairs were planned: any llama.cpp runs it


def with_artifact(number: int, **changes: Any) -> str:
    """The card's usage part, with one artifact of the example changed and alone."""
    base = example_result()
    source = dataclasses.replace(base.source, architecture=changes.pop("architecture", "XForLM"))
    one = dataclasses.replace(base.artifacts[number], **changes)
    text = card.render(dataclasses.replace(base, artifacts=(one,), source=source))
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")
    return text.partition("## Results")[0]


def test_card_names_an_adapter_and_what_a_stock_llama_cpp_runs() -> None:
    name = "model-Q8_0-stock-lora"
    files = {f"{name}.gguf": "ab", f"{name}.lora.gguf": "cd"}
    text = with_artifact(1, path=f"{name}.gguf", type="Q8_0-stock-lora", files=files)
    assert f"Llama('{name}.gguf', lora_path='{name}.lora.gguf', n_ctx=2048)" in text
    assert "refuses" not in text and "The base alone" in text
    text = with_artifact(1, path=f"{name}.gguf", type="Q8_0-stock-lora-weight", files=files)
    assert "lora_path" in text and "The base alone" not in text
    text = with_artifact(1, path="model-Q8_0-stock.gguf", type="Q8_0-stock")
    assert "refuses" not in text and "lora" not in text


def test_card_of_an_encoder_shows_embeddings() -> None:
    bert: dict[str, Any] = {"architecture": "BertModel"}
    text = with_artifact(3, runtime="onnxruntime", quality=None, **bert)
    assert "pipeline_tag: feature-extraction" in text
    assert "sentence_embedding" in text and "onnxruntime_genai" not in text
    text = with_artifact(3, path="checkpoint", format="checkpoint", runtime="torch", **bert)
    assert "AutoModel.from_pretrained('checkpoint')" in text and "CausalLM" not in text


def test_card_shows_genai_only_where_it_runs_and_code_that_must_be_trusted() -> None:
    text = with_artifact(3, runtime="onnxruntime", path="onnx-int4-latent")
    assert "onnxruntime_genai as" not in text and "InferenceSession" in text
    plain: dict[str, Any] = {"path": "checkpoint", "format": "checkpoint", "runtime": "torch"}
    assert "trust_remote_code" not in with_artifact(3, **plain)
    text = with_artifact(3, **plain, files={"checkpoint/own.py": "ab"})
    assert "from_pretrained('checkpoint', trust_remote_code=True)" in text
    assert "Python code of its own" in text


@pytest.mark.parametrize("render", [card.render, markdown.summary])
def test_hostile_text_stays_text_in_markdown(render: object) -> None:
    text = render(hostile())  # type: ignore[operator]
    outside = re.sub(r"(`{3,}).*?\n\1", "", text, flags=re.DOTALL)
    outside = re.sub(r"^---\n.*?\n---\n", "", outside, flags=re.DOTALL)
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert "<script" not in outside
    assert "](javascript" not in outside.replace("\\]", "")


def test_fence_is_longer_than_what_it_holds() -> None:
    text = card.fence("a\n````\nb\n", "yaml")
    assert text.startswith("`````yaml\n") and text.endswith("\n`````")


def test_summary_names_gates_and_reasons() -> None:
    text = markdown.summary(failed())
    assert text.startswith("## ❌ SmolLM2-135M-Instruct: fail")
    assert "| onnx-int4 | min\\_decode\\_speedup | 1.2 | 1.1 | inconclusive |" in text
    columns = {line.count("|") for line in markdown.results(failed()).splitlines()}
    assert columns == {12}


def test_manifest_lists_files_and_repeats_figures(tmp_path: Path) -> None:
    result = example_result()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"abc")
    for name in (".git", "sub/.cache"):  # not ours: what `verify` passes over
        (tmp_path / name).mkdir()
        (tmp_path / name / "index").write_bytes(b"changes with each commit")
    card.write(result, tmp_path)
    path = manifest.write(result, tmp_path)
    again, files = manifest.read(tmp_path)
    assert again == result
    assert set(files) == {"sub/a.bin", "README.md"}
    assert files["sub/a.bin"] == {"bytes": 3, "sha256": sha256_file(tmp_path / "sub" / "a.bin")}
    data = json.loads(path.read_text())
    kld = next(
        f
        for f in data["figures"]
        if (f["artifact"], f["figure"]) == ("model-Q8_0.gguf", "mean_kld")
    )
    assert kld["low"] < kld["value"] == 0.231 < kld["high"]
    assert kld["command"] == "svdexport verify . --quality --model SmolLM2-135M-Instruct"
    speed = next(f for f in data["figures"] if f["figure"] == "decode_64_speedup")
    assert speed["command"] == "svdexport verify . --speed --model SmolLM2-135M-Instruct"
    assert {f["figure"] for f in data["figures"]} >= {"bytes", "perplexity", "decode_64_speedup"}
    before = path.read_bytes()
    manifest.write(result, tmp_path)
    assert path.read_bytes() == before


def test_commands_that_repeat_figures_work_in_the_published_folder() -> None:
    """A text and a model lie where the recipe's author had them; a twin is not there at all."""
    base = example_result()
    recipe = dict(base.recipe) | {"evaluate": {"text": "my text.txt"}}
    every = list(manifest.figures(dataclasses.replace(base, recipe=recipe)))
    kept = {artifact.path for artifact in base.artifacts if artifact.kept}
    for figure in every:
        if figure["artifact"] not in kept:
            assert figure["command"] == base.command
        elif figure["figure"] == "bytes":
            assert figure["command"] == f"svdexport inspect {figure['artifact']}"
        else:
            option = (
                "--speed" if figure["figure"].startswith(("prefill", "decode")) else "--quality"
            )
            model = "--model SmolLM2-135M-Instruct"
            assert figure["command"] == f"svdexport verify . {option} {model}"
    trusted = dict(base.recipe) | {"model": {"path": "m", "trust_remote_code": True}}
    every = list(manifest.figures(dataclasses.replace(base, recipe=trusted)))
    assert any(f["command"].endswith("--trust-remote-code") for f in every)


def test_twins_of_one_type_stay_with_their_own() -> None:
    """int8 and int8-standard are both of type int8, on the same runtime."""
    artifacts = []
    for name, dense, low in (("onnx-int8", 20.0, 30.0), ("onnx-int8-standard", 40.0, 42.0)):
        for path, role, value in ((f"dense/{name}", "dense", dense), (name, "compressed", low)):
            one = artifact(path, "int8", role, 10**8, (value, 0.1, 0.9, None))
            artifacts.append(dataclasses.replace(one, path=path))
    result = dataclasses.replace(example_result(), artifacts=tuple(artifacts))
    for one in artifacts:
        twin = result.baseline_of(one)
        assert (twin.path if twin else None) == (f"dense/{one.path}" if one.kept else None)
    text = card.render(result)
    assert "onnx int8: perplexity is 50% above" in text
    assert "onnx int8-standard: perplexity is 5% above" in text
    labels = [(row.artifact, row.role) for row in figures.rows(result)]
    assert labels == [
        ("onnx int8", "dense"),
        ("onnx int8", "low rank"),
        ("onnx int8-standard", "dense"),
        ("onnx int8-standard", "low rank"),
    ]


def test_a_plain_file_has_a_speedup_over_the_twin_that_it_was_timed_with() -> None:
    """Two compressed files share a plain one, which was timed with the first."""
    made = []
    for name, role, twin in (("a", "compressed", "dense/a"), ("b", "compressed", "dense/b"),
                             ("plain/c", "plain", "dense/a")):  # fmt: skip
        one = artifact(f"{name}.gguf", "Q4_0", role, 10**8, (30.0, 0.1, 0.9, 1.2))
        assert one.speed is not None
        made.append(dataclasses.replace(one, speed=dataclasses.replace(one.speed, baseline=twin)))
    first, second = comparisons(made)
    assert first.decode_speedup == first.plain_decode_speedup == second.decode_speedup
    assert second.plain == "plain/c.gguf" and second.plain_decode_speedup is None


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> None:
    """A plain validator of the JSON schema's words that the manifest's schema uses."""
    known = {
        "$ref", "$defs", "$schema", "title", "description", "default", "type", "properties",
        "required", "items", "anyOf", "enum", "const", "additionalProperties", "prefixItems",
        "minItems", "maxItems",
    }  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
        return
    if "anyOf" in schema:
        tried = []
        for option in schema["anyOf"]:
            try:
                fits(value, option, root, where)
                return
            except AssertionError as error:
                tried.append(str(error))
        raise AssertionError(f"{where}: none of anyOf: {tried}")
    types: dict[str, Any] = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
        "boolean": bool, "null": type(None),
    }  # fmt: skip
    if "type" in schema:
        assert isinstance(value, types[schema["type"]]), (
            f"{where}: {value!r} is no {schema['type']}"
        )
        assert isinstance(value, bool) <= (schema["type"] == "boolean"), where
    assert "enum" not in schema or value in schema["enum"], f"{where}: {value!r}"
    assert "const" not in schema or value == schema["const"], f"{where}: {value!r}"
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), where
        other = schema.get("additionalProperties", True)
        for key, part in value.items():
            rule = schema.get("properties", {}).get(key, other)
            assert rule is not False, f"{where}: {key} is not in the schema"
            if isinstance(rule, dict):
                fits(part, rule, root, f"{where}.{key}")
    if isinstance(value, list):
        for index, part in enumerate(value):
            rules = schema.get("prefixItems", ())
            rule = rules[index] if index < len(rules) else schema.get("items", {})
            fits(part, rule, root, f"{where}[{index}]")


def test_the_shipped_schema_is_the_manifests(tmp_path: Path) -> None:
    data = json.loads(manifest.write(example_result(), tmp_path).read_text())
    schema = manifest.shipped_schema()
    assert schema == json.loads(json.dumps(manifest.json_schema()))
    assert schema["title"].endswith(f"version {data['schema']}")
    assert set(schema["required"]) <= set(data) <= set(schema["properties"])
    fits(data, schema, schema)
    for wrong in ({"artifacts": 3}, {"verdict": {"word": "maybe", "exit_code": 0}}):
        with pytest.raises(AssertionError):
            fits(data | wrong, schema, schema)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.00"),
        (23.71, "23.7"),
        (0.00213, "0.00213"),
        (123456.0, "123,456"),
        (1e-6, "1.00e-06"),
        (1e9, "1.00e+09"),
        (999.6, "1,000"),
    ],
)
def test_numbers_are_readable(value: float | None, text: str) -> None:
    assert figures.number(value) == text


def test_durations_are_readable() -> None:
    assert [figures.seconds(s) for s in (0.04, 59.9, 60.0, 3599.6)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "60 min 00 s",
    ]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_escaped_text_is_one_line_without_markup(text: str) -> None:
    found = markdown.escape(text)
    assert "\n" not in found and "<" not in found
    assert all(found[m.start() - 1] == "\\" for m in re.finditer(r"[|`*_\[\]]", found))


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    found = svg.ticks(low, low + span)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in found)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 1e6), st.floats(1.0, 1e6), st.sampled_from(["dense", "plain"])),
        min_size=1,
        max_size=12,
    )
)
def test_any_points_make_a_well_formed_chart(values: list[tuple[float, float, str]]) -> None:
    points = [svg.Point(x, y, f"p{i}", "gguf", r, str(i)) for i, (x, y, r) in enumerate(values)]
    root = ET.fromstring(svg.scatter(points, "x", "y", "t & <t>"))
    marks = [n for n in root.iter() if n.attrib.get("class", "").startswith("open")]
    assert len(marks) == len(points)


def test_labels_of_near_points_do_not_cover_each_other() -> None:
    points = [svg.Point(100 + i, 20 + i / 10, f"Q{i}_0 dense", "gguf", "plain", "") for i in (0, 1)]
    far = svg.Point(300, 40, "F16", "gguf", "dense", "")
    root = ET.fromstring(svg.scatter([*points, far], "x", "y", "t"))
    names = [n for n in root.iter() if n.attrib.get("class", "").startswith("name")]
    spots = {(n.attrib["x"], n.attrib["y"]) for n in names}
    assert len(spots) == 3


def test_labels_stay_off_the_axes() -> None:
    """The decode picture of a frontier: the lowest points lie close together at the left."""
    spots = [
        (0.80854, 0.003916, "Q8_0"),
        (0.78660, 0.007038, "Q6_K"),
        (0.73470, 0.006364, "Q5_K_M"),
        (0.77176, 0.032920, "Q4_K_M"),
        (0.78263, 0.011862, "105MB"),
        (0.95587, 0.079602, "Q3_K_M"),
        (0.90206, 0.022472, "92MB"),
        (0.97195, 0.090535, "IQ4_XS"),
        (0.97055, 0.261560, "Q2_K"),
        (0.99030, 0.051495, "80MB"),
        (1.09376, 0.277317, "70MB"),
        (1.11977, 0.639649, "60MB"),
    ]
    points = [svg.Point(x, y, name, "gguf", "plain", "") for x, y, name in spots]
    root = ET.fromstring(svg.scatter(points, "x", "y", "t"))
    names = [n for n in root.iter() if n.attrib.get("class", "").startswith("name")]
    grid = [n for n in root.iter() if n.attrib.get("class") == "grid"]
    bottom = max(float(n.attrib["y2"]) for n in grid)
    assert all(float(n.attrib["y"]) <= bottom for n in names)


def test_speedups_share_one_scale_and_show_the_gate() -> None:
    bars = [svg.Bar("a", "gguf", Speedup(1.2, 1.1, 1.3), (1.15, 1.25), 1.05)]
    low, high = svg.range_of(bars)
    assert low < 1.0 and high > 1.3
    root = ET.fromstring(svg.intervals(bars, low, high, "t"))
    kinds = [n.attrib.get("class", "") for n in root.iter()]
    assert kinds.count("limit") == 1 and kinds.count("round gguf") == 2
    assert svg.intervals([], low, high, "t") == ""


@pytest.mark.slow
def test_browser_shows_the_report_at_two_widths_without_overflow(tmp_path: Path) -> None:
    """Pages in frames of a phone's and a desk's width, whose title tells their scroll widths."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here: apt-get install chromium")
    cases = [(kind, width) for kind in ("passed", "failed", "hostile") for width in (390, 1280)]
    frames = []
    for kind, width in cases:
        (tmp_path / f"{kind}.html").write_text(html.render(RESULTS[kind]()))
        frames.append(f'<iframe src="{kind}.html" width="{width}" height="900"></iframe>')
    script = (
        "<script>onload = () => { document.title = 'wide ' + Array.from(frames).map("
        "f => f.document.documentElement.scrollWidth).join(' '); }</script>"
    )
    style = "<style>iframe { border: 0 }</style>"
    (tmp_path / "frames.html").write_text(
        f"<!DOCTYPE html><title>x</title>{style}{''.join(frames)}{script}"
    )
    flags = "headless no-sandbox disable-gpu disable-background-networking disable-sync"
    flags += " disable-component-update no-first-run allow-file-access-from-files"
    flags += " hide-scrollbars dump-dom"
    done = subprocess.run(
        [
            browser,
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            f"file://{tmp_path / 'frames.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = re.search(r"<title>wide ([\d ]+)</title>", done.stdout)
    assert found is not None, done.stdout[-500:]
    widths = [int(w) for w in found[1].split()]
    assert widths == [width for _, width in cases]
