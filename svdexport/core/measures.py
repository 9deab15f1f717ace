"""What a measurement of an artifact says: plain frozen dataclasses that `verify` fills and
`report` shows.

All fields are JSON-ready (numbers, strings, tuples, dictionaries), and their names are the keys
of `--json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SpeedWord = Literal["ok", "slower", "inconclusive"]
VerdictWord = Literal["pass", "fail", "inconclusive"]
GateKind = Literal["integrity", "quality", "speed", "size"]


@dataclass(frozen=True)
class Spread:
    """How far a figure can be trusted: standard error and 95 % interval, by bootstrap over
    windows.
    """

    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Generation:
    """A greedy continuation of a prompt."""

    prompt: str
    text: str
    tokens: int
    looping: bool


@dataclass(frozen=True)
class Quality:
    """Quality of one artifact on one text.

    `perplexity` is exp of the mean negative log likelihood (nats) of positions 1..T-1 of every
    window. The figures against a reference are None where there was no reference: `mean_kld` and
    `kld_p999` are KL(reference || artifact) in nats, mean and 99.9 % quantile over positions;
    `same_top` is the share of positions whose most likely token is the reference's;
    `perplexity_ratio` is paired, window by window, with the reference on the same tokens.
    `spreads` holds the error of each figure under the figure's name.
    """

    perplexity: float
    tokens: int
    windows: int
    context: int
    mean_kld: float | None = None
    kld_p999: float | None = None
    same_top: float | None = None
    perplexity_ratio: float | None = None
    spreads: dict[str, Spread] = field(default_factory=dict)
    window_nll: tuple[float, ...] = ()
    window_kld: tuple[float, ...] = ()
    generations: tuple[Generation, ...] = ()


@dataclass(frozen=True)
class Embeddings:
    """Sentence embeddings of one artifact of an encoder beside the dense model's, text by text.

    `mean_cosine` is between the two embeddings of a text, `low_cosine` its 5 % quantile over
    texts; `rank_correlation` is Spearman's, between the similarities (cosines) of all pairs of
    texts, None for fewer than 8 texts. `spreads` holds the error of each figure, by bootstrap
    over texts.
    """

    mean_cosine: float
    low_cosine: float
    rank_correlation: float | None
    texts: int
    tokens: int
    spreads: dict[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True)
class Parity:
    """Logits of a written file in its runtime against torch holding the values read back from
    that file.

    `top1_agreement` is a share of positions, `max_abs_diff` and `mean_abs_diff` are in logits,
    `spread` is the standard deviation of the reference's logits, `relative` is the root mean
    square difference over `spread`, `worst_relative` the same at the worst position.
    `activation_noise` is the relative difference that rounding activations as the runtime does
    makes in torch, None where the runtime keeps them exact. `problems` says which tolerance was
    missed; empty means the file passed.
    """

    top1_agreement: float
    max_abs_diff: float
    mean_abs_diff: float
    spread: float
    relative: float
    worst_relative: float
    positions: int
    min_top1: float
    max_relative: float
    activation_noise: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class SpeedSettings:
    """How speed is measured: `prefill` are prompt lengths in tokens, `decode` the number of
    single-token steps (0 for an encoder, which has none).
    """

    threads: int
    rounds: int = 9
    prefill: tuple[int, ...] = (128, 512)
    decode: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One timed sample: the mean of as many calls as make it long enough to be judged.

    `seconds` is what the runtime reports for one call; the rest is of the whole sample, which
    took `span` seconds of wall time, summed over the cores this process may run on:
    `own_cpu`: this process; `other_cpu`: everything else, as busy time of the cores less our own;
    `waited`: our threads were ready and had no core; `steal`: the hypervisor gave the core to
    others; `preempted`: involuntary context switches of this process. `part`: the artifacts were
    loaded anew before each part of the rounds.
    """

    seconds: float
    span: float
    own_cpu: float
    other_cpu: float
    waited: float
    steal: float
    preempted: int
    disturbed: bool = False
    why: str = ""
    part: int = 0


@dataclass(frozen=True)
class Speedup:
    """Baseline's seconds over the artifact's, taken round by round: median and 95 % bootstrap
    interval of the median.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """One metric (a prefill length, or decode) of one artifact; `tps` is tokens over the median
    of the quiet samples.
    """

    metric: str
    tokens: int
    tps: float
    speedup: Speedup | None
    verdict: SpeedWord | None
    disturbed_rounds: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ArtifactSpeed:
    """Speed of one artifact. The headline `prefill_*` figures are those of the longest prompt;
    all are in `timings`.

    The baseline has no speedups and no verdict.
    """

    path: str
    runtime: str
    bytes: int
    baseline: str | None
    prefill_tps: float
    decode_tps: float
    prefill_speedup: Speedup | None
    decode_speedup: Speedup | None
    verdict: SpeedWord | None
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class SpeedReport:
    """What `bench` prints: the baseline first, then each candidate; `verdict` is the worst of the
    candidates'.
    """

    artifacts: tuple[ArtifactSpeed, ...]
    verdict: SpeedWord
    settings: SpeedSettings
    machine: dict[str, str | int | float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What the gates judge: one compressed artifact; a part that was not measured is None.

    `round_trip` is None where it was not checked; empty where every tensor reads back as meant.
    `timed` is false for a checkpoint, which is for training and not for a deployment's runtime.
    """

    path: str
    bytes: int
    quality: Quality | None = None
    speed: ArtifactSpeed | None = None
    parity: Parity | None = None
    round_trip: tuple[str, ...] | None = None
    embeddings: Embeddings | None = None
    timed: bool = True


@dataclass(frozen=True)
class GateResult:
    """One gate. `limit` and `value` have the unit of the gate; `value` is the pessimistic end of
    what was measured.

    `inconclusive` means that the machine was too noisy for `passed` (then false) to mean
    anything.
    """

    name: str
    limit: float | None
    value: float | None
    passed: bool
    kind: GateKind = "quality"
    artifact: str = ""
    inconclusive: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer of a run: `exit_code` is 0 (pass), 3, 4, 5 (fail) or 7 (inconclusive); `reasons`
    are sentences.
    """

    word: VerdictWord
    exit_code: int
    reasons: tuple[str, ...] = ()
