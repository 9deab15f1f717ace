"""A decoder's graph in onnxruntime without the rounding of activations to 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from svdexport.runtimes.ort_rt import OrtRuntime

_ACCURACY = "session.qdq_matmulnbits_accuracy_level"  # where onnxruntime makes the nodes itself
_FOLDER = "session.model_external_initializers_file_folder_path"


class ExactOrtRuntime(OrtRuntime):
    """The same nodes over the same data file; MatMulNBits multiplies in float32.

    Far slower than the graph as it is: for checks, not for use.
    """

    def _load(self, file: Path, options: Any) -> Any:
        model = onnx.load(str(file), load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                for attribute in node.attribute:
                    if attribute.name == "accuracy_level":
                        attribute.i = 0
        options.add_session_config_entry(_ACCURACY, "0")
        options.add_session_config_entry(_FOLDER, str(file.parent.resolve()))
        return self._ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
