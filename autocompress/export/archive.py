"""``model.acz``: an ONNX file for storage and transfer, its weights entropy-coded; unpacking gives back its very bytes.

The file is taken apart into three streams, each of one kind of numbers: its skeleton (nodes, names, lengths), the
float32 weights, and all other weights.  Each is coded by the range coder of LZMA from Python's own library, with the
contexts (``lc``, ``lp``, ``pb``) that make it smallest: floats are told apart by the place of a byte within its number.

Layout: ``ACZ`` and the version in a byte, the header's length as 4 bytes (little endian), the header in JSON, the
streams one behind the other.  Nothing is unpickled, nothing in an archive names a path, and nothing is unpacked beyond
the sizes that its header states, which themselves are bounded.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from pydantic import Field, ValidationError

from autocompress.errors import UsageError
from autocompress.export.files import write_atomic
from autocompress.export.wire import NotOnnxError, weight_spans
from autocompress.plan import Value

SUFFIX = ".acz"
MAGIC = b"ACZ"
VERSION = 1
MAX_HEADER = 1 << 16
MAX_BYTES = 1 << 31
"""Bytes of the largest file: what a protobuf message may hold."""

SAMPLE = 1 << 19
"""Bytes of a stream by which its coder is chosen."""

LEAST = 64
"""Weights of fewer bytes stay in the skeleton: to list them costs as much."""

Coder = Literal["lzma-0-0-0", "lzma-0-2-2", "lzma-3-0-0", "lzma-4-0-0", "none"]
CODERS: tuple[Coder, ...] = ("lzma-0-0-0", "lzma-0-2-2", "lzma-3-0-0", "lzma-4-0-0")


class _Stream(Value):
    coder: Coder
    size: int = Field(ge=0, le=MAX_BYTES)
    packed: int = Field(ge=0, le=MAX_BYTES)


class _Header(Value):
    """``streams`` are the table of spans, the skeleton, float32 weights and other weights, in this order."""

    size: int = Field(ge=0, le=MAX_BYTES)
    sha256: str
    streams: tuple[_Stream, _Stream, _Stream, _Stream]


@dataclass(frozen=True)
class ArchiveStats:
    """What packing did: bytes of the ONNX file and of the archive."""

    onnx_bytes: int
    archive_bytes: int

    @property
    def ratio(self) -> float:
        """Archive bytes for each byte of the file."""
        return self.archive_bytes / self.onnx_bytes


def pack(onnx_path: Path | str, acz_path: Path | str) -> ArchiveStats:
    """Writes the archive of an ONNX file, in one step.

    Raises:
        UsageError: the file is missing, is no ONNX model, or keeps its weights in another file.
    """
    path = Path(onnx_path)
    try:
        data = path.read_bytes()
        spans = weight_spans(data)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    except NotOnnxError as error:
        raise UsageError(f"{path} is not an ONNX model that can be archived: {error}") from error
    kept = [span for span in spans if span.stop - span.start >= LEAST]
    whole, place = memoryview(data), 0
    parts: tuple[list[memoryview], list[memoryview], list[memoryview]] = ([], [], [])
    table = np.zeros((len(kept), 3), "<u4")
    for row, span in enumerate(kept):
        kind = 1 if span.data_type == onnx.TensorProto.FLOAT else 2
        parts[0].append(whole[place : span.start])
        parts[kind].append(whole[span.start : span.stop])
        table[row] = span.start - place, span.stop - span.start, kind
        place = span.stop
    parts[0].append(whole[place:])
    # Column by column and byte by byte, so that the many equal high bytes lie together.
    columns = np.ascontiguousarray(table.T).view(np.uint8).reshape(3, len(kept), 4).transpose(0, 2, 1).tobytes()
    streams, payload = [], []
    for content in (columns, *(b"".join(part) for part in parts)):
        coder, packed = _smallest(content)
        streams.append(_Stream(coder=coder, size=len(content), packed=len(packed)))
        payload.append(packed)
    header = _Header(size=len(data), sha256=hashlib.sha256(data).hexdigest(), streams=tuple(streams))
    text = header.model_dump_json().encode()
    archive = b"".join([MAGIC, bytes([VERSION]), struct.pack("<I", len(text)), text, *payload])
    write_atomic(Path(acz_path), archive)
    return ArchiveStats(len(data), len(archive))


def unpack(acz_path: Path | str, onnx_path: Path | str, max_bytes: int = MAX_BYTES) -> int:
    """Writes the ONNX file that an archive holds, bit for bit, in one step, and returns its bytes.

    Args:
        acz_path: what :func:`pack` wrote.
        onnx_path: where the file goes.
        max_bytes: a larger file is refused before anything is unpacked.

    Raises:
        UsageError: the archive is missing, damaged, of another version, or too large.
    """
    path = Path(acz_path)
    try:
        archive = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    try:
        header, start = _header(archive)
        if header.size > max_bytes:
            raise ValueError(f"it holds {header.size} bytes, and at most {max_bytes} are allowed")
        data = _joined(header, archive, start)
    except (ValueError, lzma.LZMAError) as error:
        raise UsageError(f"cannot unpack {path}: {_first_line(error)}") from error
    write_atomic(Path(onnx_path), data)
    return len(data)


def _header(archive: bytes) -> tuple[_Header, int]:
    """The header, and where the streams begin."""
    fixed = len(MAGIC) + 5
    if archive[: len(MAGIC)] != MAGIC or len(archive) < fixed:
        raise ValueError("it is no .acz archive")
    if archive[len(MAGIC)] != VERSION:
        raise ValueError(f"it is of version {archive[len(MAGIC)]}; this version of autocompress reads {VERSION}")
    (length,) = struct.unpack_from("<I", archive, fixed - 4)
    if length > MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes")
    header = _Header.model_validate_json(archive[fixed : fixed + length])
    if fixed + length + sum(stream.packed for stream in header.streams) != len(archive):
        raise ValueError("it is cut off, or longer than its header says")
    if sum(stream.size for stream in header.streams[1:]) != header.size or header.streams[0].size > header.size:
        raise ValueError("its streams do not add up to the file")
    return header, fixed + length


def _joined(header: _Header, archive: bytes, start: int) -> bytes:
    contents = []
    for stream in header.streams:
        contents.append(memoryview(_decoded(stream, archive[start : start + stream.packed])))
        start += stream.packed
    columns, *streams = contents
    if len(columns) % 12:
        raise ValueError("its table of weights is damaged")
    planes = np.frombuffer(columns, np.uint8).reshape(3, 4, -1).transpose(0, 2, 1)
    table = np.ascontiguousarray(planes).view("<u4").reshape(3, -1).T.tolist()
    places, parts = [0, 0, 0], []
    for gap, length, kind in table:
        if kind not in (1, 2):
            raise ValueError("its table of weights is damaged")
        for which, count in ((0, gap), (kind, length)):
            parts.append(streams[which][places[which] : places[which] + count])
            places[which] += count
    parts.append(streams[0][places[0] :])
    data = b"".join(parts)
    if len(data) != header.size or hashlib.sha256(data).hexdigest() != header.sha256:
        raise ValueError("what it holds is not what was packed")
    return data


def _filters(coder: Coder, size: int) -> list[dict[str, int]]:
    """LZMA's settings for a stream; the window is no larger than what there is, since it is memory."""
    lc, lp, pb = (int(part) for part in coder.split("-")[1:])
    return [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 6,
            "dict_size": min(max(size, 1 << 12), 1 << 22),
            "nice_len": 32,
            "lc": lc,
            "lp": lp,
            "pb": pb,
        }
    ]


def _encoded(content: bytes, coder: Coder) -> bytes:
    return lzma.compress(content, lzma.FORMAT_RAW, filters=_filters(coder, len(content)))


def _smallest(content: bytes) -> tuple[Coder, bytes]:
    """The best coder, chosen on the beginning where there is much, and what it makes of the whole."""
    best = min(CODERS, key=lambda coder: len(_encoded(content[:SAMPLE], coder)))
    packed = _encoded(content, best)
    return (best, packed) if len(packed) < len(content) else ("none", content)


def _decoded(stream: _Stream, packed: bytes) -> bytes:
    if stream.coder == "none":
        found = packed
    else:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(stream.coder, stream.size))
        # One byte more than stated tells whether there is more.
        found = decoder.decompress(packed, stream.size + 1)
    if len(found) != stream.size:
        raise ValueError("a stream unpacks to another size than its header says")
    return found


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"its header is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0] or type(error).__name__
