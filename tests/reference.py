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


def com(frames, center, mask=None):
    """Shift (y, x) from the centre; 0 where a frame has no counts."""
    out = np.zeros((len(frames), 2))
    for k, (s, s_y, s_x) in enumerate(moments(frames, mask)):
        if s != 0:
            out[k] = s_y / s - center[0], s_x / s - center[1]
    return out


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
