"""The whole header of a GGUF file, checked before llama.cpp or gguf-py see it.

Layout (little endian): ``GGUF``, u32 version, i64 tensors, i64 keys; each key: string, u32 type,
value; each tensor: string, u32 n_dims, u64 dims, u32 type, u64 offset; then padding to
``general.alignment`` and the data. A string is u64 length and bytes. The rules are those of
llama.cpp's reader, including tensors that follow one another without gaps.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

from svdexport.errors import InputError
from svdexport.safety.documents import quoted
from svdexport.safety.paths import check_regular

VERSIONS = (2, 3)
MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 with the final zero
MAX_DIMS = 4
MAX_STRING = 64 * 2**20
MAX_STRINGS = 3_000_000  # elements of all string arrays: vocabularies and merges are under 1.5M
MAX_ALIGNMENT = 65_536

_STRING, _ARRAY, _BOOL, _U32 = 8, 9, 7, 4
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

# ggml type -> (name, elements per block, bytes per block); enum ggml_type of ggml.h. Numbers that
# are left out were removed from the format.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: ggml's name of its type, ne (rows last), place in the file."""

    type: str
    ne: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The checked header of a GGUF file."""

    path: Path
    version: int
    alignment: int
    keys: frozenset[str] = field(repr=False)
    tensors: dict[str, GgufTensor] = field(repr=False)


def check_gguf(path: Path) -> GgufHeader:
    """Parse and check the header of a GGUF file; tensor data is not read.

    Raises:
        InputError: naming the file and what in its header is wrong.
    """
    path = Path(path)
    size = check_regular(path)
    if size < 24:
        raise InputError(f"{path}: too short for a GGUF file ({size} bytes)")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _Parser(path, data).header()


class _Parser:
    """A cursor over the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0
        self._strings = 0
        self._alignment = 32

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise self._error(f"not a GGUF file (it begins with {self._data[:4]!r})")
        self._at = 4
        version = self._u32()
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise self._error(
                "big-endian GGUF, which is not read here"
                if swapped
                else f"GGUF version {version}; versions 2 and 3 are read"
            )
        n_tensors, n_keys = self._i64(), self._i64()
        # A tensor takes at least 24 bytes and a key 13: more cannot fit.
        if not 0 <= n_tensors <= min(MAX_TENSORS, self._size // 24):
            raise self._error(f"{n_tensors} tensors in a file of {self._size} bytes")
        if not 0 <= n_keys <= min(MAX_KEYS, self._size // 13):
            raise self._error(f"{n_keys} keys in a file of {self._size} bytes")
        keys: set[str] = set()
        for _ in range(n_keys):
            self._key(keys)
        raw: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            self._tensor(raw)
        tensors = self._place(raw)
        return GgufHeader(self._path, version, self._alignment, frozenset(keys), tensors)

    def _key(self, keys: set[str]) -> None:
        name = self._name("key", MAX_KEY_BYTES)
        if name in keys:
            raise self._error(f"the key {quoted(name)} is repeated")
        keys.add(name)
        where = f"key {quoted(name)}"
        kind = self._u32()
        if name == "general.alignment":
            if kind != _U32:
                raise self._error("general.alignment is not a 32-bit unsigned number")
            self._alignment = self._u32()
            a = self._alignment
            if not 8 <= a <= MAX_ALIGNMENT or a & (a - 1):
                raise self._error(f"general.alignment {a} is not a power of two from 8 to 65536")
        elif kind == _ARRAY:
            self._array(where)
        else:
            self._values(kind, 1, where)

    def _array(self, where: str) -> None:
        kind = self._u32()
        count = self._u64()
        if kind == _ARRAY:
            raise self._error(f"{where}: arrays of arrays are not read")
        if kind == _STRING:
            self._strings += count
            if count > self._left() // 8 or self._strings > MAX_STRINGS:
                raise self._error(f"{where}: an array of {count} strings")
        self._values(kind, count, where)

    def _values(self, kind: int, count: int, where: str) -> None:
        if kind == _STRING:
            self._skip_strings(count, where)
            return
        width = _SCALAR_BYTES.get(kind)
        if width is None:
            raise self._error(f"{where}: unknown value type {kind}")
        if count > self._left() // width:
            raise self._error(f"{where}: {count} values reach past the end of the file")
        if kind == _BOOL:
            block = self._data[self._at : self._at + min(count, 2**20)]
            if block.strip(b"\0\1"):
                raise self._error(f"{where}: a truth value that is neither 0 nor 1")
        self._at += count * width

    def _skip_strings(self, count: int, where: str) -> None:
        """Step over strings; one tight loop, as a vocabulary has hundreds of thousands."""
        data, size, at, length_at = (
            self._data,
            self._size,
            self._at,
            struct.Struct("<Q").unpack_from,
        )
        for _ in range(count):
            if size - at < 8:
                raise self._error("the header is cut short")
            (length,) = length_at(data, at)
            at += 8
            if length > MAX_STRING or length > size - at:
                raise self._error(f"{where}: a string of {length} bytes")
            at += length
        self._at = at

    def _tensor(self, raw: dict[str, tuple[str, tuple[int, ...], int, int]]) -> None:
        name = self._name("tensor name", MAX_NAME_BYTES)
        where = f"tensor {quoted(name)}"
        if name in raw:
            raise self._error(f"{where} is repeated")
        n_dims = self._u32()
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._error(f"{where} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
        ne = tuple(self._u64() for _ in range(n_dims))
        elements = 1
        for length in ne:
            elements *= length
        # The product is exact here; in 64 bits it could wrap around to a small number.
        if min(ne) < 1 or elements >= 2**63:
            raise self._error(f"{where} has impossible dimensions {ne}")
        kind = self._u32()
        if kind not in TYPES:
            raise self._error(f"{where} has the unknown type {kind}")
        type_name, block, block_bytes = TYPES[kind]
        if ne[0] % block:
            raise self._error(f"{where}: rows of {ne[0]} are no multiple of {type_name}'s {block}")
        raw[name] = (type_name, ne, self._u64(), elements // block * block_bytes)

    def _place(
        self, raw: dict[str, tuple[str, tuple[int, ...], int, int]]
    ) -> dict[str, GgufTensor]:
        """Tensors with their place in the file; each must begin where the one before ends."""
        start = self._padded(self._at)
        expected = 0
        tensors = {}
        for name, (type_name, ne, offset, nbytes) in raw.items():
            where = f"tensor {quoted(name)}"
            if offset != expected:
                raise self._error(f"{where} has the offset {offset}, not {expected}")
            if start + offset + nbytes > self._size:
                raise self._error(
                    f"{where} ends at byte {start + offset + nbytes}, the file at {self._size}"
                )
            tensors[name] = GgufTensor(type_name, ne, start + offset, nbytes)
            expected = self._padded(offset + nbytes)
        return tensors

    def _padded(self, at: int) -> int:
        return (at + self._alignment - 1) // self._alignment * self._alignment

    def _name(self, what: str, limit: int) -> str:
        begin, end = self._string(limit, what)
        try:
            name = self._data[begin:end].decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"a {what} that is not UTF-8 text") from None
        if not name or "\0" in name:
            raise self._error(f"an empty {what}, or one with a zero byte")
        return name

    def _string(self, limit: int, where: str) -> tuple[int, int]:
        length = self._u64()
        if length > limit or length > self._left():
            raise self._error(f"{where}: a string of {length} bytes")
        begin = self._at
        self._at += length
        return begin, self._at

    def _left(self) -> int:
        return self._size - self._at

    def _u32(self) -> int:
        return self._unpack("<I", 4)

    def _u64(self) -> int:
        return self._unpack("<Q", 8)

    def _i64(self) -> int:
        return self._unpack("<q", 8)

    def _unpack(self, layout: str, width: int) -> int:
        if self._left() < width:
            raise self._error("the header is cut short")
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += width
        return int(value)

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self._path}: {problem}")
