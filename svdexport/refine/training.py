"""One loop for every refiner that trains: AdamW, warm-up and cosine, held-out checks, a state
that survives a kill.

Without a time limit everything follows from the step number, so that a killed and resumed
training ends with the same bytes as one that was left alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svdexport.errors import RecipeError
from svdexport.files import atomic_file
from svdexport.refine.base import Progress

SAVE_SECONDS = 240.0
CHECKS = 12  # of the held-out text in a whole training
# Share of a training from which a check without gain counts: while the learning rate is high, pairs
# that start near their best get worse before they get better.
COUNTED_FROM = 0.5
BETAS = (0.9, 0.99)  # a second moment over 100 steps: trainings here are hundreds of steps long
STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of a parameter that has had a gradient
CLIP = 1.0  # norm of the whole gradient
STEPS_DONE, TIME_LIMIT = "all steps done", "the time limit ended it"
NO_GAIN = "the held-out loss no longer fell"


@dataclass(frozen=True)
class Schedule:
    """How long to train and how fast; see the recipe's keys of the same names."""

    steps: int | None
    minutes: float | None
    learning_rate: float
    warmup: float
    patience: int

    def done(self, step: int, seconds: float) -> float:
        """Share of the training that is over: by steps where they are given, else by the clock."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return min(1.0, seconds / (60.0 * self.minutes))

    def out_of_time(self, seconds: float) -> bool:
        return self.minutes is not None and seconds >= 60.0 * self.minutes

    def rate(self, done: float) -> float:
        """Learning rate: linear from 0 over ``warmup``, then half a cosine down to 0."""
        if done < self.warmup:
            return self.learning_rate * max(done / self.warmup, 0.01)  # the first step counts too
        over = min(1.0, (done - self.warmup) / (1 - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * over))


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        parameters: by name; changed in place.
        step: given a step's number, adds the gradients of the mean loss and returns the loss.
        held_out: mean loss on text that is not trained on.
        state: file of the saved state.
        tokens: that one step reads.
        identity: of the recipe's section and inputs; a state of another is not taken up.
    """

    parameters: dict[str, nn.Parameter]
    step: Callable[[int], float]
    held_out: Callable[[], float]
    state: Path
    tokens: int
    identity: str


@dataclass(frozen=True)
class Course:
    """How a training went: losses are means on the held-out text, in nats a token."""

    steps: int = 0
    seconds: float = 0.0
    checks: int = 0
    first_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0  # checks since the best that count
    ended: str = ""


def train(task: Task, schedule: Schedule, name: str, progress: Progress) -> Course:
    """Train until the steps or the time are over or the held-out loss no longer falls.

    Leaves the parameters at their best on the held-out text. ``progress`` is told steps, or
    seconds where the clock decides.

    Raises RecipeError where the loss is not finite.
    """
    parameters = list(task.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
    run = _Run(task, optimizer)
    course = run.resume()
    saved = time.monotonic()
    began = saved - course.seconds
    if not course.checks:
        course = run.check(course)
    while not course.ended:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(schedule.done(course.steps, course.seconds))
        loss = task.step(course.steps)
        if not math.isfinite(loss):
            raise RecipeError(f"{name}: the loss is not finite; lower its learning_rate")
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        course = replace(course, steps=course.steps + 1, seconds=time.monotonic() - began)
        course = _judged(run, course, schedule)
        speed = course.steps * task.tokens / course.seconds
        told = f"{name}, loss {loss:.4f}, held out {course.best_loss:.4f}, {speed:.0f} tokens/s"
        if schedule.steps is not None:
            progress(told, course.steps, schedule.steps)
        else:
            progress(told, int(course.seconds), int(60 * (schedule.minutes or 0)))
        if time.monotonic() - saved > SAVE_SECONDS or course.ended:
            run.save(course)
            saved = time.monotonic()
    run.restore_best()
    return course


def _judged(run: _Run, course: Course, schedule: Schedule) -> Course:
    """The course after a step: checked on the held-out text where it is time, and ended or not."""
    done = schedule.done(course.steps, course.seconds)
    finished = schedule.steps is not None and course.steps >= schedule.steps
    late = schedule.out_of_time(course.seconds)
    if finished or late or int(done * CHECKS) >= course.checks:
        course = run.check(course)
        if done < COUNTED_FROM:
            course = replace(course, stale=0)
    if finished:
        return replace(course, ended=STEPS_DONE)
    if late:
        return replace(course, ended=TIME_LIMIT)
    if course.stale >= schedule.patience:
        return replace(course, ended=NO_GAIN)
    return course


class _Run:
    """The parameters, the optimiser's moments and the best parameters so far, and their file."""

    def __init__(self, task: Task, optimizer: torch.optim.AdamW) -> None:
        self.task, self.optimizer = task, optimizer
        self.best: dict[str, Tensor] = {}

    def check(self, course: Course) -> Course:
        """Measure the held-out loss; keep the parameters where it is the lowest so far."""
        loss = self.task.held_out()
        checks = course.checks + 1
        if not loss < course.best_loss:
            return replace(course, checks=checks, stale=course.stale + 1)
        self.best = {name: p.detach().cpu().clone() for name, p in self.task.parameters.items()}
        first = course.first_loss if course.checks else loss
        return replace(
            course,
            checks=checks,
            stale=0,
            best_loss=loss,
            best_step=course.steps,
            first_loss=first,
        )

    @torch.no_grad()
    def restore_best(self) -> None:
        for name, parameter in self.task.parameters.items():
            parameter.copy_(self.best[name])

    def save(self, course: Course) -> None:
        """Write everything that the next step depends on, whole or not at all."""
        tensors = {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.task.parameters.items():
            tensors[f"now.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        flat = {name: value.cpu().contiguous() for name, value in tensors.items()}
        said = {"identity": self.task.identity, "course": json.dumps(asdict(course))}
        with atomic_file(self.task.state) as temporary:
            save_file(flat, temporary, metadata=said)

    @torch.no_grad()
    def resume(self) -> Course:
        """Take up a saved state of the same training; a new course where there is none."""
        if not self.task.state.exists():
            return Course()
        with safe_open(self.task.state, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("identity") != self.task.identity:
                return Course()
            course = Course(**json.loads(said["course"]))
            for name, parameter in self.task.parameters.items():
                self.best[name] = file.get_tensor(f"best.{name}")
                parameter.copy_(file.get_tensor(f"now.{name}"))
                if f"step.{name}" in file.keys():  # noqa: SIM118  # absent without a gradient
                    self.optimizer.state[parameter] = {
                        key: file.get_tensor(f"{key}.{name}").to(parameter.device) for key in STATE
                    }
        return course
