"""Naive, slow, obviously right: what the fast code is compared with. Integers in int64, floats in float64."""

from __future__ import annotations

import numpy as np


def wide(frames):
    """Frames (n, y, x) as int64 or float64."""
    return frames.astype(np.float64 if frames.dtype.kind == "f" else np.int64)


def frame_sum(frames):
    total = np.zeros(frames.shape[1:], wide(frames[:1]).dtype)
    for frame in wide(frames):
        total = total + frame
    return total


def frame_max(frames):
    largest = frames[0]
    for frame in frames:
        largest = np.maximum(largest, frame)
    return largest


def mask_sums(frames, mask):
    return np.array([frame[mask].sum() for frame in wide(frames)])


def image_sums(frames, image):
    return np.array([(frame * image).sum() for frame in frames.astype(np.float64)])


def moments(frames, mask=None):
    y, x = np.indices(frames.shape[1:])
    inside = np.ones(frames.shape[1:], bool) if mask is None else mask
    return np.array([[(f * inside).sum(), (f * y * inside).sum(), (f * x * inside).sum()] for f in wide(frames)])


def all_sums(frames, masks, regions):
    """Sums in masks, moments in regions, sum and maximum over frames."""
    return (
        [mask_sums(frames, mask) for mask in masks],
        [moments(frames, region) for region in regions],
        frame_sum(frames),
        frame_max(frames),
    )


def all_finite(frames):
    return np.array([np.isfinite(frame).all() for frame in frames])


def magnitudes(frames):
    wide = np.abs(frames.astype(np.float64))
    return np.array([[frame.max(), frame.sum()] for frame in wide])


def convert(raw, at, stored, size):
    """Frames whose bytes begin at `at`, in native byte order."""
    stored = np.dtype(stored)
    found = [np.frombuffer(raw[a : a + size * stored.itemsize].tobytes(), stored) for a in at]
    return np.stack(found).astype(stored.newbyteorder("="))


def dark_and_gain(frames, dark, gain, real):
    """(v - dark) * gain, every step rounded to `real`."""
    out = frames.astype(real)
    if dark is not None:
        out = (out - dark).astype(real)
    if gain is not None:
        out = (out * gain).astype(real)
    return out


def patch_dead(frames, neighbours):
    """Frames whose dead pixels (flat index: good neighbours) are means; halves of whole numbers rounded up."""
    out = frames.copy()
    for k, frame in enumerate(frames.reshape(len(frames), -1)):
        for pixel, good in neighbours.items():
            if frames.dtype.kind == "f":
                mean = sum(float(frame[g]) for g in good) / len(good)
            else:
                mean = (2 * sum(int(frame[g]) for g in good) + len(good)) // (2 * len(good))
            out[k].reshape(-1)[pixel] = mean
    return out


def cut_into_chunks(whole, chunk):
    """An array as chunks in C order of their grid, (chunks, pixels of a chunk)."""
    corners = np.ndindex(*(n // c for n, c in zip(whole.shape, chunk, strict=True)))
    boxes = [tuple(slice(k * c, k * c + c) for k, c in zip(corner, chunk, strict=True)) for corner in corners]
    return np.stack([whole[box].reshape(-1) for box in boxes])


def place_chunks(chunks, shape, chunk):
    """The array of chunks in C order, (chunks, pixels of a chunk), as an array of `shape` (whole chunks)."""
    out = np.zeros(shape, chunks.dtype)
    for number, corner in enumerate(np.ndindex(*(n // c for n, c in zip(shape, chunk, strict=True)))):
        out[tuple(slice(k * c, k * c + c) for k, c in zip(corner, chunk, strict=True))] = chunks[number].reshape(chunk)
    return out


def lz4_block(data):
    """One LZ4 block, byte by byte, as its format is described."""
    out, at = bytearray(), 0

    def length(first):
        nonlocal at
        total, more = first, 255
        while first == 15 and more == 255:
            more = data[at]
            total, at = total + more, at + 1
        return total

    while at < len(data):
        token = data[at]
        at += 1
        literals = length(token >> 4)
        out += data[at : at + literals]
        at += literals
        if at < len(data):
            distance = data[at] | data[at + 1] << 8
            at += 2
            for _ in range(length(token & 15) + 4):
                out.append(out[-distance])
    return bytes(out)


def header(chunk):
    """Bytes in all, bytes of a block, and where the first block begins, of filters 32004 and 32008."""
    return int.from_bytes(chunk[:8], "big"), int.from_bytes(chunk[8:12], "big"), 12


def bitshuffle_lz4(chunk, itemsize):
    """A chunk of filter 32008: planes of bits, lowest first, each of one bit of all pixels of a block."""
    total, _, at = header(chunk)
    out = b""
    while total - len(out) >= 8 * itemsize:
        stop = at + 4 + int.from_bytes(chunk[at : at + 4], "big")
        planes = np.frombuffer(lz4_block(chunk[at + 4 : stop]), np.uint8).reshape(8 * itemsize, -1)
        bits = np.unpackbits(planes, axis=1, bitorder="little").astype(np.uint64)
        pixels = sum((plane << np.uint64(k) for k, plane in enumerate(bits)), np.zeros(1, np.uint64))
        out, at = out + pixels.astype(f"<u{itemsize}").tobytes(), stop
    return out + chunk[at:]


def lz4(chunk):
    """A chunk of filter 32004: blocks that LZ4 couldn't make smaller are stored as they are."""
    total, size, at = header(chunk)
    out = b""
    while len(out) < total:
        count, stop = min(size, total - len(out)), at + 4 + int.from_bytes(chunk[at : at + 4], "big")
        block = chunk[at + 4 : stop]
        out, at = out + (block if len(block) == count else lz4_block(block)), stop
    return out


def unshuffle(data, itemsize):
    """Byte k of all pixels lies together; what fills no pixel follows as it is."""
    count = len(data) // itemsize
    pixels = [data[i + k * count] for i in range(count) for k in range(itemsize)]
    return bytes(pixels) + data[count * itemsize :]


def merlin(stored, bits, shape, chips):
    """A raw frame: for every pixel of the image the word that holds it, pixels of a word in reverse order."""
    if bits == 24:
        half = len(stored) // 2
        upper, lower = (merlin(part, 12, shape, chips).astype(np.uint32) for part in (stored[:half], stored[half:]))
        return (upper << 12) + lower
    per_word = {1: 64, 6: 8, 12: 4}[bits]
    words = np.frombuffer(stored, ">u8")
    rows, columns = shape[0] // chips[0], shape[1] // chips[1]
    image = np.zeros(shape, np.uint16 if bits == 12 else np.uint8)
    for y in range(shape[0]):
        for x in range(shape[1]):
            chip_y, row, chip_x, column = *divmod(y, rows), *divmod(x, columns)
            if chip_y:
                row, column = rows - 1 - row, columns - 1 - column
            slot = chips[0] * chips[1] - 1 - (chip_y * chips[1] + chip_x)
            word = int(words[((row * chips[0] * chips[1] + slot) * columns + column) // per_word])
            image[y, x] = word >> column % per_word * (64 // per_word) & ((1 << 64 // per_word) - 1)
    return image


def com(frames, center, mask=None):
    """Shift (y, x) from the centre; 0 where a frame has no counts."""
    out = np.zeros((len(frames), 2))
    for k, (s, s_y, s_x) in enumerate(moments(frames, mask)):
        if s != 0:
            out[k] = s_y / s - center[0], s_x / s - center[1]
    return out


def correct(frames, dark=None, gain=None, dead=None):
    """(pixel - dark) * gain, each step rounded to the type of the result; then means of good pixels in dead ones."""
    narrow = frames.dtype.itemsize <= 2 or frames.dtype.newbyteorder("=") == np.float32
    scaled = np.dtype("f4" if narrow else "f8")
    half = frames.dtype.kind == "f" and frames.dtype.itemsize == 2
    out = frames.astype(scaled if dark is not None or gain is not None or half else frames.dtype.newbyteorder("="))
    if dark is not None:
        out = out - np.asarray(dark).astype(scaled)
    if gain is not None:
        out = out * np.asarray(gain).astype(scaled)
    for frame in out:
        for y, x in np.argwhere(dead) if dead is not None else ():
            frame[y, x] = mean(around(frame, dead, y, x), frame.dtype)
    return out


def around(frame, dead, y, x):
    """Good pixels in the smallest square around (y, x) that holds any, row by row."""
    for r in range(1, max(frame.shape) + 1):
        square = np.s_[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1]
        if not dead[square].all():
            return frame[square][~dead[square]].tolist()
    raise AssertionError("no good pixel")


def mean(values, dtype):
    """Floats are added one by one in float64; integers without limits, and rounded half up."""
    if dtype.kind != "f":
        return (2 * sum(values) + len(values)) // (2 * len(values))
    total = np.float64(0)
    for value in values:
        total = total + np.float64(value)
    return dtype.type(total / np.float64(len(values)))


def annulus(shape, center, outer, inner=0.0):
    mask = np.zeros(shape, bool)
    for y in range(shape[0]):
        for x in range(shape[1]):
            d2 = (y - center[0]) ** 2 + (x - center[1]) ** 2
            mask[y, x] = d2 <= outer**2 and not (inner > 0 and d2 <= inner**2)
    return mask


def planted(shape, dtype, seed=0):
    """Frames with asymmetries and extremes planted, so that no mistake can average out."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        # eighths: sums of them are exact in float64 in any order
        data = rng.integers(-800, 8000, shape).astype(np.float64) / 8
    else:
        info = np.iinfo(dtype)
        data = rng.integers(max(info.min, -(2**31)), min(info.max, 2**32 - 1), shape, dtype=np.int64, endpoint=True)
    flat = data.reshape(-1, *shape[-2:])
    flat[0] = 0
    flat[-1, 0, -1] = flat.max()
    if len(flat) > 2:
        flat[1] = flat.max()
        flat[2, -1, :] = flat.min()
    return data.astype(dtype)
