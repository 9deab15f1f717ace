from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from svdexport.errors import InputError
from svdexport.export.base import ExportRequest
from svdexport.export.onnx import export
from svdexport.export.onnx_mobile import write_mobile
from svdexport.recipe import OnnxExport
from svdexport.runtimes.inspect_onnx import inspect
from svdexport.runtimes.ort_rt import OrtRuntime
from tests.unit.test_export_onnx import SHARED, TOKENS
from tests.unit.tiny_checkpoints import compress, make_model


def test_the_mobile_model_runs_and_lists_its_operators(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama-tied")
    checkpoint = compress(source, tmp_path / "low", SHARED)
    spec = OnnxExport(precision="int8", mobile=True)
    assert spec.label == "int8-mobile"
    export(ExportRequest(checkpoint, source, None, out, tmp_path, spec))
    found = inspect(out)
    assert found["mobile"]["bytes"] == (out / "mobile" / "model.ort").stat().st_size
    assert found["totals"]["weight_bytes"] < found["mobile"]["bytes"]
    listed = {name for names in found["mobile"]["operators"].values() for name in names}
    assert {"MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized"} <= listed
    assert not [name for name in listed if not name.isidentifier()]
    # The next token is that of the graph for onnxruntime.
    session = onnxruntime.InferenceSession(str(out / "mobile" / "model.ort"))
    feeds = {
        "input_ids": TOKENS[None].astype(np.int64),
        "attention_mask": np.ones((1, TOKENS.size), np.int64),
    }
    past = [v for v in session.get_inputs() if v.name.startswith("past")]
    feeds |= {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in past}
    logits = session.run(["logits"], feeds)[0]
    runtime = OrtRuntime(out, threads=1)
    token = int(logits[0, -1].argmax())
    made = runtime.generate(TOKENS.tolist(), 1)
    runtime.close()
    assert made == ([] if token in runtime._end else [token])


def test_what_the_converter_refuses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\xff\xff\xff")
    (tmp_path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.onnx: onnxruntime's converter"):
        write_mobile(tmp_path, "model.onnx", "model.onnx.data")
