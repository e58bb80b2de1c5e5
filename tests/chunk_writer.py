"""Naive writers of compressed chunks, for machines without the filters' own libraries."""

from __future__ import annotations

import struct

import numpy as np


def lz4_block(data: bytes) -> bytes:
    """One LZ4 block: at every place the latest earlier occurrence of the next four bytes, taken as far as it goes."""
    out, seen, at, first = bytearray(), {}, 0, 0

    def sequence(literals, match, distance):
        token = min(len(literals), 15) << 4 | (min(match - 4, 15) if match else 0)
        out.append(token)
        more(len(literals))
        out.extend(literals)
        if match:
            out.extend(struct.pack("<H", distance))
            more(match - 4)

    def more(length):
        length -= 15
        while length >= 0:
            out.append(min(length, 255))
            length -= 255

    # the last bytes are literals, as the format asks for
    while at + 12 < len(data):
        key = data[at : at + 4]
        place, seen[key] = seen.get(key), at
        if place is None or at - place > 65535:
            at += 1
            continue
        match = 4
        while at + match < len(data) - 5 and data[place + match] == data[at + match]:
            match += 1
        sequence(data[first:at], match, at - place)
        at += match
        first = at
    sequence(data[first:], 0, 0)
    return bytes(out)


def bitshuffle_lz4(array: np.ndarray, block: int = 8192) -> bytes:
    """An array as HDF5 filter 32008 stores it."""
    item, flat = array.itemsize, np.ascontiguousarray(array).reshape(-1)
    parts, step, at = [struct.pack(">QI", flat.nbytes, block)], block // item, 0
    while flat.size - at >= 8:
        some = flat[at : at + min(step, (flat.size - at) // 8 * 8)]
        bits = np.unpackbits(some.view(np.uint8).reshape(-1, item), axis=1, bitorder="little")
        packed = lz4_block(np.packbits(bits.T, axis=1, bitorder="little").tobytes())
        parts += [struct.pack(">I", len(packed)), packed]
        at += some.size
    return b"".join(parts) + flat[at:].tobytes()


def lz4(array: np.ndarray, block: int = 3000) -> bytes:
    """An array as HDF5 filter 32004 stores it."""
    data = array.tobytes()
    parts = [struct.pack(">QI", len(data), block)]
    for at in range(0, len(data), block):
        some = data[at : at + block]
        packed = lz4_block(some)
        packed = packed if len(packed) < len(some) else some
        parts += [struct.pack(">I", len(packed)), packed]
    return b"".join(parts)


def write_hdf5(path, array: np.ndarray, chunk: tuple[int, ...], encode) -> None:
    """A data set of whole chunks, each written as `encode` gives it; h5py needs no filter for that."""
    import h5py

    number = {bitshuffle_lz4: 32008, lz4: 32004}[encode]
    # block and compression; the library itself, where it is loaded, puts its version and the size of a pixel in front
    options = (0, 2) if encode is bitshuffle_lz4 else ()
    if options and not h5py.h5z.filter_avail(number):
        options = (0, 4, array.itemsize, *options)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(chunk)
    properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, options)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(array.shape)
        kind = h5py.h5t.py_create(array.dtype, logical=True)
        made = h5py.Dataset(h5py.h5d.create(file.id, b"data", kind, space, properties))
        for corner in np.ndindex(*(n // c for n, c in zip(array.shape, chunk, strict=True))):
            start = tuple(k * c for k, c in zip(corner, chunk, strict=True))
            box = tuple(slice(s, s + c) for s, c in zip(start, chunk, strict=True))
            made.id.write_direct_chunk(start, encode(array[box]))
