"""The build of llama.cpp: what its key is made of, and what it says where it cannot build."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.tool_modules import load_tool

build = load_tool("llama_cpp/build.py")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*build.BUILD_VARIABLES, "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("name", "value"), [("CFLAGS", "-O1"), ("LDFLAGS", "-s"), ("CC", "cc")])
def test_what_decides_the_wheel_decides_its_key(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    before = build.build_key(stock=False)
    assert build.build_key(stock=False) == before != build.build_key(stock=True)
    monkeypatch.setenv(name, value)
    assert build.build_key(stock=False) != before


def test_a_changed_patch_is_another_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.build_key(stock=False)
    patch = tmp_path / "own.patch"
    patch.write_text("diff\n")
    monkeypatch.setattr(build, "PATCHES", (*build.PATCHES[:-1], patch))
    assert build.build_key(stock=False) != before


@pytest.mark.parametrize(
    ("value", "words"),
    [("no-such-compiler", "no compiler no-such-compiler"), ("false", "does not say its version")],
)
def test_a_compiler_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(build.BuildError, match=words):
        build.build(stock=False)


def test_a_relative_cache_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDEXPORT_CACHE", "cache")
    assert build.cache_folder() == tmp_path / "cache"


def test_what_an_interrupted_build_left_is_removed_and_its_place_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder without a wheel under the final name, and a build's work that nobody removed."""
    monkeypatch.setenv("SVDEXPORT_CACHE", str(tmp_path))
    final = tmp_path / "llama_cpp" / f"stock-{build.build_key(stock=True)}"
    left = tmp_path / "llama_cpp" / "build-of-yesterday"
    for folder in (final, left):
        folder.mkdir(parents=True)

    def make(cache: Path, work: Path, key: str, stock: bool) -> Path:
        (work / "out").mkdir()
        (work / "out" / "made.whl").write_text(f"{key} {stock}")
        return work / "out"

    monkeypatch.setattr(build, "make", make)
    wheel = build.build(stock=True)
    assert wheel == final / "made.whl" and wheel.read_text().endswith("True")
    assert not left.exists()
    assert list(final.parent.glob("build-*")) == []
    monkeypatch.setattr(build, "make", None)  # not called again
    assert build.build(stock=True) == wheel


def test_the_log_of_a_build_that_failed_is_kept_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = tmp_path / build.ARCHIVE
    archive.write_bytes(b"not an archive that has this hash")
    monkeypatch.setenv("SVDEXPORT_CACHE", str(tmp_path))

    def fetch(cache: Path, log: Path) -> Path:
        build.run(["sh", "-c", "echo the reason; exit 3"], log)
        return archive

    monkeypatch.setattr(build, "fetch", fetch)
    with pytest.raises(build.BuildError, match=r"(?s)the reason.*exit status 3.*failed\.log"):
        build.build(stock=True)
    assert "the reason" in (tmp_path / "llama_cpp" / "failed.log").read_text()


def test_a_hooks_settings_do_not_reach_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    log = tmp_path / "log"
    build.run(["sh", "-c", "echo dir=$GIT_DIR config=$GIT_CONFIG_GLOBAL"], log)
    assert log.read_text() == f"dir= config={os.devnull}\n"
