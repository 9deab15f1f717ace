"""Recipes: what is accepted, what is refused and with which words."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from svdexport.errors import RecipeError
from svdexport.pipeline.run import damping_notes
from svdexport.recipe import (
    Compress,
    GgufExport,
    OnnxExport,
    Recipe,
    canonical_json,
    json_schema,
    load_recipe,
    recipe_hash,
)
from svdexport.recipe.load import validate
from svdexport.recipe.settings import Asvd

TEXT = """\
schema: 1
model: {path: ./SmolLM2-135M-Instruct}
calibration: {source: self, samples: 64, length: 512, seed: 0}
compress: {method: svd_llm, group: true, targets: ["re:.*(attn|mlp).*"], ignore: [lm_head],
           budget: {param_ratio: 0.8}, allocate: greedy}
export: [{format: gguf, type: Q8_0}, {format: onnx, precision: int4}]
gates: {max_perplexity_ratio: 1.5, max_mean_kld: 0.3, min_decode_speedup: 1.2, max_bytes: 100MB}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT)
    return file


def refuse(path: Path, *overrides: str) -> str:
    begin = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert time.process_time() - begin < 2
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_recipe_as_a_whole(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model.path == path.parent / "SmolLM2-135M-Instruct"
    assert recipe.export == (GgufExport(type="Q8_0"), OnnxExport(precision="int4"))
    assert recipe.gates.max_bytes == 100_000_000
    assert recipe.compress.budget.param_ratio == 0.8
    assert recipe.speed.prefill == (128, 512)
    with pytest.raises(ValueError, match="frozen"):
        recipe.speed.rounds = 3  # type: ignore[misc]


def test_overrides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(
        path,
        [
            "export.0.type=Q4_0",
            "export.2.format=checkpoint",
            "speed.prefill=[64]",
            "compress.damping=1e-3",
            "gates.max_mean_kld=null",
            "evaluate.text=t.txt",
            "compress.budget.param_ratio=1",
        ],
    )
    assert recipe.export[0] == GgufExport(type="Q4_0")
    assert recipe.export[2].format == "checkpoint"
    assert recipe.speed.prefill == (64,)
    assert recipe.compress.damping == 1e-3
    assert recipe.compress.budget.param_ratio == 1
    assert recipe.gates.max_mean_kld is None
    # As a shell completes it: relative to the current folder, not to the recipe's.
    assert recipe.evaluate.text == elsewhere / "t.txt"


def test_a_damping_that_is_not_read_is_noted(path: Path) -> None:
    given, other = "compress.damping=0.1", "compress.method=kfac_svd"
    (note,) = damping_notes(load_recipe(path, [given]))
    assert "method svd_llm uses none" in note
    assert damping_notes(load_recipe(path)) == ()
    assert damping_notes(load_recipe(path, [given, other])) == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("export.0.tpye=Q8_0", "export.0.tpye: unknown key; did you mean 'type'?"),
        ("modle.path=x", "modle: unknown key; did you mean 'model'?"),
        ("param_ratio=0.5", "did you mean 'compress.budget.param_ratio'?"),
        ("compress.method=svd_lm", "compress.method: 'svd_lm' is not one of"),
        ("compress.method=svd_lm", "did you mean 'svd_llm'?"),
        ("export.0.type=q8_0", "did you mean 'Q8_0'?"),
        ("export.0.format=ggfu", "did you mean 'gguf'?"),
        ("export.1.block_size=48", "is not one of 16, 32, 64, 128, 256"),
        ("compress.budget.param_ratio=.nan", "'.nan' is not a finite number"),
        ("compress.budget.param_ratio=.inf", "'.inf' is not a finite number"),
        ("compress.budget.param_ratio=1e999", "not a finite number"),
        ("compress.budget.param_ratio=0", "greater than 0"),
        ("compress.budget.param_ratio=1.01", "less than or equal to 1"),
        ("compress.budget.param_ratio='0.5'", "valid number"),
        ("compress.budget=0.5", "compress.budget: must be a mapping"),
        ("compress.rank_multiple=0", "compress.rank_multiple: must be greater than or equal to 1"),
        ("compress.rank_multiple=32.0", "compress.rank_multiple: "),
        ("compress.rank_multiple=true", "compress.rank_multiple: "),
        ("compress.group=yes", "compress.group: must be a valid boolean"),
        ("compress.targets=['re:(']", "not a regular expression"),
        ("compress.targets=['a*b']", "write 're:...'"),
        ("compress.targets=[]", "compress.targets: "),
        ("schema=2", "schema: 2 is not one of 1"),
        ("export=[]", "export: "),
        ("export.1.format=gguf", "export.1.precision: unknown key"),
        ("gates.max_bytes=12XB", "'12XB' is not a size"),
        ("gates.max_bytes=0", "greater than 0"),
        ("gates.max_bytes='1.5'", "'1.5' is not a size"),
        ("gates.max_bytes='\u0663'", "is not a size"),
        ("gates.min_same_top=1.5", "gates.min_same_top"),
        ("calibration.source=file", "source is file, so file must say which"),
        ("calibration.file=x", "set source: file"),
        ("model.gguf=x", "exactly one of path"),
        ("model.path=null", "exactly one of path"),
        ("model.path=''", "model.path: an empty or malformed path"),
        ("export.9.type=F16", "'9' is not an entry of a list of 2"),
        ("export.type=F16", "'type' is not an entry"),
        ("model.path.x=1", "has no keys"),
        ("model={path: x}", "one by one"),
        ("model", "write key=value"),
        ("=1", "write key=value"),
        ("a=!!python/object/apply:os.system [x]", "is not allowed"),
        ("model=*x", "aliases"),
        ("speed.threads=[", "not valid YAML"),
    ],
)
def test_what_is_refused_and_with_which_words(path: Path, override: str, words: str) -> None:
    message = refuse(path, override)
    assert words in message
    assert message.startswith(("recipe.yaml: ", "--set "))


def test_every_problem_has_its_line(path: Path) -> None:
    lines = refuse(path, "modle.x=1", "compress.rank_multiple=0", "speed.rounds=x").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("recipe.yaml: ") for line in lines)


def test_a_missing_key_and_a_missing_file(path: Path) -> None:
    path.write_text("schema: 1\n")
    lines = refuse(path).splitlines()
    assert lines == [f"recipe.yaml: {k}: missing; add it" for k in ("model", "compress", "export")]
    path.unlink()
    assert "no such recipe" in refuse(path)
    path.mkdir()
    assert "a folder; a recipe is a YAML file" in refuse(path)


@pytest.mark.parametrize(
    ("written", "size"),
    [(7, 7), ("7B", 7), ("1.5 kB", 1500), ("60MB", 60_000_000), ("2MiB", 2**21), ("' 60'", 60)],
)
def test_sizes(path: Path, written: Any, size: int) -> None:
    assert load_recipe(path, [f"gates.max_bytes={written}"]).gates.max_bytes == size


def test_the_hash_is_of_the_recipe_and_not_of_its_place(path: Path, tmp_path: Path) -> None:
    first = recipe_hash(load_recipe(path))
    moved = tmp_path / "far" / "away.yaml"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    assert recipe_hash(load_recipe(moved)) == first
    assert str(tmp_path) not in canonical_json(load_recipe(path))
    moved.write_text("# a comment\n" + TEXT.replace("0.8", "0.80"))
    assert recipe_hash(load_recipe(moved)) == first
    moved.write_text(TEXT.replace("0.8", "0.81"))
    assert recipe_hash(load_recipe(moved)) != first
    assert recipe_hash(load_recipe(path, ["model.path=/other"])) != first


def test_the_canonical_form_is_a_recipe_again(path: Path) -> None:
    recipe = load_recipe(path)
    again = validate(yaml.safe_load(canonical_json(recipe)), "again", path.parent)
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_schema_has_all_keys_and_names_of_methods() -> None:
    schema = json_schema()
    assert set(schema["required"]) == {"schema", "model", "compress", "export"}
    assert set(schema["properties"]) == {
        field.alias or name for name, field in Recipe.model_fields.items()
    }
    methods = schema["$defs"]["Compress"]["properties"]["method"]["enum"]
    assert tuple(methods) == get_args(Compress.model_fields["method"].annotation)
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        b"!!python/object/apply:os.system ['true']",
        b"schema: !custom 1",
        b"schema: !!str 1",
        BOMB.encode(),
        b"<<: *x",
        b"schema: 1\nschema: 1",
        b"? [a]\n: 1",
        b"1: 2",
        b"[" * 900_000,
        b"- 1\n" * 200_000,
        b"a: " + b"9" * 900_000,
        b"a: '" + b"y " * 300_000 + b"'",
        b"#" * 100_000_000,
        b"\xff\xfe\x00",
        b"\x80",
        b'a: "\\UFFFFFFFF"',
        b"a: 1\n---\nb: 1",
        b"",
        b"just text",
        b"a: \x00",
    ],
    ids=range(20),
)
def test_row_11_and_12_no_code_no_bombs_no_guesses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    message = refuse(path)
    assert all(line.isprintable() and len(line) < 400 for line in message.splitlines())


def test_row_11_nothing_is_run(path: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{marker}']")
    assert "is not allowed" in refuse(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("010", 10), ("1:30", "1:30"), ("1e-3", 1e-3), ("1_0", "1_0"), ("~", None)],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    from svdexport.recipe import strict_yaml

    assert strict_yaml.parse(f"a: {text}", "x") == {"a": value}
    assert strict_yaml.parse(f"a: '{text}'", "x") == {"a": text}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["path", "format", "type", "budget", "param_ratio", "x", "gguf", "source"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "schema"]), VALUES))
def test_any_data_is_a_recipe_or_a_recipe_error(data: dict[str, Any]) -> None:
    try:
        recipe = validate(data, "r.yaml")
    except RecipeError as error:
        assert all(line.startswith("r.yaml: ") for line in str(error).splitlines())
    else:
        assert recipe_hash(recipe)


def test_settings_belong_to_one_method(path: Path) -> None:
    recipe = load_recipe(path, ["compress.method=asvd", "compress.settings.alpha=0.25"])
    assert recipe.compress.settings == Asvd(alpha=0.25)
    assert load_recipe(path, ["compress.method=asvd"]).compress.settings == Asvd()
    assert '"settings":{"alpha":0.25}' in canonical_json(recipe)
    wrong = refuse(path, "compress.method=asvd", "compress.settings.alhpa=0.25")
    assert "compress.settings: asvd has no key 'alhpa'; did you mean 'alpha'?" in wrong
    assert "svd_llm has no settings" in refuse(path, "compress.settings.alpha=0.25")
    assert "compress.settings.alpha: " in refuse(
        path, "compress.method=asvd", "compress.settings.alpha=many"
    )
    assert "did you mean 'min_ratio'?" in refuse(
        path, "compress.allocate=adacr", "compress.allocation.min_rato=0.1"
    )
    assert "not a regular expression" in refuse(
        path, "compress.method=basis_sharing", "compress.settings.apart=['re:(']"
    )
    assert "alpha" in str(json_schema()["$defs"]["Compress"]["properties"]["settings"])


@pytest.mark.parametrize(
    ("compress", "rest", "words"),
    [
        (
            "{method: emb_ae, budget: {param_ratio: 0.5}}",
            "refine: {method: als}\nexport: [{format: checkpoint}]",
            "emb_ae makes none",
        ),
        (
            "{method: svd_llm, sequential: true, budget: {param_ratio: 0.5}}",
            "refine: [{method: als}, {method: distill, steps: 1}]\nexport: [{format: checkpoint}]",
            "refine als .* leave one of the two out",
        ),
        (
            "{method: kfac_svd, sequential: true, budget: {bytes: 1MB}}",
            "quantize: {algorithm: gptq}\nexport: [{format: gguf, type: mixed}]",
            "needs quantize.sequential: true",
        ),
        (
            "{method: kfac_svd, allocate: asvd, budget: {bytes: 1MB}}",
            "quantize: {algorithm: gptq}\nexport: [{format: gguf, type: mixed}]",
            "leave out allocate: asvd",
        ),
        (
            "{method: svd, budget: {param_ratio: 0.5}}",
            "export: [{format: checkpoint}]\ngates: {min_decode_speedup: 1.0}",
            "gates.min_decode_speedup: a checkpoint is not timed",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, compress: str, rest: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"schema: 1\nmodel: {{path: m}}\ncompress: {compress}\n{rest}\n")
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)
