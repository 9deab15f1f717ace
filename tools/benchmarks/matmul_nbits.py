"""Speed of onnxruntime's MatMulNBits on this CPU by input width: which ranks fill its steps.

    python tools/benchmarks/matmul_nbits.py --bits 4 --block 32 --widths 736,768,800,864,896,2048

Prints for each width of the input the time of one product (a prompt of --rows tokens, random
weights, accuracy level 4) and its speed. Sessions run one after another, each several times, since
the threads of one that is kept spin beside the next. Needs idle cores.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

WORK = 3e9  # multiplications of a sample


def session(inputs: int, outputs: int, bits: int, block: int, threads: int) -> ort.InferenceSession:
    """A graph of one product."""
    random, blocks = np.random.default_rng(0), -(-inputs // block)
    weight = random.integers(0, 256, (outputs, blocks, block * bits // 8), dtype=np.uint8)
    scales = random.random((outputs, blocks), dtype=np.float32) / 100
    node = helper.make_node(
        "MatMulNBits",
        ["x", "weight", "scales"],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def samples(one: ort.InferenceSession, rows: int, inputs: int, outputs: int) -> list[float]:
    """Seconds of a product, ten times."""
    binding = one.io_binding()
    binding.bind_cpu_input("x", np.random.default_rng(1).random((rows, inputs), dtype=np.float32))
    binding.bind_output("y")
    count, found = max(1, int(WORK / (rows * inputs * outputs))), []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(count):
            one.run_with_iobinding(binding)
        found.append((time.perf_counter() - start) / count)
    return found[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--widths", default="736,768,800,864,896,1024,2048")
    parser.add_argument("--outputs", type=int, default=5632)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    widths = [int(width) for width in args.widths.split(",")]
    found: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(args.repeats):
        for width in widths:
            one = session(width, args.outputs, args.bits, args.block, args.threads)
            found[width] += samples(one, args.rows, width, args.outputs)
    print(f"{args.bits} bits, blocks of {args.block}, {args.rows} x width x {args.outputs}")
    for width, seconds in found.items():
        middle = statistics.median(seconds)
        speed = 2 * args.rows * width * args.outputs / middle / 1e9
        print(f"width {width:5}  {middle * 1e6:7.0f} us  {speed:5.0f} GFLOP/s", flush=True)


if __name__ == "__main__":
    main()
