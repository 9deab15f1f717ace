"""Distillation: the loss and its gradient, what is trained, resuming to the same bytes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from svdexport.core.gauge import balance
from svdexport.errors import RecipeError, ResourceError
from svdexport.files import resource_errors
from svdexport.recipe import Distill
from svdexport.refine import REFINERS, Refined, RefineData, divergence, logits, training
from svdexport.refine.divergence import divergence_of_hidden
from svdexport.refine.pairs import pair_tensors, shared_products
from svdexport.refine.text import TeacherStates, batch_of, split
from svdexport.refine.training import Schedule, Task, train
from tests.unit.refine_models import data, dense_model

CONFIG = Distill(steps=30, batch=4, learning_rate=1e-2, precision="float32", patience=1000)


def slow_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    return (p * (p / q).log()).sum()


def mean_divergence(student: torch.nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        total = slow_divergence(student(tokens).logits, dense_model()(tokens).logits)
    return float(total) / tokens.numel()


def add_biases(given: RefineData) -> None:
    """Biases of all linears in blocks, the same in the dense model and the student."""
    generator = torch.Generator().manual_seed(9)
    teacher = given.teacher().module
    for name in itertools.chain(*given.groups.values()):
        bias = torch.randn(len(teacher.get_submodule(name).weight), generator=generator)
        for model in (teacher, given.student.module):
            own = torch.nn.Parameter(0.1 * bias, requires_grad=False)
            model.get_submodule(name).bias = own


def test_the_balanced_gauge_keeps_the_product_and_makes_the_factors_alike() -> None:
    torch.manual_seed(0)
    a = torch.randn(5, 12, dtype=torch.float64) * torch.logspace(-6, 3, 5)[:, None]
    b = torch.randn(9, 5, dtype=torch.float64)
    new_a, new_b = balance(a, b)
    sigma = torch.linalg.svdvals(b @ a)[:5]
    assert torch.allclose(new_b @ new_a, b @ a, rtol=1e-9, atol=1e-9 * float(sigma[0]))
    scale = float(sigma[0])
    assert torch.allclose(new_a @ new_a.T, sigma.diag(), atol=1e-9 * scale)
    assert torch.allclose(new_b.T @ new_b, sigma.diag(), atol=1e-9 * scale)
    again = balance(new_a, new_b)
    assert torch.allclose(again[0], new_a, atol=1e-9 * scale**0.5)


def test_divergence_and_its_gradient_are_those_of_the_slow_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(divergence, "CACHED", 4)  # 14 positions: 4, 4, 4 and 2
    torch.manual_seed(1)
    student = torch.randn(2, 7, 33) * 4
    teacher = torch.randn(2, 7, 33) * 4
    leaf, slow = student.clone().requires_grad_(True), student.double().requires_grad_(True)
    loss, expected = divergence.divergence(leaf, teacher), slow_divergence(slow, teacher)
    (loss * 3).backward()
    (expected * 3).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert leaf.grad is not None
    assert slow.grad is not None
    assert torch.allclose(leaf.grad.double(), slow.grad, atol=1e-5)


def test_in_pieces_it_is_the_same_as_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK", 5)
    given = data(tmp_path)
    teacher, tokens = given.teacher(), given.tokens[:3]
    student, expected = given.student.hidden(tokens), teacher.hidden(tokens)
    total, gradient = divergence_of_hidden(given.student, tokens, student, expected, True)
    leaf = student.clone().requires_grad_(True)
    whole = slow_divergence(given.student.logits(tokens, leaf), teacher.logits(tokens, expected))
    whole.backward()
    assert total == pytest.approx(float(whole.detach()), rel=1e-5)
    assert gradient is not None
    assert leaf.grad is not None
    assert torch.allclose(gradient, leaf.grad, atol=1e-4 * float(leaf.grad.abs().max()))
    assert torch.allclose(
        teacher.logits(tokens, expected), teacher.module(tokens).logits, atol=1e-5
    )


@pytest.mark.parametrize("biases", [False, True])
def test_a_group_computes_its_first_product_once(biases: bool, tmp_path: Path) -> None:
    given = data(tmp_path)
    if biases:
        add_biases(given)
    module, tokens = given.student.module, given.tokens[:2]
    expected = module(tokens).logits
    calls = []
    leader = next(name for name, members in given.groups.items() if len(members) > 2)
    module.get_submodule(f"{leader}.lr_a").register_forward_hook(lambda *_: calls.append(1))
    with shared_products(module, given.groups):
        assert torch.equal(module(tokens).logits, expected)
    assert len(calls) == 1
    module(tokens)
    assert len(calls) == 1 + len(given.groups[leader])


@pytest.mark.parametrize("train", ["pairs", "linears"])
def test_the_divergence_falls_and_the_form_stays(train: str, tmp_path: Path) -> None:
    given = data(tmp_path, windows=96, dense_blocks=(1,))
    module = given.student.module
    before = pair_tensors(module, given.groups)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _, held_out = split(given.tokens, "refine")
    first = mean_divergence(module, held_out)
    found = REFINERS["distill"].refine(
        given, CONFIG.model_copy(update={"train": train, "steps": 60, "batch": 8})
    )
    last = mean_divergence(module, held_out)
    assert last < 0.7 * first
    assert f"{first:.4f} -> {last:.4f}" in found.notes[0]
    dense = {f"model.layers.1.{name}" for name in ("mlp.up_proj.weight", "self_attn.q_proj.weight")}
    assert dense <= set(found.tensors) if train == "linears" else set(found.tensors) == set(before)
    for name, tensor in found.tensors.items():
        assert tensor.shape == state[name].shape
        assert torch.equal(tensor, module.state_dict()[name])
        assert not torch.equal(tensor, state[name])
    for name in set(state) - set(found.tensors):
        assert torch.equal(module.state_dict()[name], state[name]), name


def same(one: Refined, two: Refined) -> bool:
    return all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_a_seed_decides(tmp_path: Path) -> None:
    refine = REFINERS["distill"].refine
    config = CONFIG.model_copy(update={"steps": 8})
    one = refine(data(tmp_path / "1"), config)
    assert same(one, refine(data(tmp_path / "2"), config))
    other = config.model_copy(update={"seed": 1})
    assert not same(one, refine(data(tmp_path / "3"), other))


def _killed(folder: str) -> None:
    """Train with a state saved at every step, and be killed after the 17th."""
    training.SAVE_SECONDS = 0.0
    torch.set_num_threads(1)

    def progress(_what: str, done: int, _total: int) -> None:
        if done == 17:
            os.kill(os.getpid(), signal.SIGKILL)

    REFINERS["distill"].refine(data(Path(folder), progress=progress), CONFIG)


def test_a_killed_training_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = REFINERS["distill"].refine(data(tmp_path / "whole"), CONFIG)
        process = multiprocessing.get_context("spawn").Process(
            target=_killed, args=(str(tmp_path / "killed"),)
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert (tmp_path / "killed" / "distill-state.safetensors").exists()
        seen: list[int] = []
        resumed = data(tmp_path / "killed", progress=lambda _what, done, _total: seen.append(done))
        found = REFINERS["distill"].refine(resumed, CONFIG)
    finally:
        torch.set_num_threads(threads)
    assert seen[0] in {17, 18}
    assert seen[-1] == 30
    assert same(found, expected)
    assert found.notes == expected.notes


def test_parameters_with_late_gradients_or_none_resume_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def trained(folder: str, until: int) -> list[torch.Tensor]:
        """Of a parameter with a gradient from the start, from step 3 on, and never."""
        found = {name: torch.nn.Parameter(torch.ones(3)) for name in ("always", "late", "never")}

        def step(number: int) -> float:
            if number == until:
                raise KeyboardInterrupt
            for name in ("always", "late")[: 2 if number >= 3 else 1]:
                found[name].grad = torch.tensor([1.0, -0.5, 0.1]) * (number + 1)
            return 1.0

        state = tmp_path / folder
        task = Task(found, step, lambda: float(found["always"].detach().sum()), state, 1, "x")
        train(task, Schedule(8, None, 0.1, 0.0, 100), "test", lambda *_: None)
        return [value.detach() for value in found.values()]

    expected = trained("whole", 8)
    for until in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            trained("stopped", until)
    assert all(map(torch.equal, trained("stopped", 8), expected))
    assert not torch.equal(expected[1], torch.ones(3))
    assert torch.equal(expected[2], torch.ones(3))


def test_a_state_of_another_section_is_not_taken_up(tmp_path: Path) -> None:
    refine = REFINERS["distill"].refine
    short = CONFIG.model_copy(update={"steps": 4})
    refine(data(tmp_path), short)
    other = short.model_copy(update={"learning_rate": 2e-2})
    seen: list[int] = []
    found = refine(data(tmp_path, progress=lambda _what, done, _total: seen.append(done)), other)
    assert seen == [1, 2, 3, 4]
    assert same(found, refine(data(tmp_path / "fresh"), other))


def test_the_clock_ends_it_and_the_notes_say_so(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"minutes": 1e-5, "steps": None})
    found = REFINERS["distill"].refine(data(tmp_path), config)
    assert "1 steps" in found.notes[0]
    assert "the time limit ended it" in found.notes[0]
    assert "other bytes" in found.notes[1]


def test_it_stops_where_the_held_out_text_gains_nothing(tmp_path: Path) -> None:
    """But not in its first half, where a high learning rate may be all that is wrong."""
    weight = torch.nn.Parameter(torch.zeros(2))
    held_out = iter([5.0, 6.0, 6.0, 6.0, 6.0, 6.0, 4.0, 3.0, 3.5, 3.0, 2.0])
    values: list[torch.Tensor] = []

    def step(_number: int) -> float:
        weight.grad = -torch.ones(2)
        return 1.0

    def check() -> float:
        values.append(weight.detach().clone())
        return next(held_out)

    task = Task({"w": weight}, step, check, tmp_path / "state", 1, "x")
    course = train(task, Schedule(12, None, 0.1, 0.0, 2), "test", lambda *_: None)
    assert (course.steps, course.checks, course.best_step) == (9, 10, 7)
    assert (course.first_loss, course.best_loss) == (5.0, 3.0)
    assert course.ended == training.NO_GAIN
    assert torch.equal(weight.detach(), values[7])
    assert not torch.equal(values[7], values[8])


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    task = Task({"w": weight}, lambda _: float("nan"), lambda: 1.0, tmp_path / "state", 1, "x")
    with pytest.raises(RecipeError, match="refine: the loss is not finite"):
        train(task, Schedule(3, None, 0.1, 0.0, 2), "refine", lambda *_: None)


def test_the_schedule() -> None:
    schedule = Schedule(100, None, 1.0, 0.1, 5)
    rates = [schedule.rate(schedule.done(step, 1e9)) for step in range(101)]
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    clock = Schedule(None, 2.0, 1.0, 0.0, 5)
    assert clock.done(10**6, 60.0) == 0.5
    assert not clock.out_of_time(119.0)
    assert clock.out_of_time(120.0)


def test_every_pass_reads_every_window_once() -> None:
    read = [i for step in range(21) for i in batch_of(step, 7, 4, seed=5)]
    passes = [read[i : i + 7] for i in range(0, 84, 7)]
    assert all(sorted(part) == list(range(7)) for part in passes)
    assert len({tuple(part) for part in passes}) > 6
    tokens = torch.arange(40)[:, None]
    train, held = split(tokens, "x")
    assert held.shape[0] == 2
    assert sorted([*train[:, 0].tolist(), *held[:, 0].tolist()]) == list(range(40))
    with pytest.raises(RecipeError, match="samples"):
        split(tokens[:1], "refine.0")


def test_the_dense_model_runs_once_for_each_window(tmp_path: Path) -> None:
    given = data(tmp_path)
    ran: list[int] = []

    def make(decoder: object, tokens: torch.Tensor) -> torch.Tensor:
        ran.append(int(tokens[0, 0]))
        return decoder.hidden(tokens)  # type: ignore[attr-defined,no-any-return]

    path = tmp_path / "teacher.bin"
    states = TeacherStates(given.tokens, given.teacher, make, path, 32)
    expected = given.teacher().hidden(given.tokens[[3, 1, 3]])
    for _ in range(2):
        assert torch.allclose(states[[3, 1, 3]], expected, atol=1e-5)
    assert len(ran) == 2
    again = TeacherStates(given.tokens, given.teacher, make, path, 32)
    assert torch.equal(again[[1, 3]], states[[1, 3]])
    assert len(ran) == 2


def test_states_that_a_kill_left_half_made_are_made_again(tmp_path: Path) -> None:
    given = data(tmp_path)
    path = tmp_path / "teacher.bin"

    def states() -> TeacherStates:
        def make(decoder: Any, tokens: torch.Tensor) -> torch.Tensor:
            return decoder.hidden(tokens)  # type: ignore[no-any-return]

        return TeacherStates(given.tokens, given.teacher, make, path, 32)

    expected = states()[[2]]
    for lost in (path, path.with_suffix(".known")):
        lost.unlink()
        assert torch.equal(states()[[2]], expected)


def test_a_full_disk_ends_a_training_with_an_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    tokens = torch.zeros(4, 8, dtype=torch.long)
    states = TeacherStates(
        tokens, lambda: Any, lambda _, t: torch.ones(1, 8, 16), tmp_path / "t.bin", 16
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(ResourceError, match="disk is full"), resource_errors("refine"):
            states[[0, 1]]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(states[[1]], torch.ones(1, 8, 16))


def test_frozen_weights_in_bfloat16_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"steps": 4, "precision": "bfloat16"})
    found: list[Refined] = []
    for name in ("held", "cast in every pass"):
        (tmp_path / name).mkdir()
        given = data(tmp_path / name, dense_blocks=(1,))
        module = given.student.module
        before = {part: value.clone() for part, value in module.state_dict().items()}
        found.append(REFINERS["distill"].refine(given, config))
        after = module.state_dict()
        assert all(value.dtype == torch.float32 for value in after.values())
        frozen = {part for part in after if ".lr_" not in part}
        assert all(torch.equal(after[part], before[part]) for part in frozen)
        monkeypatch.setattr(logits, "frozen_in", lambda *_: nullcontext())
    assert found[0].tensors
    assert all(torch.equal(one, found[1].tensors[part]) for part, one in found[0].tensors.items())
    assert found[0].notes == found[1].notes


def test_a_frozen_head_leaves_the_embedding_that_it_shares() -> None:
    model = dense_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with logits.frozen_in(torch.bfloat16, model):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.embed_tokens.weight.dtype == torch.float32
        assert model.model.layers[0].self_attn.q_proj.weight is trained
        assert not model.model.layers[1].mlp.down_proj.weight.requires_grad
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[1].mlp.down_proj.weight.dtype == torch.float32
