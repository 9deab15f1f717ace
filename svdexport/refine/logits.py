"""Training a student's parameters towards the dense model's next-token distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svdexport.core.precision import choose, products_in
from svdexport.recipe.refiners import Training
from svdexport.refine.base import Decoder, RefineData
from svdexport.refine.divergence import divergence_of_hidden
from svdexport.refine.pairs import shared_products
from svdexport.refine.text import TeacherStates, batch_of, split
from svdexport.refine.training import TIME_LIMIT, Course, Schedule, Task, train

MICRO_TOKENS = 1024  # a pass forward and back: more only costs memory


def match_logits(
    name: str,
    data: RefineData,
    config: Training,
    trained: dict[str, nn.Parameter],
    schedule: Schedule,
    dense: Decoder | None = None,
) -> Course:
    """Minimise the mean of KL(dense || compressed) over the positions of the text.

    Args:
        name: of this training, for people and for the file of its state.
        trained: the parameters by name; all others stay.
        dense: the dense model; without it the student's last norm and head, which then must be the
            dense model's and stay so, serve both.
    """
    training, held_out = split(data.tokens, data.where)
    module = data.student.module
    with trainable(module, trained), shared_products(module, data.groups):
        return _train(name, data, config, trained, schedule, training, held_out, dense)


@contextmanager
def trainable(module: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone."""
    module.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)


@contextmanager
def frozen_in(dtype: torch.dtype, *modules: nn.Module) -> Iterator[None]:
    """The weights of linears that are not trained, in ``dtype``, once instead of in every pass.

    Autocast gives a product the same values; it remembers them for trained weights alone. A head
    that shares the embedding's table leaves that as it is.
    """
    kept: list[tuple[nn.Linear, Tensor]] = []
    try:
        for part in (part for module in modules for part in module.modules()):
            if type(part) is nn.Linear and not part.weight.requires_grad:
                kept.append((part, part.weight))
                part.weight = nn.Parameter(part.weight.to(dtype), requires_grad=False)
        yield
    finally:
        for part, weight in kept:
            part.weight = weight


def _train(
    name: str,
    data: RefineData,
    config: Training,
    trained: dict[str, nn.Parameter],
    schedule: Schedule,
    training: Tensor,
    held_out: Tensor,
    dense: Decoder | None,
) -> Course:
    student = data.student
    dtype = choose(config.precision, student.device)
    modules = [student.module] if dense is None else [student.module, dense.module]

    def hidden(decoder: Decoder, tokens: Tensor) -> Tensor:
        with torch.no_grad(), products_in(dtype, decoder.device):
            return decoder.hidden(tokens).float()

    both = torch.cat([training, held_out])
    width = student.embed(both[:1, :1]).shape[-1]
    states = TeacherStates(both, data.teacher, hidden, data.scratch / "teacher.bin", width)
    micro = max(1, MICRO_TOKENS // both.shape[1])

    def passed(windows: list[int], scale: float | None) -> float:
        """Summed divergence of windows; with ``scale``, adds that multiple of its gradient."""
        total = 0.0
        for start in range(0, len(windows), micro):
            part = windows[start : start + micro]
            tokens, expected = both[part], states[part].to(student.device)
            with torch.set_grad_enabled(scale is not None), products_in(dtype, student.device):
                found = student.hidden(tokens).float()
                nats, gradient = divergence_of_hidden(
                    student, tokens, found, expected, scale is not None, dense
                )
            if gradient is not None and scale is not None:
                found.backward(gradient * scale)  # type: ignore[no-untyped-call]
            total += nats
        return total

    def step(number: int) -> float:
        windows = batch_of(number, training.shape[0], config.batch, config.seed)
        count = len(windows) * both.shape[1]
        return passed(windows, 1.0 / count) / count

    def check() -> float:
        windows = list(range(training.shape[0], both.shape[0]))
        return passed(windows, None) / held_out.numel()

    said = f"{config!r} {schedule!r} {dtype} {tuple(both.shape)} {sorted(trained)}"
    identity = hashlib.sha256(said.encode()).hexdigest()
    state = data.scratch / f"{name}-state.safetensors"
    task = Task(trained, step, check, state, config.batch * both.shape[1], identity)
    with frozen_in(dtype, *modules):
        return train(task, schedule, name, data.progress)


def notes(name: str, data: RefineData, config: Training, course: Course) -> Iterator[str]:
    """What a reader of the manifest must know about a training."""
    training, _ = split(data.tokens, data.where)
    tokens = course.steps * config.batch * training.shape[1]
    yield (
        f"{name}: {course.steps} steps, {tokens} tokens ({tokens / training.numel():.1f} passes "
        f"over {training.numel()}); held-out divergence {course.first_loss:.4f} -> "
        f"{course.best_loss:.4f} nats a token, best at step {course.best_step}; {course.ended}"
    )
    if course.ended == TIME_LIMIT or config.steps is None:
        yield (
            f"{name}: the clock decided on the learning rate or the end (minutes: "
            f"{config.minutes}), so that another run gives other bytes; steps alone repeats them"
        )
