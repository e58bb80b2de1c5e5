"""The joint lattice fit on the processor: Numba, one frame at a time; what it is: `gpuem.backends.lattice_fit`."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Frames
from gpuem.backends.cpu_lattice_solve import FAST, eliminate, helper, lattice_step, move, scatter, sigmas
from gpuem.backends.lattice_fit import LatticeFit
from gpuem.codecs.compiled import compiled

kernel: Any = functools.partial(compiled, fastmath=FAST)
# what is noted of every disk, by column; variances are those without priors
NOTED = 14
INTENSITY, BACKGROUND, INFORMATION, SCORE, ROBUST, SLOPE, SLOPE_VARIANCE = 0, 1, 2, 5, 7, 8, 10
INTENSITY_VARIANCE, BACKGROUND_VARIANCE, MISFIT = 11, 12, 13
# a disk counts as found where its intensity is so many standard deviations above nothing
FOUND = 3.0
# a step moves no disk by more than this, in radii
LONGEST = 0.5
# after a longer step, in px, the blurred probe is used once more, twice at most
FAR = 1.0
# a fit goes on until its steps are this part of what counts as converged
NEAR = 0.1


def run(fit: LatticeFit, frames: Frames, positions: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Fit the lattice of every frame; rows of `out` hold `gpuem.backends.lattice_fit.COLUMNS`."""
    noted = np.empty((1, fit.sites.shape[0], NOTED))
    fit_frames((frames.pixels, frames.starts, frames.shape), positions, _tables(fit), noted, out)


def details(
    fit: LatticeFit, frames: Frames, positions: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The fit (n, columns) of sampled frames, and what was noted of every disk (n, sites, `NOTED`).

    With several lattices only the disks of the last one that was tried are noted.
    """
    out = np.empty((frames.starts.size, fit.columns))
    noted = np.zeros((frames.starts.size, fit.sites.shape[0], NOTED))
    fit_frames((frames.pixels, frames.starts, frames.shape), positions, _tables(fit), noted, out)
    return out, noted


def _tables(fit: LatticeFit) -> tuple[Any, ...]:
    """The fit as the compiled function takes it."""
    flat = np.ones((1, 4, fit.coarse.shape[1]), np.float32)
    return (
        (fit.coarse, flat, fit.coarse_window, fit.coarse_pixels),
        (fit.probe, fit.shading, fit.window, fit.pixels),
        (fit.sites, fit.first, fit.priors, fit.lattices, fit.drift, fit.scan_width),
        (fit.good, fit.axes, fit.numbers, fit.steps),
    )


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def fit_frames(frames: Any, positions: Any, tables: Any, noted: Any, out: Any) -> None:
    """Fit every frame with every lattice, keep the lattice that explains most.

    Parameters
    ----------
    frames : tuple
        Pixels, starts (n,) int64, shape.
    positions : (n,) int64
        Flat scan positions.
    tables : tuple
        As `_tables` makes them.
    noted : (n or 1, sites, NOTED) float64
        Overwritten; one row is used again and again.
    out : (n, columns)
        Overwritten.
    """
    pixels, starts, shape = frames
    coarse, sharp, model, rest = tables
    wide, near = _ramps(coarse, shape[1]), _ramps(sharp, shape[1])
    sites, first, priors, lattices, drift, width = model
    largest = max(coarse[2].size, sharp[2].size)
    scratch = (np.empty((2, largest), np.float32), np.empty((6, 6)), np.empty(6), np.empty((6, 6)))
    theta, row = np.empty(6), np.empty(out.shape[1])
    for frame in range(starts.size):
        most = -1.0
        note = noted[frame if noted.shape[0] > 1 else 0]
        y, x = positions[frame] // width, positions[frame] % width
        for g in range(lattices.shape[0]):
            theta[:] = lattices[g]
            theta[0] += drift[0, 0] * y + drift[0, 1] * x
            theta[1] += drift[1, 0] * y + drift[1, 1] * x
            mine = slice(first[g], first[g + 1])
            of = (sites[mine], priors[mine], first[g])
            explained = _fit((pixels, starts[frame], shape), theta, (wide, near, of, rest), note[mine], scratch, row)
            row[13] = g
            if explained > most or g == 0:
                most = explained
                for k in range(row.size):
                    out[frame, k] = row[k]


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _ramps(probe: Any, width: Any) -> Any:
    """A probe's tables with the window's pixels as numbers to compute with, and as steps in memory."""
    planes, shading, window, pixels = probe
    steps = np.empty(pixels.shape[1], np.int64)
    for i in range(steps.size):
        steps[i] = pixels[0, i] * width + pixels[1, i]
    return planes, shading, window, pixels, pixels.astype(np.float32), steps, pixels.max()


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _fit(frame: Any, theta: Any, tables: Any, note: Any, scratch: Any, row: Any) -> Any:
    """Fit one frame with one lattice, starting from `theta`; how much its disks explain."""
    coarse, sharp, of, (good, axes, numbers, steps) = tables
    buffers, normal, step, inverse = scratch
    start = theta.copy()
    note[:, INTENSITY] = 0.0
    note[:, BACKGROUND] = 0.0
    usual = steps[0] + steps[1]
    count, moved, fits, misfit = 0, 0.0, False, 0.0
    while count < 2 * usual:
        blurred = count < steps[0] or (count < steps[0] + 2 and moved > FAR)
        misfit = _disks(frame, theta, coarse if blurred else sharp, of, (good, numbers), note, buffers, count)
        fits = lattice_step(theta, start, of, numbers, note, normal, step, blurred)
        if not fits:
            break
        moved = move(theta, step, of[0], LONGEST * numbers[3])
        count += 1
        if count >= usual and moved <= NEAR * numbers[5]:
            break
    explained, disks, counts = 0.0, 0, 0.0
    for k in range(note.shape[0]):
        if note[k, INFORMATION] + note[k, INFORMATION + 2] > 0 and note[k, INTENSITY_VARIANCE] > 0:
            square = note[k, INTENSITY] ** 2 / note[k, INTENSITY_VARIANCE]
            explained += square
            counts += note[k, INTENSITY]
            disks += 1 if square > FOUND * FOUND and note[k, ROBUST] > 0.5 else 0
    row[10], row[11], row[12] = misfit, disks, counts
    if fits and moved <= numbers[5] and disks >= numbers[4]:
        row[:6] = theta
        sigmas(theta, normal, inverse, axes, scatter(note, of, step), row)
    else:
        row[:10] = np.nan
    return explained


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _disks(frame: Any, theta: Any, probe: Any, of: Any, how: Any, note: Any, buffers: Any, count: Any) -> Any:
    """Information and score of every disk's place, at the lattice `theta`; the reduced chi^2 of all windows."""
    shape = frame[2]
    planes, shading, window, places, ramps, steps, half = probe
    sites, priors, site = of
    good, numbers = how
    phases = int(math.sqrt(planes.shape[0]) + 0.5) - 1
    data, mask = buffers[0][: window.size], buffers[1][: window.size]
    misfit, pixels_used = 0.0, 0.0
    for k in range(sites.shape[0]):
        note[k, INFORMATION : ROBUST + 1] = 0.0
        y = theta[0] + sites[k, 0] * theta[2] + sites[k, 1] * theta[4]
        x = theta[1] + sites[k, 0] * theta[3] + sites[k, 1] * theta[5]
        # not a number compares false
        if not (-1 <= y <= shape[0] and -1 <= x <= shape[1]):
            continue
        # the same window on every device, where rounding puts a place on this or that side of a whole pixel
        top, left = math.floor(y + 1e-6), math.floor(x + 1e-6)
        whole = _cut_out(frame, (top, left, half), (places, steps, window), good, numbers[2], data, mask)
        fine_y, fine_x = (y - top) * phases, (x - left) * phases
        at_y, at_x = min(int(fine_y), phases - 1), min(int(fine_x), phases - 1)
        plane = at_y * (phases + 1) + at_x
        sums = _sums(
            data,
            window if whole else mask,
            (planes[plane], planes[plane + 1], planes[plane + phases + 1], planes[plane + phases + 2]),
            shading[site + k if shading.shape[0] > 1 else 0],
            ramps,
            (fine_y - at_y, fine_x - at_x, y - top, x - left, phases, 1.0 / numbers[3]),
            (note[k, INTENSITY], note[k, BACKGROUND], numbers[0], numbers[1], priors[k, 0], priors[k, 5], count == 0),
        )
        left_over = eliminate(sums, priors[k], note[k], numbers, count == 0)
        if note[k, INFORMATION] > 0:
            misfit += left_over
            pixels_used += sums[28] - 4
    return misfit / max(pixels_used, 1.0)


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _cut_out(frame: Any, box: Any, at: Any, good: Any, saturated: Any, data: Any, mask: Any) -> Any:
    """Copy the pixels of a window, and which of them count; True where that is the window itself."""
    pixels, begin, shape = frame
    top, left, half = box
    places, steps, window = at
    # the window reaches as far before its middle as behind it
    inside = top >= half and left >= half and top + half < shape[0] and left + half < shape[1]
    if inside and good.size == 0 and saturated == np.inf:
        middle = begin + top * shape[1] + left
        for i in range(window.size):
            data[i] = np.float32(pixels[middle + steps[i]])
        return True
    for i in range(window.size):
        y, x = top + places[0, i], left + places[1, i]
        counts = 0 <= y < shape[0] and 0 <= x < shape[1]
        data[i] = np.float32(pixels[begin + y * shape[1] + x]) if counts else np.float32(0)
        if counts and good.size:
            counts = good[y * shape[1] + x] > 0
        mask[i] = window[i] if counts and data[i] < saturated else np.float32(0)
        if mask[i] == 0:
            # a dead pixel may hold anything, not a number too
            data[i] = np.float32(0)
    return False


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _sums(data: Any, mask: Any, planes: Any, shading: Any, ramps: Any, place: Any, now: Any) -> Any:
    """Weighted normal equations of a window: background, gradient y and x, intensity, and the places y and x.

    The upper triangle of the 6x6 matrix row by row, the right-hand side, chi^2 and the number of pixels.
    """
    f = np.float32
    p00, p01, p10, p11 = planes
    ramp_y, ramp_x = ramps[0], ramps[1]
    both, before_y, before_x, here = shading[0], shading[1], shading[2], shading[3]
    # fractions of a phase, of a pixel; phases per pixel; one over the radius
    u, v, sub_y, sub_x = f(place[0]), f(place[1]), f(place[2]), f(place[3])
    phases, scale = f(place[4]), f(place[5])
    level, ground, gain, read = f(now[0]), f(now[1]), f(now[2]), f(now[3])
    floor, inside = f(now[4]) * level * level + read, f(now[5])
    if now[6]:
        # nothing is known yet: all pixels count alike
        gain, floor, inside = f(0), f(1), f(0)
    bb, by, bx, bt, bp, bq = f(0), f(0), f(0), f(0), f(0), f(0)
    yy, yx, yt, yp, yq = f(0), f(0), f(0), f(0), f(0)
    xx, xt, xp, xq = f(0), f(0), f(0), f(0)
    tt, tp, tq, pp, pq, qq = f(0), f(0), f(0), f(0), f(0), f(0)
    rb, ry, rx, rt, rp, rq, rr, n = f(0), f(0), f(0), f(0), f(0), f(0), f(0), f(0)
    for i in range(data.size):
        a, b, c, d = p00[i], p01[i], p10[i], p11[i]
        upper, lower = a + v * (b - a), c + v * (d - c)
        disk = upper + u * (lower - upper)
        # the disk moves one way, what lies under a fixed pixel the other
        disk_p = (lower - upper) * phases
        disk_q = ((b - a) + u * ((d - c) - (b - a))) * phases
        e, g, h, k = both[i], before_y[i], before_x[i], here[i]
        # the window's pixel lies sub_y, sub_x before the place of its factor
        near, far = g + sub_x * (e - g), k + sub_x * (h - k)
        factor = far + sub_y * (near - far)
        t = disk * factor
        p = disk_p * factor + disk * (near - far)
        q = disk_q * factor + disk * ((e - g) * sub_y + (h - k) * (f(1) - sub_y))
        lit = level * t
        rest = data[i] - (lit + ground)
        w = mask[i] / (gain * (lit + ground) + floor + inside * lit * lit)
        y, x = t * (ramp_y[i] - sub_y) * scale, t * (ramp_x[i] - sub_x) * scale
        wy, wx, wt, wp, wq = w * y, w * x, w * t, w * p, w * q
        bb, by, bx, bt, bp, bq = bb + w, by + wy, bx + wx, bt + wt, bp + wp, bq + wq
        yy, yx, yt, yp, yq = yy + wy * y, yx + wy * x, yt + wy * t, yp + wy * p, yq + wy * q
        xx, xt, xp, xq = xx + wx * x, xt + wx * t, xp + wx * p, xq + wx * q
        tt, tp, tq, pp, pq, qq = tt + wt * t, tp + wt * p, tq + wt * q, pp + wp * p, pq + wp * q, qq + wq * q
        rb, ry, rx, rt, rp, rq = (
            rb + w * rest,
            ry + wy * rest,
            rx + wx * rest,
            rt + wt * rest,
            rp + wp * rest,
            rq + wq * rest,
        )
        rr, n = rr + w * rest * rest, n + mask[i]
    return (
        bb, by, bx, bt, bp, bq, yy, yx, yt, yp, yq, xx, xt, xp, xq, tt, tp, tq, pp, pq, qq,
        rb, ry, rx, rt, rp, rq, rr, n,
    )  # fmt: skip
