"""A RunResult with the sizes of a real run (30 layers, 7 linears each), to render reports from.
The numbers are made up.
"""

from __future__ import annotations

import math

from svdexport.core.measures import (
    ArtifactSpeed,
    GateResult,
    Generation,
    Parity,
    Quality,
    Sample,
    Speedup,
    Spread,
    Timing,
    Verdict,
)
from svdexport.report.result import (
    ArtifactResult,
    Comparison,
    PlanRow,
    RunResult,
    SourceModel,
    StageTime,
    TensorHash,
)

LINEARS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
LEADERS = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


def quality(perplexity: float, kld: float, same: float, dense: float = 23.7) -> Quality:
    return Quality(
        perplexity=perplexity,
        tokens=2044,
        windows=4,
        context=512,
        mean_kld=kld,
        kld_p999=kld * 9,
        same_top=same,
        perplexity_ratio=perplexity / dense,
        spreads={
            "perplexity": Spread(perplexity * 0.02, perplexity * 0.96, perplexity * 1.04),
            "mean_kld": Spread(kld * 0.03, kld * 0.94, kld * 1.06),
            "kld_p999": Spread(kld * 0.6, kld * 8, kld * 11),
            "same_top": Spread(0.008, same - 0.016, min(1.0, same + 0.016)),
            "perplexity_ratio": Spread(0.01, perplexity / dense * 0.98, perplexity / dense * 1.02),
        },
        window_nll=(3.1, 3.2, 3.15, 3.3),
        generations=(
            Generation("The capital of France is", " Paris, a city on the Seine.", 8, False),
        ),
    )


def timing(metric: str, tokens: int, tps: float, ratio: float | None) -> Timing:
    samples = tuple(
        Sample(tokens / tps * (1 + 0.004 * (i % 3)), 0.3, 0.59, 0.001, 0.0, 0.0, 1)
        for i in range(9)
    )
    speedup = None if ratio is None else Speedup(ratio, ratio * 0.985, ratio * 1.012)
    verdict = None if ratio is None else ("ok" if ratio > 1 else "slower")
    return Timing(metric, tokens, tps, speedup, verdict, 0, samples)  # type: ignore[arg-type]


def speed(path: str, runtime: str, size: int, tps: float, ratio: float | None) -> ArtifactSpeed:
    short = timing("prefill_128", 128, tps * 1.1, ratio)
    long = timing("prefill_512", 512, tps, ratio)
    tail = timing("decode_64", 64, tps / 10.5, None if ratio is None else ratio * 0.93)
    return ArtifactSpeed(
        path=path,
        runtime=runtime,
        bytes=size,
        baseline=None if ratio is None else "dense",
        prefill_tps=long.tps,
        decode_tps=tail.tps,
        prefill_speedup=long.speedup,
        decode_speedup=tail.speedup,
        verdict=None if ratio is None else "ok",
        timings=(short, long, tail),
    )


def plan() -> tuple[PlanRow, ...]:
    rows = []
    for layer in range(30):
        for kind, (n_out, n_in) in LINEARS.items():
            name = f"model.layers.{layer}.{kind}"
            dense = n_out * n_in
            wave = 0.5 + 0.5 * math.sin(layer / 4 + len(kind))
            if layer in (0, 1, 29) and kind.startswith("mlp"):
                rows.append(
                    PlanRow(name, (n_out, n_in), dense, dense, None, layer, None, "break-even")
                )
                continue
            rank = 32 * max(1, round((n_in * n_out / (n_in + n_out)) * (0.4 + 0.4 * wave) / 32))
            leader = f"model.layers.{layer}.{LEADERS.get(kind, kind)}"
            params = rank * n_out + (rank * n_in if leader == name else 0)
            rows.append(
                PlanRow(
                    name,
                    (n_out, n_in),
                    dense,
                    params,
                    rank,
                    layer,
                    leader,
                    "",
                    0.02 * wave,
                    0.08 + 0.3 * (1 - wave),
                )
            )
    rows.append(
        PlanRow("lm_head", (49152, 576), 49152 * 576, 49152 * 576, reason="listed under ignore")
    )
    return tuple(rows)


def artifact(
    path: str, kind: str, role: str, size: int, figures: tuple[float, float, float, float | None]
) -> ArtifactResult:
    form = "gguf" if path.endswith(".gguf") else "onnx"
    ppl, kld, same, ratio = figures
    runtime = "llama.cpp" if form == "gguf" else "onnxruntime-genai"
    base = 900.0 if form == "gguf" else 700.0
    compressed = role == "compressed"
    return ArtifactResult(
        path=path,
        format=form,
        type=kind,
        role=role,  # type: ignore[arg-type]
        runtime=runtime,
        bytes=size,
        quality=quality(ppl, kld, same),
        speed=speed(path, runtime, size, base * (ratio or 1.0), ratio),
        parity=Parity(0.998, 0.21, 0.02, 3.1, 0.008, 0.02, 96, 0.85, 0.12) if compressed else None,
        files={path: "ab" * 32} if compressed else {},
        tensors={"blk.0.attn_q.lr_b.weight": TensorHash((96, 576), kind, 58752, "cd" * 32)}
        if compressed
        else {},
        kept=compressed,
    )


def example_result() -> RunResult:
    return RunResult(
        name="SmolLM2-135M-Instruct",
        created="2025-06-01T12:00:00Z",
        command="svdexport run recipes/quickstart.yaml --out out/quickstart",
        recipe={
            "schema": 1,
            "model": {"path": "./SmolLM2-135M-Instruct"},
            "compress": {"method": "kfac_svd", "budget": {"param_ratio": 0.8}},
            "export": [{"format": "gguf", "type": "Q8_0"}, {"format": "onnx", "precision": "int4"}],
        },
        recipe_text="schema: 1\nmodel: {path: ./SmolLM2}\n# <script>alert(1)</script>\n",
        recipe_sha256="12" * 32,
        source=SourceModel(
            name="SmolLM2-135M-Instruct",
            architecture="LlamaForCausalLM",
            params=134_515_008,
            license="apache-2.0",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            files={"model.safetensors": "ef" * 32, "config.json": "01" * 32},
        ),
        plan=plan(),
        artifacts=(
            artifact("dense-Q8_0.gguf", "Q8_0", "dense", 144_800_000, (23.73, 0.0021, 0.981, None)),
            artifact(
                "model-Q8_0.gguf", "Q8_0", "compressed", 121_300_000, (30.9, 0.231, 0.741, 1.21)
            ),
            artifact("dense-onnx", "int4", "dense", 116_000_000, (27.1, 0.112, 0.842, None)),
            artifact("onnx-int4", "int4", "compressed", 104_000_000, (35.2, 0.322, 0.702, 1.12)),
            artifact("plain-Q4_0.gguf", "Q4_0", "plain", 91_700_000, (27.96, 0.151, 0.812, 1.3)),
        ),
        gates=(
            GateResult("max_perplexity_ratio", 1.5, 1.33, True, "quality", "model-Q8_0.gguf"),
            GateResult("max_mean_kld", 0.5, 0.245, True, "quality", "model-Q8_0.gguf"),
            GateResult("min_prefill_speedup", 1.05, 1.19, True, "speed", "model-Q8_0.gguf"),
            GateResult("min_decode_speedup", 1.05, 1.11, True, "speed", "model-Q8_0.gguf"),
            GateResult("max_bytes", 130_000_000, 121_300_000, True, "size", "model-Q8_0.gguf"),
        ),
        verdict=Verdict("pass", 0),
        stages=(
            StageTime("load", 2.1),
            StageTime("calibrate", 61.0),
            StageTime("factorize", 40.2),
            StageTime("export", 22.5),
            StageTime("verify", 95.9),
        ),
        versions={
            "svdexport": "0.1.0",
            "torch": "2.13.0",
            "onnxruntime": "1.31.1",
            "python": "3.11.7",
        },
        machine={"cpu": "x86-64", "cores": 2, "memory_bytes": 25_769_803_776},
        seeds={"calibration": 0, "speed": 0},
        threads=2,
        evaluation_text="held-out text written by the model itself",
        equal_bytes=(
            Comparison(
                artifact="model-Q8_0.gguf",
                plain="plain-Q4_0.gguf",
                plain_is="better",
                bytes=121_300_000,
                plain_bytes=91_700_000,
                perplexity=30.9,
                plain_perplexity=27.96,
                decode_speedup=1.12,
                plain_decode_speedup=1.21,
            ),
        ),
    )
