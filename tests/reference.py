"""Naive, slow, obviously right: what the fast code is compared with. Integers in int64, floats in float64."""

from __future__ import annotations

import math

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


def place_part(frames, inside, size, out, at):
    """Whole frames `out` with a box of `size` at `at` from the frames of a part, where it begins `inside`; a copy."""
    out = out.copy()
    for whole, frame in zip(out, frames, strict=True):
        for y in range(size[0]):
            for x in range(size[1]):
                whole[at[0] + y, at[1] + x] = frame[inside[0] + y, inside[1] + x]
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


def is_maximum(image, y, x):
    """Higher than its neighbours earlier in the order of pixels, not lower than those later in it; positive."""
    for dy, dx in np.ndindex(3, 3):
        a, b = y + dy - 1, x + dx - 1
        if (dy, dx) == (1, 1) or not (0 <= a < image.shape[0] and 0 <= b < image.shape[1]):
            continue
        if not (image[y, x] > image[a, b] if (dy, dx) < (1, 1) else image[y, x] >= image[a, b]):
            return False
    return image[y, x] > 0


def find_peaks(image, edge=0, min_absolute=0, min_relative=0, relative_to=1, spacing=0, max_peaks=64):
    """Pixels and heights (y, x, height) of an image's maxima, one filter after another."""
    height, width = image.shape
    found = [(y, x, image[y, x]) for y, x in np.ndindex(height, width) if is_maximum(image, y, x)]
    found = [(y, x, v) for y, x, v in found if edge <= y < height - edge and edge <= x < width - edge]
    found = sorted((p for p in found if p[2] > min_absolute), key=lambda p: -p[2])
    least = np.float32(min_relative) * found[min(relative_to, len(found)) - 1][2] if found else 0
    kept = []
    for y, x, v in (p for p in found if p[2] >= least):
        if all((y - a) ** 2 + (x - b) ** 2 >= spacing**2 for a, b, _ in kept):
            kept.append((y, x, v))
    return np.array(kept[:max_peaks], np.float64).reshape(-1, 3)


def fourier_series(image, y, x):
    """The trigonometric polynomial through all pixels of a periodic image, at (y, x)."""
    fy, fx = (np.fft.fftfreq(n) for n in image.shape)
    spectrum = np.fft.fft2(image.astype(np.float64))
    return (np.exp(2j * np.pi * fy * y) @ spectrum @ np.exp(2j * np.pi * fx * x)).real / image.size


def guided(frame, site, kernel, search, normalised=False, logarithm=False):
    """Product of a kernel with a frame at whole shifts from a site, (2 search + 1)^2; None where half is off the frame.

    What of the kernel is off the frame counts nothing: its negative part is scaled to balance the positive one, and
    the norm of the positive part is made up for.
    """
    half, reach = len(kernel) // 2, len(kernel) // 2 + search
    cy, cx = (int(np.floor(v + 0.5)) for v in site)
    wide = np.pad(frame.astype(np.float64), reach, constant_values=np.nan)
    window = wide[cy : cy + 2 * reach + 1, cx : cx + 2 * reach + 1]
    if logarithm:
        window = np.log(1 + window - np.nanmin(window))
    plus, minus = np.maximum(kernel, 0).astype(float), np.maximum(-kernel, 0).astype(float)
    centred = ~np.isnan(window[search : search + len(kernel), search : search + len(kernel)])
    if plus[centred].sum() < 0.5 * plus.sum():
        return None
    found = np.zeros((2 * search + 1,) * 2)
    for dy, dx in np.ndindex(found.shape):
        part = window[dy : dy + 2 * half + 1, dx : dx + 2 * half + 1]
        on = ~np.isnan(part)
        if not np.isnan(window).any():
            found[dy, dx] = (part * kernel).sum()
        elif minus[on].sum() > 0 and plus[on].sum() > 0:
            balance = plus[on].sum() / minus[on].sum()
            norm = np.sqrt((plus**2).sum() / (plus[on] ** 2).sum())
            found[dy, dx] = ((part * plus)[on].sum() - balance * (part * minus)[on].sum()) * norm
        if normalised:
            under = part[on & (kernel != 0)]
            spread = np.sqrt(((under - under.mean()) ** 2).sum() * (kernel.astype(float) ** 2).sum())
            found[dy, dx] = found[dy, dx] / spread if spread > 1e-9 * abs(under).sum() else 0
    return found


def disk_system(fit, frame, place, site, known, blurred, first):
    """Information (2, 2) and score (2,) of a disk's place, and what else is found of it; None where nothing is.

    Parameters
    ----------
    fit : LatticeFit
        Tables.
    frame : (y, x) array
        One pattern.
    place : (2,) array
        Where the disk is thought to be (y, x).
    site : int
        Which of the fit's disks.
    known : tuple of float
        Its intensity and background.
    blurred, first : bool
        Which probe; whether nothing is known yet.
    """
    gain, read, saturation, radius = fit.numbers[:4]
    planes, pixels, window = (
        (fit.coarse, fit.coarse_pixels, fit.coarse_window) if blurred else (fit.probe, fit.pixels, fit.window)
    )
    if not ((place >= -1) & (place <= frame.shape)).all():
        return None
    corner = np.floor(place + 1e-6).astype(int)
    sy, sx = place - corner
    phases = math.isqrt(len(planes)) - 1
    iy, ix = (min(int(s * phases), phases - 1) for s in (sy, sx))
    u, v = sy * phases - iy, sx * phases - ix
    table = planes.astype(float).reshape(phases + 1, phases + 1, -1)[iy : iy + 2, ix : ix + 2]
    disk = np.einsum("a,b,abn", [1 - u, u], [1 - v, v], table)
    disk_y = np.einsum("a,b,abn", [-phases, phases], [1 - v, v], table)
    disk_x = np.einsum("a,b,abn", [1 - u, u], [-phases, phases], table)
    shade = np.ones((2, 2, disk.size)) if blurred else fit.shading[site].astype(float).reshape(2, 2, -1)
    inside = np.einsum("a,b,abn", [sy, 1 - sy], [sx, 1 - sx], shade)
    inside_y = np.einsum("a,b,abn", [1, -1], [sx, 1 - sx], shade)
    inside_x = np.einsum("a,b,abn", [sy, 1 - sy], [1, -1], shade)
    t, p, q = disk * inside, disk_y * inside + disk * inside_y, disk_x * inside + disk * inside_x
    y, x = corner[:, None] + pixels
    keep = (window > 0) & (y >= 0) & (x >= 0) & (y < frame.shape[0]) & (x < frame.shape[1])
    value = np.zeros(t.size)
    value[keep] = frame[y[keep], x[keep]]
    keep &= value < saturation
    if fit.good.size:
        keep[keep] = fit.good.reshape(frame.shape)[y[keep], x[keep]] > 0
    level, ground = known
    model_error, gradient, background, precision, _, inside_error = fit.priors[site]
    mu = level * t + ground
    weight = keep / (1.0 if first else gain * mu + read + model_error * level**2 + inside_error * (level * t) ** 2)
    design = np.array([np.ones(t.size), t * (pixels[0] - sy) / radius, t * (pixels[1] - sx) / radius, t, p, q]).T
    normal, right = design.T @ (weight[:, None] * design), design.T @ (weight * (value - mu))
    if normal[0, 0] <= 0 or normal[3, 3] <= 0:
        return None
    nuisances = [0, 3]
    if not first:
        normal[0, 0] += precision
        right[0] += precision * (background - ground)
        if level > 0 and gradient > 0:
            nuisances = [0, 1, 2, 3]
            normal[[1, 2], [1, 2]] += 1 / (gradient * level**2)
    own, cross = normal[np.ix_(nuisances, nuisances)], normal[np.ix_(nuisances, [4, 5])]
    if np.linalg.eigvalsh(own).min() <= 0:
        return None
    change = np.linalg.solve(own, right[nuisances])
    found = max(level + change[-1], 0), max(ground + change[0], 0)
    scale = 1 / max(gain * (0.5 * found[0] + found[1]) + read, 1e-6) if first else 1.0
    level = found[0] if first else level
    information = normal[4:, 4:] - cross.T @ np.linalg.solve(own, cross)
    return {
        "known": found,
        "information": information * level**2 * scale,
        "score": (right[4:] - cross.T @ change) * level * scale,
        "variance": np.linalg.inv(own)[-1, -1] / scale,
        "chi2": ((weight * (value - mu) ** 2).sum() - right[nuisances] @ change) * scale,
        "pixels": keep.sum() - 4,
    }


def lattice_system(fit, theta, start, disks, robust):
    """Matrix and right-hand side of a step of the lattice; `disks` maps sites to what `disk_system` found."""
    normal, right = fit.numbers[6] * np.eye(6), fit.numbers[6] * (start - theta)
    for site, disk in disks.items():
        e = np.kron([1, *fit.sites[site]], np.eye(2))
        share = robust[site] * np.linalg.inv(np.eye(2) + fit.priors[site, 4] * disk["information"])
        normal = normal + e.T @ share @ disk["information"] @ e
        right = right + e.T @ share @ disk["score"]
    return normal, right


def lattice_of(fit, frame, position, grain):
    """How much the disks of one lattice explain, and the row of a frame."""
    members = range(fit.first[grain], fit.first[grain + 1])
    theta = fit.lattices[grain].copy()
    theta[:2] += fit.drift @ divmod(position, fit.scan_width)
    start, known, far, normal, square = theta.copy(), dict.fromkeys(members, (0.0, 0.0)), 0, None, {}
    for step in range(2 * sum(fit.steps)):
        blurred = step < fit.steps[0] or (step < fit.steps[0] + 2 and far > 1)
        place = {k: theta[:2] + fit.sites[k] @ theta[2:].reshape(2, 2) for k in members}
        looked = {k: disk_system(fit, frame, place[k], k, known[k], blurred, step == 0) for k in members}
        for k in (k for k in members if looked[k]):
            known[k] = looked[k]["known"]
        disks = {k: disk for k, disk in looked.items() if disk and np.trace(disk["information"]) > 0}
        robust, square = dict.fromkeys(disks, 1.0), dict.fromkeys(disks, 0.0)
        normal, right = lattice_system(fit, theta, start, disks, robust)
        change = np.linalg.solve(normal, right)
        if not blurred:
            for k, disk in disks.items():
                a, moved = disk["information"], change[:2] + fit.sites[k] @ change[2:].reshape(2, 2)
                if np.linalg.det(a) > 1e-9 * a[0, 0] * a[1, 1]:
                    off = np.linalg.solve(a, disk["score"]) - moved
                    spread = np.linalg.inv(a) + fit.priors[k, 4] * np.eye(2)
                    square[k] = off @ np.linalg.solve(spread, off)
                    robust[k] = min(1, 3 / max(math.sqrt(square[k]), 1e-30))
            normal, right = lattice_system(fit, theta, start, disks, robust)
            change = np.linalg.solve(normal, right)
        far = max([np.hypot(*(change[:2] + fit.sites[k] @ change[2:].reshape(2, 2))) for k in members], default=0)
        theta += change * min(1, 0.5 * fit.numbers[3] / far if far > 0 else 1)
        if step + 1 >= sum(fit.steps) and far <= 0.1 * fit.numbers[5]:
            break
    squares = {k: known[k][0] ** 2 / disks[k]["variance"] for k in disks}
    found = sum(squares[k] > 9 and robust[k] > 0.5 for k in disks)
    row = np.full(14, np.nan)
    if far <= fit.numbers[5] and found >= fit.numbers[4]:
        number = 2 * sum(s > 0 for s in square.values())
        scatter = max(1, sum(square[k] * robust[k] for k in disks) / (number - 6)) if number > 8 else 1
        row[:6], row[6:10] = theta, lattice_sigmas(theta, np.linalg.inv(normal) * scatter, fit.axes)
    misfit = sum(disk["chi2"] for disk in disks.values()) / max(sum(disk["pixels"] for disk in disks.values()), 1)
    row[10:] = misfit, found, sum(known[k][0] for k in disks), grain
    return sum(squares.values()), row


def lattice_sigmas(theta, covariance, axes):
    """One sigma of exx, eyy, exy and rotation in degrees: what small changes of the vectors do, by differences."""

    def seen(vectors):
        return axes @ vectors.reshape(2, 2).T[::-1]

    def strain(vectors):
        gradient = np.linalg.inv(seen(vectors) @ np.linalg.inv(seen(theta[2:]))).T
        xx, xy, yx, yy = gradient.ravel()
        return np.array([xx, yy, (xy + yx) / 2, np.degrees(yx - xy) / 2])

    slopes = np.array([(strain(theta[2:] + d) - strain(theta[2:] - d)) / 2e-4 for d in 1e-4 * np.eye(4)])
    return np.sqrt(np.diag(slopes.T @ covariance[2:, 2:] @ slopes))


def lattice_fit(fit, frame, position):
    """The row of `gpuem.backends.lattice_fit.COLUMNS` of a frame: double precision, whole matrices."""
    return max((lattice_of(fit, frame, position, g) for g in range(len(fit.lattices))), key=lambda found: found[0])[1]
