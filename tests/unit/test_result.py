"""RunResult survives JSON, and its schema accepts what it writes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdexport.report import result as rr
from tests.unit.report_example import example_result


def test_json_round_trip_keeps_every_field() -> None:
    result = example_result()
    again = rr.from_json(rr.to_json(result))
    assert again == result
    assert rr.to_json(again) == rr.to_json(result)


def test_dictionary_uses_the_keys_scripts_rely_on() -> None:
    data = rr.to_dict(example_result())
    artifact = next(a for a in data["artifacts"] if a["role"] == "compressed")
    assert {"perplexity", "tokens", "mean_kld", "same_top"} <= set(artifact["quality"])
    speed = artifact["speed"]
    assert {
        "path",
        "bytes",
        "prefill_tps",
        "decode_tps",
        "prefill_speedup",
        "decode_speedup",
        "verdict",
    } <= set(speed)
    assert set(speed["decode_speedup"]) == {"median", "low", "high"}
    assert {"name", "limit", "value", "passed"} <= set(data["gates"][0])


def test_other_schema_version_is_refused() -> None:
    data = rr.to_dict(example_result())
    data["schema"] = 2
    with pytest.raises(ValueError, match="schema 2"):
        rr.from_dict(data)


def test_wrong_field_is_named() -> None:
    data = rr.to_dict(example_result())
    data["artifacts"][0]["bytes"] = "many"
    with pytest.raises(ValueError, match=r"artifacts\.0\.bytes"):
        rr.from_dict(data)


def test_non_finite_figure_is_not_written() -> None:
    result = example_result()
    artifact = result.artifacts[0]
    assert artifact.quality is not None
    broken = dataclasses.replace(
        artifact, quality=dataclasses.replace(artifact.quality, perplexity=float("nan"))
    )
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        rr.to_json(dataclasses.replace(result, artifacts=(broken,)))


def test_schema_lists_the_required_keys() -> None:
    schema: dict[str, Any] = rr.json_schema()
    json.dumps(schema)
    assert {"recipe", "artifacts", "gates", "verdict"} <= set(schema["required"])
    assert "Quality" in schema["$defs"]


@given(
    st.text(max_size=40), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**60)
)
def test_any_text_and_number_survive(text: str, number: float, size: int) -> None:
    row = rr.PlanRow(text, (1, 2), size, size, reason=text, relative_error=number)
    result = dataclasses.replace(example_result(), plan=(row,), recipe={"key": text})
    assert rr.from_json(rr.to_json(result)) == result
