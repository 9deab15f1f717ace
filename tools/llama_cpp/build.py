"""Build a wheel of llama-cpp-python whose llama.cpp runs low-rank pairs, and print its path.

The source archive of the pinned release comes from PyPI (its hash is checked), gets the patches
beside this file and is built by pip. The wheel also carries llama.cpp's own converter, under
`llama_cpp/converter`. It is kept in a cache folder under a key made of everything that decides what
comes out, so that a second call finds it at once. Progress goes to stderr.

    python tools/llama_cpp/build.py            the wheel with all patches
    python tools/llama_cpp/build.py --stock    the unchanged library, to compare with
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

VERSION = "0.3.36"
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PATCHES = tuple(
    Path(__file__).with_name(f"{name}.patch")
    for name in (
        "low-rank",
        *("decode-runs", "decode-attention", "decode-rounding"),
        *("prefill-tiles", "prefill-attention"),
    )
)
RECIPE = "2"  # raise it when what this script makes of archive and patch changes
# besides the compilers; CMAKE_ARGS is this script's own
BUILD_VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_GENERATOR")
CMAKE_ARGS = "-DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF -DGGML_NATIVE=ON"
# llama.cpp's converter and what it imports
CONVERTER = (
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "conversion",
    "models/templates",
    "gguf-py/gguf",
    "LICENSE",
)


class BuildError(Exception):
    """The wheel cannot be built; the message says why and what to do."""


def say(text: str) -> None:
    print(f"llama.cpp: {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """$SVDEXPORT_CACHE, $XDG_CACHE_HOME/svdexport or ~/.cache/svdexport; an absolute path."""
    if own := os.environ.get("SVDEXPORT_CACHE"):
        return Path(own).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().resolve() / "svdexport"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def run(command: list[str], log: Path, *, cwd: Path | None = None, **extra_env: str) -> None:
    """Run a command with its output in `log`; on failure raise with the log's last lines.

    What a git hook or the user's git configuration says is kept from it.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, **extra_env}
    with log.open("ab") as out:
        code = subprocess.run(
            command, cwd=cwd, env=env, stdout=out, stderr=out, check=False
        ).returncode
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise BuildError(f"{tail}\n'{' '.join(command[:6])} ...' failed with exit status {code}")


def compiler(variable: str, default: str) -> str:
    """The first line of the version of the compiler that an environment variable names."""
    command = os.environ.get(variable, "").split() or [default]
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"no compiler {command[0]} (${variable}); on Debian: apt install g++ cmake make git"
        )
    asked = [*command, "--version"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode != 0 or not found.stdout:
        raise BuildError(f"'{' '.join(asked)}' does not say its version; look at ${variable}")
    return found.stdout.splitlines()[0]


def environment() -> list[str]:
    """What the build takes from environment variables, where they are set."""
    given = [f"{name}={os.environ[name]}" for name in BUILD_VARIABLES if os.environ.get(name)]
    return given + ([compiler("CC", "cc")] if os.environ.get("CC") else [])


def cpu() -> str:
    """What -march=native depends on: the processor's instruction sets, or else its name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    return platform.processor()


def build_key(stock: bool) -> str:
    """A hash of all that decides what the wheel holds."""
    parts = [
        ARCHIVE_SHA256,
        "stock" if stock else " ".join(map(sha256, PATCHES)),
        RECIPE,
        CMAKE_ARGS,
        compiler("CXX", "c++"),
        *environment(),
        cpu(),
        "-".join((platform.system(), platform.machine(), *platform.libc_ver())),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def fetch(cache: Path, log: Path) -> Path:
    """The source archive, from the cache or from PyPI through pip, with its hash checked."""
    archive = cache / ARCHIVE
    if archive.exists() and sha256(archive) == ARCHIVE_SHA256:
        return archive
    say(f"fetching the source archive of llama-cpp-python {VERSION} (77 MB)")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # pip runs code of an archive to learn its metadata, so the hash is its to check first
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{ARCHIVE_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        pip += ["--no-binary", "llama-cpp-python", "--require-hashes", "--requirement"]
        run([*pip, str(wanted)], log)
        got = Path(folder) / ARCHIVE
        if not got.exists() or sha256(got) != ARCHIVE_SHA256:
            raise BuildError(
                f"{ARCHIVE} from the package index does not have the sha256 {ARCHIVE_SHA256}"
            )
        got.replace(archive)
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the archive, whose hash has been checked; returns the source folder."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
    return folder / ARCHIVE.removesuffix(".tar.gz")


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise BuildError(f"{path.name}: expected exactly one {old!r}")
    path.write_text(text.replace(old, new))


def prepare(source: Path, key: str, stock: bool, log: Path) -> None:
    """Apply the patch, name the version, leave out what is not needed, add the converter."""
    llama = source / "vendor" / "llama.cpp"
    # the archive's git links lead nowhere, and git would stumble over them
    for link in (source / ".git", llama / ".git"):
        if link.is_dir():
            shutil.rmtree(link)
        else:
            link.unlink(missing_ok=True)
    if not stock:
        # inside another repository git would skip every file without a word
        apply_patch = ["git", "apply", *(str(patch.resolve()) for patch in PATCHES)]
        run(apply_patch, log, cwd=llama, GIT_CEILING_DIRECTORIES=str(source))
        if not (llama / "src" / "llama-low-rank.h").exists():
            raise BuildError("'git apply' changed nothing")
        init = source / "llama_cpp" / "__init__.py"
        replace_once(init, f'"{VERSION}"', f'"{VERSION}+lowrank1.{key[:8]}"')
    replace_once(
        source / "CMakeLists.txt",
        "set(LLAMA_BUILD_COMMON ON CACHE",
        "set(LLAMA_BUILD_COMMON OFF CACHE",
    )
    for name in CONVERTER:
        target = source / "llama_cpp" / "converter" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (llama / name).is_dir():
            shutil.copytree(llama / name, target)
        else:
            shutil.copy2(llama / name, target)


def make(cache: Path, work: Path, key: str, stock: bool) -> Path:
    """Build the wheel in `work`; returns its folder. If that fails the log is kept in the cache."""
    log = work / "build.log"
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    out = work / "out"
    try:
        source = unpack(fetch(cache, log), work)
        prepare(source, key, stock, log)
        say(f"building {'the unchanged library' if stock else 'with low-rank pairs'}, {jobs} jobs")
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out)]
        run([*pip, str(source)], log, CMAKE_ARGS=CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL=str(jobs))
    except BuildError as error:
        if not log.exists():
            raise
        kept = shutil.copy2(log, cache / "failed.log")
        raise BuildError(f"{error} (the whole log: {kept})") from None
    return out


def build(stock: bool) -> Path:
    """The wheel's path in the cache; builds it if it is not there yet."""
    if shutil.which("git") is None:
        raise BuildError("no git, which applies the patches; on Debian: apt install git")
    cache = cache_folder() / "llama_cpp"
    key = build_key(stock)
    final = cache / f"{'stock' if stock else 'lowrank'}-{key}"
    if not any(final.glob("*.whl")):
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time; another may have made it
            if not any(final.glob("*.whl")):
                _build_new(cache, key, stock, final)
    return next(final.glob("*.whl"))


def _build_new(cache: Path, key: str, stock: bool, final: Path) -> None:
    """Build under the lock, behind removing what interrupted builds have left."""
    for left in (final, *cache.glob("build-*")):
        shutil.rmtree(left, ignore_errors=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as work:
        make(cache, Path(work), key, stock).rename(final)
    say(f"built in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stock", action="store_true", help="build the library without the patches"
    )
    stock: bool = parser.parse_args().stock
    try:
        print(build(stock))
    except (BuildError, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
