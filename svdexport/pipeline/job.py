"""What the stages of one run share: the recipe, the folders, the model's place; and resuming."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from svdexport import __version__
from svdexport.checkpoint import Checkpoint
from svdexport.core.machine import free_memory
from svdexport.core.ranks import ALONE, Ranks
from svdexport.models.blocks import Structure, discover
from svdexport.models.loader import Source, load_model, load_tokenizer, open_source, structure_of
from svdexport.models.weights import StreamedWeights, Weights
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import Recipe
from svdexport.rundir import RunDir
from svdexport.safety import check_safetensors


@dataclass(frozen=True)
class Job:
    """One run: what to do (recipe), where (folders), how to tell people (reporter), and with whom
    (ranks).
    """

    recipe: Recipe
    rundir: RunDir
    reporter: Reporter
    threads: int
    ranks: Ranks = ALONE

    @property
    def work(self) -> Path:
        return self.rundir.work

    def stage(self, name: str, key: str, files: list[Path], make: Callable[[], None]) -> None:
        """Run a stage, or skip it where it was finished before with the same inputs (``key``)."""
        done = self.rundir.done(name, key)
        with self.reporter.stage(name, resumed=done):
            if not done:
                make()
                self.rundir.mark(name, key, files)


class ModelUnderWork:
    """The user's model: its files, structure, and, while they are needed, its weights in memory."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.source: Source = open_source(job.recipe.model, job.work)

    @cached_property
    def structure(self) -> Structure:
        """From shapes alone where the architecture allows it, else from the loaded model."""
        from svdexport.errors import InputError

        try:
            return structure_of(self.source.folder, self.source.trust_remote_code)
        except InputError:
            return discover(self.model)

    @cached_property
    def memory(self) -> Memory:
        """Whether the weights are streamed, and a line that says why."""
        ranks = self.job.ranks
        size = sum(parameter_bytes(self.source.folder).values())
        return decide_memory(
            self.job.recipe.compress.stream, size, free_memory() // ranks.local_size
        )

    @cached_property
    def weights(self) -> Weights:
        """Streamed from the safetensors, or all in memory."""
        torch.set_num_threads(self.job.threads)
        if not self.memory.streamed:
            return Weights(self.model)
        source = self.source
        return StreamedWeights(source.folder, self.structure.blocks, source.trust_remote_code)

    @cached_property
    def model(self) -> Any:
        torch.set_num_threads(self.job.threads)
        return load_model(self.source.folder, self.source.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source.folder, self.source.trust_remote_code)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.source.folder)

    def release(self) -> None:
        """Drop the weights from memory."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("weights", None)


@dataclass(frozen=True)
class Memory:
    """Whether weights are read when they are needed, and why, for the manifest."""

    streamed: bool
    note: str


def decide_memory(choice: str, size: int, free: int) -> Memory:
    """Stream where the recipe says so, or where the model would take over half of what is free.

    Args:
        choice: ``compress.stream``. size: bytes of all weights in float32. free: bytes of memory.
    """
    streamed = choice == "always" or (choice == "auto" and 2 * size > free)
    return Memory(
        streamed,
        f"weights {'streamed from the disk' if streamed else 'loaded'} for the compression: "
        f"{size / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB of memory free "
        f"(compress.stream: {choice})",
    )


def parameter_bytes(folder: Path) -> dict[str, int]:
    """Bytes in float32 of a folder's tensors, from the headers of its files."""
    files = sorted(set(Checkpoint.open(folder).files.values()))
    return {
        name: 4 * math.prod(info.shape)
        for file in files
        for name, info in check_safetensors(file).tensors.items()
    }


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def key(*parts: Any) -> str:
    """Hash of a stage's inputs; svdexport's and torch's versions are always among them."""
    text = json.dumps([__version__, torch.__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def source_key(source: Source) -> str:
    """Hash of the model's files by name, size and time: cheap, and a changed file is noticed."""
    paths = [source.gguf] if source.gguf else sorted(source.folder.glob("*"))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.is_file()]
    return key(stats)
