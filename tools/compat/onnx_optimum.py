"""A compressed ONNX folder in optimum's ORTModelForCausalLM, on transformers 4.57.

Needs `pip install 'optimum-onnx[onnxruntime]==0.1.0' 'transformers==4.57.*' torch`:

    python onnx_optimum.py FOLDER "What is the capital of France?"
"""

from __future__ import annotations

import sys

import transformers
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    folder, question = sys.argv[1], sys.argv[2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ORTModelForCausalLM.from_pretrained(folder, file_name="model.onnx", use_cache=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )
    made = model.generate(prompt, max_new_tokens=48, do_sample=False)
    config = model.config
    print(f"transformers {transformers.__version__}, {type(model).__name__}")
    print(f"rope_theta as read from config.json: {config.rope_theta}")
    print(tokenizer.decode(made[0]))


if __name__ == "__main__":
    main()
