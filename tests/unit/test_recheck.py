"""`verify`: one flipped byte anywhere is found, and the file and the tensor are named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.errors import EXIT_INPUT, InputError, SvdexportError
from svdexport.export import ExportRequest, exporter
from svdexport.files import all_files, sha256_file
from svdexport.pipeline.recheck import recheck
from svdexport.recipe import CheckpointExport, GgufExport, OnnxExport
from svdexport.report import card, html, manifest, markdown
from svdexport.report.result import ArtifactResult, RunResult, TensorHash
from tests.unit.gguf_models import compress, make_model
from tests.unit.report_example import example_result

pytestmark = pytest.mark.slow  # exports three formats once

SPECS = {
    "model-Q8_0.gguf": GgufExport(type="Q8_0"),
    "onnx-int4": OnnxExport(precision="int4"),
    "checkpoint": CheckpointExport(),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `run` leaves it, with really exported artifacts of a tiny model."""
    root = tmp_path_factory.mktemp("published")
    make_model(root / "source", "Llama", intermediate_size=128)
    checkpoint = Checkpoint.open(compress(root / "source", root / "compressed", 32)[0])
    out, work = root / "out", root / "work"
    out.mkdir()
    work.mkdir()
    artifacts = []
    for name, spec in SPECS.items():
        request = ExportRequest(checkpoint, root / "source", None, out / name, work, spec)
        made = exporter(spec.format).export(request)
        tensors = {
            key: TensorHash(r.shape, r.type, r.nbytes, r.sha256) for key, r in made.tensors.items()
        }
        files = {p.relative_to(out).as_posix(): sha256_file(p) for p in all_files([out / name])}
        bare = ArtifactResult(name, made.format, made.type, "compressed", "x", made.bytes)
        artifacts.append(dataclasses.replace(bare, files=files, tensors=tensors))
    result = dataclasses.replace(example_result(), artifacts=tuple(artifacts))
    for part in (card, html, markdown, manifest):
        part.write(result, out)
    return out


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(published, tmp_path / "out"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def message(folder: Path) -> str:
    with pytest.raises(SvdexportError) as caught:
        recheck(folder)
    assert caught.value.exit_code == EXIT_INPUT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_untouched_folder_is_what_its_manifest_says(published: Path) -> None:
    result = recheck(published)
    assert isinstance(result, RunResult)
    assert {a.path for a in result.artifacts} == set(SPECS)
    listed = json.loads((published / "manifest.json").read_text())["files"]
    found = {p.relative_to(published).as_posix() for p in all_files([published])}
    assert set(listed) == found - {"manifest.json"}


def test_flipped_byte_in_gguf_names_file_and_tensor(copy: Path) -> None:
    from gguf import GGUFReader

    path = copy / "model-Q8_0.gguf"
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.attn_qkv.lr_a.weight")
    at = int(tensor.data_offset) + 5
    del tensor
    flip(path, at)
    text = message(copy)
    assert "model-Q8_0.gguf: its sha256 differs" in text
    assert "blk.1.attn_qkv.lr_a.weight" in text and text.count("blk.") == 1


def test_flipped_byte_in_checkpoint_names_file_and_tensor(copy: Path) -> None:
    path = next((copy / "checkpoint").glob("*.safetensors"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key.endswith("lr_b.weight"))
    flip(path, 8 + length + header[name]["data_offsets"][0] + 1)
    text = message(copy)
    assert f"checkpoint/{path.name}: its sha256 differs" in text
    assert f"checkpoint: {name}: differs" in text


def test_flipped_byte_in_onnx_names_file_and_tensor(copy: Path) -> None:
    files = sorted((copy / "onnx-int4").glob("model.onnx*"), key=lambda p: p.stat().st_size)
    flip(files[-1], files[-1].stat().st_size // 2)
    text = message(copy)
    assert f"onnx-int4/{files[-1].name}: its sha256 differs" in text
    assert re.search(r"onnx-int4: model\.\S+: sha256 is", text)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("name", list(SPECS))
def test_flipped_byte_anywhere_is_found(copy: Path, name: str, share: float) -> None:
    for path in list(all_files([copy / name])):
        before = path.read_bytes()
        if not before:
            continue
        flip(path, int(share * (len(before) - 1)))
        assert path.relative_to(copy).as_posix() in message(copy)
        path.write_bytes(before)
    recheck(copy)


@pytest.mark.parametrize("name", ["README.md", "report.html", "summary.md"])
def test_reports_are_checked_as_well(copy: Path, name: str) -> None:
    flip(copy / name, 10)
    assert f"{name}: its sha256 differs" in message(copy)


def test_missing_cut_off_and_added_files_are_named(copy: Path) -> None:
    (copy / "README.md").unlink()
    (copy / "modeling_evil.py").write_text("x = 1")
    (copy / ".gitattributes").write_text("*.gguf filter=lfs")
    path = copy / "model-Q8_0.gguf"
    path.write_bytes(path.read_bytes()[:-100])
    text = message(copy)
    assert "README.md: missing" in text and "modeling_evil.py: not in the manifest" in text
    assert re.search(r"model-Q8_0\.gguf: \d+ bytes, \d+ in the manifest", text)
    assert ".gitattributes" not in text


def test_a_report_in_a_repository_leaves_its_commits_alone(copy: Path) -> None:
    (copy / ".git").mkdir()
    (copy / ".git" / "index").write_text("first")
    api.report(copy)
    (copy / ".git" / "index").write_text("second commit")
    recheck(copy)


def test_missing_artifact_is_named(copy: Path) -> None:
    import shutil

    shutil.rmtree(copy / "onnx-int4")
    assert "onnx-int4/model.onnx: missing" in message(copy)


def test_link_in_place_of_a_file_is_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "README.md"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert "README.md: missing, or not an ordinary file" in message(copy)


def test_manifest_with_new_hashes_but_old_tensors_is_not_enough(copy: Path) -> None:
    """Someone who changes a file and its hash in `files` must change the tensors' hashes too."""
    path = copy / "model-Q8_0.gguf"
    flip(path, path.stat().st_size - 40)
    data = json.loads((copy / "manifest.json").read_text())
    data["files"][path.name]["sha256"] = sha256_file(path)
    (copy / "manifest.json").write_text(json.dumps(data))
    text = message(copy)
    assert "model-Q8_0.gguf: " in text and "sha256 is" in text and "differs" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["files"].update({"../x": d["files"]["README.md"]}), "leaves the folder"),
        (lambda d: d["artifacts"][0].update(path="/etc/passwd"), "leaves the folder"),
        (lambda d: d.update(schema=99), "schema 99"),
        (lambda d: d.pop("files"), "files"),
        (lambda d: d["files"].update({"README.md": {"bytes": "x", "sha256": ""}}), "README.md"),
        (lambda d: d["verdict"].update(word="maybe"), "verdict"),
    ],
)
def test_broken_manifest_is_refused(copy: Path, change: object, words: str) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    change(data)  # type: ignore[operator]
    (copy / "manifest.json").write_text(json.dumps(data))
    assert words in message(copy)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "{}", "[" * 100_000])
def test_manifest_that_is_no_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    assert "not a manifest that can be read" in message(copy)


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        recheck(tmp_path)
