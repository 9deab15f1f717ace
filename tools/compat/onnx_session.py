"""A compressed ONNX folder in a plain onnxruntime session: greedy text through the cache.

Needs nothing but `pip install onnxruntime tokenizers numpy`:

    python onnx_session.py FOLDER "The capital of France is"
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    inputs = {value.name: value for value in session.get_inputs()}
    past = {
        name: np.zeros((1, value.shape[1], 0, value.shape[3]), TYPES[value.type])
        for name, value in inputs.items()
        if name.startswith("past_key_values.")
    }
    outputs = [value.name for value in session.get_outputs()]
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    made: list[int] = []
    step = np.array([ids], np.int64)
    start = time.perf_counter()
    for _ in range(count):
        total = len(ids) + len(made)
        feeds = {
            "input_ids": step,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - step.shape[1], total, dtype=np.int64)[None],
        }
        feeds = {name: value for name, value in feeds.items() if name in inputs} | past
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        made.append(int(found["logits"][0, -1].argmax()))
        step = np.array([made[-1:]], np.int64)
    seconds = time.perf_counter() - start
    print(f"onnxruntime {onnxruntime.__version__}, {len(inputs)} inputs: {list(inputs)[:4]} ...")
    print(prompt + tokenizer.decode(made))
    print(f"{count / seconds:.1f} tokens/s with the prompt's time, cache copied every step")


if __name__ == "__main__":
    main()
