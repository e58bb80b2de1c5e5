"""Launches the chunk decoders on the CPU: every chunk and every output between guard bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from emulation.build import Library, compile_kernels, kernel_source

UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
SCRATCH = 8192  # bytes of shared memory that bitshuffle_lz4 takes per warp
TOO_LARGE = -5
GAP, UNTOUCHED = 0xEE, 0xA5


@functools.cache
def library(kernel: str) -> Library:
    """A decoder, compiled for every kind of pixel."""
    arguments = {
        "bitshuffle_lz4": UNSIGNED.values(),
        "merlin": (1, 6, 12, 24),
        "unshuffle": (1, 2, 3, 4, 8, 16),
    }
    expressions = [f"{kernel}<{a}>" for a in arguments.get(kernel, ())] or [kernel]
    return compile_kernels(kernel_source(kernel), expressions)


@dataclass
class Batch:
    """Chunks of the same decoded size in one buffer, and room for what they decode to.

    Chunk k lies at ``raw[at[k]:at[k] + length[k]]``, its output at ``memory[places[k]:places[k] + nbytes]``.
    """

    raw: np.ndarray
    at: np.ndarray
    length: np.ndarray
    memory: np.ndarray
    pitch: int
    nbytes: int
    codes: np.ndarray

    @property
    def places(self) -> np.ndarray:
        return np.arange(self.at.size) * self.pitch + 16

    @property
    def outputs(self) -> np.ndarray:
        return self.memory[16:].reshape(-1, self.pitch)[: self.at.size, : self.nbytes]

    def assert_guards_hold(self) -> None:
        """Nothing was written before, between or behind the outputs."""
        rows = self.memory[16:].reshape(-1, self.pitch)
        assert (self.memory[:16] == UNTOUCHED).all()
        assert (rows[: self.at.size, self.nbytes :] == UNTOUCHED).all()
        assert (rows[self.at.size :] == UNTOUCHED).all()


def arrange(chunks: Sequence[bytes], nbytes: int, *, align: int = 1, gap: int = 3, pitch: int = 0) -> Batch:
    """Put chunks of `nbytes` decoded bytes at multiples of `align`, at least `gap` bytes apart."""
    length = np.array([len(c) for c in chunks], np.int64)
    ends = np.cumsum((length + gap + align - 1) // align * align) + gap * align
    at = np.concatenate([[gap * align], ends[:-1]]).astype(np.int64)
    raw = np.full(int(ends[-1]) + gap, GAP, np.uint8)
    for begin, chunk in zip(at, chunks, strict=True):
        raw[begin : begin + len(chunk)] = np.frombuffer(chunk, np.uint8)
    pitch = pitch or nbytes // 16 * 16 + 32
    # allocated as 64-bit numbers: aligned to 16 bytes, as device memory is
    memory = np.zeros((16 + (len(chunks) + 1) * pitch + 15) // 8, np.uint64).view(np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: 16 + (len(chunks) + 1) * pitch]
    memory[:] = UNTOUCHED
    return Batch(raw, at, length, memory, pitch, nbytes, np.zeros(len(chunks), np.int32))


def decode(kernel: str, batch: Batch, *, parts: int = 1, warps: int = 1, order: str = "ascending") -> None:
    """Run bitshuffle_lz4<...> or lz4; `parts` blocks of `warps` warps share a chunk."""
    count = batch.at.size
    library(kernel.partition("<")[0]).launch(
        kernel,
        (count, parts),
        (32 * warps,),
        [
            *(batch.raw, batch.at, batch.length, np.int32(count)),
            *(batch.memory[16:], np.int64(batch.nbytes), np.int64(batch.pitch), batch.codes),
        ],
        shared_mem=SCRATCH * warps if kernel.startswith("bitshuffle") else 0,
        order=order,
    )
