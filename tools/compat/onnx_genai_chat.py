"""A chat with a compressed ONNX folder in onnxruntime-genai, by the model's own template.

Needs nothing but `pip install onnxruntime-genai`:

    python onnx_genai_chat.py FOLDER "What is the capital of France?"
"""

from __future__ import annotations

import json
import sys
import time

import onnxruntime_genai as genai


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder, question = sys.argv[1], sys.argv[2]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 48
    model = genai.Model(folder)
    tokenizer = genai.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": question}])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = tokenizer.encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    stream = tokenizer.create_stream()
    print(f"onnxruntime-genai {genai.__version__}, a prompt of {len(ids)} tokens")
    print(prompt, end="")
    generator.append_tokens(ids)
    start, made = time.perf_counter(), 0
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
        made += 1
    print(f"\n{made} tokens, {made / (time.perf_counter() - start):.1f} tokens/s")


if __name__ == "__main__":
    main()
