"""What a file was when the job was planned, in one string that a later look at it can be compared with."""

from __future__ import annotations

import hashlib

from pipeline.locations import Place

_CHUNK_BYTES = 1 << 20


def digest_of(place: Place, *, hashed: bool) -> str:
    """`sha256:HEX` of the bytes, or `size+mtime:BYTES+NANOSECONDS`. OSError where the file can't be read."""
    if not hashed:
        info = place.info()
        return f"size+mtime:{info.size}+{info.mtime_ns}"
    digest = hashlib.sha256()
    with place.filesystem.open_input_stream(place.path, compression=None) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"
