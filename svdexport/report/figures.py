"""Numbers as people read them, and the rows that every report shows."""

from __future__ import annotations

from dataclasses import dataclass

from svdexport.core.measures import GateResult, Quality, Speedup
from svdexport.report.result import ArtifactResult, Comparison, PlanRow, RunResult, file_name

NONE = "–"
ROLES = {"compressed": "low rank", "dense": "dense", "plain": "plainly quantised"}


@dataclass(frozen=True)
class Row:
    """One artifact as a table shows it, `–` where nothing was measured; `group` numbers the files
    that belong together."""

    group: str
    artifact: str
    role: str
    runtime: str
    size: str
    perplexity: str
    perplexity_error: str
    mean_kld: str
    same_top: str
    prefill_tps: str
    prefill_speedup: str
    prefill_interval: str
    decode_tps: str
    decode_speedup: str
    decode_interval: str


@dataclass(frozen=True)
class DenseGroup:
    """Linears that stayed dense for one reason."""

    reason: str
    names: tuple[str, ...]
    params: int


def rows(result: RunResult) -> list[Row]:
    """A row for each artifact, each format's dense twin before its compressed files."""
    order = {"dense": 0, "compressed": 1, "plain": 2}
    artifacts = {a.path: a for a in result.artifacts}
    rivals = {c.plain: artifacts[c.artifact] for c in reversed(_compared(result))}

    def group(artifact: ArtifactResult) -> tuple[str, str]:
        """A plain file stands with the compressed one that it is compared with."""
        peer = rivals.get(artifact.path, artifact)
        return peer.label, peer.runtime

    groups = list(dict.fromkeys(group(a) for a in result.artifacts if a.role != "plain"))
    groups += [g for g in map(group, result.artifacts) if g not in groups]
    ordered = sorted(result.artifacts, key=lambda a: (groups.index(group(a)), order[a.role]))
    return [_row(artifact, groups.index(group(artifact))) for artifact in ordered]


def equal_bytes(result: RunResult) -> list[str]:
    """A sentence for each compressed file that has a plainly quantised rival of like size."""
    labels = {a.path: a.label for a in result.artifacts}
    return [_sentence(found, labels) for found in _compared(result)]


def _sentence(found: Comparison, labels: dict[str, str]) -> str:
    """Which of the two is better, with both sizes, perplexities and speedups."""
    words = {
        "better": "plain quantisation is better",
        "worse": "plain quantisation is worse",
        "undecided": "the text does not tell the two apart",
    }
    speed = ""
    if found.decode_speedup is not None and found.plain_decode_speedup is not None:
        speed = f", decode {found.decode_speedup:.2f}x against {found.plain_decode_speedup:.2f}x"
    return (
        f"{labels[found.artifact]} against plain {labels[found.plain]}, "
        f"{megabytes(found.bytes)} against {megabytes(found.plain_bytes)} MB: "
        f"{words[found.plain_is]} (perplexity {number(found.perplexity)} against "
        f"{number(found.plain_perplexity)}{speed})"
    )


def _compared(result: RunResult) -> list[Comparison]:
    """Comparisons of which both files are among the artifacts."""
    paths = {artifact.path for artifact in result.artifacts}
    return [c for c in result.equal_bytes if {c.artifact, c.plain} <= paths]


def _row(artifact: ArtifactResult, group: int) -> Row:
    quality, speed = artifact.quality, artifact.speed
    prefill = None if speed is None else speed.prefill_speedup
    decode = None if speed is None else speed.decode_speedup
    return Row(
        group=str(group),
        artifact=artifact.label,
        role=ROLES[artifact.role],
        runtime=artifact.runtime,
        size=megabytes(artifact.bytes),
        perplexity=number(None if quality is None else quality.perplexity),
        perplexity_error=_error(quality, "perplexity"),
        mean_kld=number(None if quality is None else quality.mean_kld),
        same_top=percent(None if quality is None else quality.same_top),
        prefill_tps=number(None if speed is None else speed.prefill_tps),
        prefill_speedup=times(prefill),
        prefill_interval=interval(prefill),
        decode_tps=number(speed.decode_tps if speed and speed.decode_tps else None),
        decode_speedup=times(decode),
        decode_interval=interval(decode),
    )


def _error(quality: Quality | None, name: str) -> str:
    if quality is None or name not in quality.spreads:
        return ""
    return f"±{number(quality.spreads[name].stderr, 2)}"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if value is None:
        return NONE
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def megabytes(count: int) -> str:
    """Bytes in megabytes of 10^6 bytes."""
    return f"{count / 1e6:,.1f}"


def percent(share: float | None) -> str:
    """A share in percent, with one decimal."""
    return NONE if share is None else f"{share * 100:.1f} %"


def times(speedup: Speedup | None) -> str:
    """A speedup's median."""
    return NONE if speedup is None else f"{speedup.median:.2f}x"


def interval(speedup: Speedup | None) -> str:
    """A speedup's 95 % interval."""
    return "" if speedup is None else f"{speedup.low:.2f}–{speedup.high:.2f}"


def seconds(value: float) -> str:
    """A duration as `48.2 s`, `3 min 12 s` or `5 h 07 min`."""
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole >= 2 * 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s"


def gate_values(gate: GateResult) -> tuple[str, str]:
    """Limit and value of a gate as text."""

    def text(value: float | None) -> str:
        if value is None:
            return NONE
        return f"{megabytes(int(value))} MB" if gate.kind == "size" else f"{value:.4g}"

    return text(gate.limit), text(gate.value)


def gate_word(gate: GateResult) -> str:
    """passed, failed or inconclusive."""
    if gate.passed:
        return "passed"
    return "inconclusive" if gate.inconclusive else "failed"


def headline(result: RunResult) -> str:
    """The verdict in one sentence."""
    word = result.verdict.word
    count = len(result.gates)
    if word == "pass":
        return f"All {count} gates passed." if count else "No gate was set; the files are as meant."
    failed = sum(not g.passed and not g.inconclusive for g in result.gates)
    if word == "fail":
        return f"{failed} of {count} gates failed (exit code {result.verdict.exit_code})."
    open_ = sum(g.inconclusive for g in result.gates)
    return (
        f"The machine was too noisy to judge {open_} of {count} gates "
        f"(exit code {result.verdict.exit_code})."
    )


def factorised(result: RunResult) -> list[PlanRow]:
    """Linears that became pairs."""
    return [row for row in result.plan if row.rank is not None]


def kept_dense(result: RunResult) -> list[DenseGroup]:
    """Linears that stayed dense, by reason, most parameters first."""
    groups: dict[str, list[PlanRow]] = {}
    for row in result.plan:
        if row.rank is None:
            groups.setdefault(row.reason or "not said", []).append(row)
    found = [
        DenseGroup(reason, tuple(r.name for r in members), sum(r.params for r in members))
        for reason, members in groups.items()
    ]
    return sorted(found, key=lambda group: -group.params)


def kept_ratio(result: RunResult) -> float | None:
    """Parameters that are left of the planned linears, as a share; None without a plan."""
    dense = sum(row.params_dense for row in result.plan)
    return sum(row.params for row in result.plan) / dense if dense else None


def text_name(result: RunResult) -> str:
    """What quality was measured on; a file by its name alone, its folder is the user's own."""
    if result.recipe.get("evaluate", {}).get("text"):
        return file_name(result.evaluation_text)
    return result.evaluation_text


def machine(result: RunResult) -> str:
    """Processor, cores and memory in a sentence."""
    facts = dict(result.machine)
    parts = [str(facts.get("cpu", "unknown processor"))]
    if "cores" in facts:
        parts.append(f"{facts['cores']} cores")
    if "memory_bytes" in facts:
        parts.append(f"{float(facts['memory_bytes']) / 1e9:.0f} GB of memory")
    if "system" in facts:
        parts.append(str(facts["system"]))
    return ", ".join(parts)


def timed(result: RunResult) -> bool:
    """Whether any artifact's speed was measured."""
    return any(artifact.speed is not None for artifact in result.artifacts)
