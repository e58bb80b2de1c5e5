"""What a sample of frames teaches about a lattice fit: the disk's rim, every reflection's inside, and the noise.

The sample is fitted with what is known; then rim (radius, width) and insides (smooth modes per reflection, shrunk
towards flat by what the counts allow) are improved by one step of least squares over all its pixels, and so again.
Last, the spread of what was a nuisance becomes its prior.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Sample
from gpuem.analyses.lattice_model import Model
from gpuem.analyses.modes import number_of, order_of, zernike
from gpuem.analyses.probe import Disk, Probe
from gpuem.backends import Frames, cpu_lattice
from gpuem.backends.cpu_lattice import BACKGROUND, INFORMATION, INTENSITY, SLOPE
from gpuem.backends.lattice_fit import COARSE_PHASES, PHASES
from gpuem.codecs.compiled import compiled

# modes of a disk's inside, up to this order
ORDER = 4
# how much a disk's inside may vary, relative: the prior of every mode
SPREAD = 0.3
# steps in radius, edge and elongation for derivatives, and the largest change of them at once
STEPS, LONGEST = np.array([0.02, 0.02, 0.005, 0.005]), np.array([0.5, 0.3, 0.05, 0.05])
# what can't be seen stays as it is: inverse variances
OUTLINE_PRIOR = np.array([1e-3, 1.0, 0.05**-2.0, 0.05**-2.0])
LEAST_EDGE = {"ramp": 0.4, "pixel": 0.0}
# rim and insides are improved so often
ROUNDS = 3
# frames that are enough for rim and insides
FRAMES = 64


def untaught(model: Model) -> Model:
    """A model with flat disks, and with priors that fit most data."""
    count = len(model.sites)
    return replace(
        model, insides=np.ones((count, 1)), priors=np.tile([0.05**2, 0.2**2, 0.0, 0.0, 0.0, 0.0], (count, 1))
    )


def learn(model: Model, sample: Sample, *, rim: bool = True, insides: bool = True) -> Model:
    """Improve a model by a sample.

    Parameters
    ----------
    model : Model
        Where to begin; its `priors` and `insides` are replaced.
    sample : Sample
        Frames.
    rim, insides : bool
        Whether the rim (of a `Disk`) and the insides of disks are to be learned.

    Returns
    -------
    Model
        The model with the smaller misfit of the two kinds of rim, with the noise that was found.
    """
    count = len(model.sites)
    start = untaught(model)
    some = np.linspace(0, len(sample.frames) - 1, min(len(sample.frames), FRAMES)).round().astype(int)
    few = Sample(sample.frames[some], sample.positions[some])
    # all disks share their rim
    fewer = Sample(few.frames[::3], few.positions[::3])
    if rim and isinstance(model.probe, Disk):
        sharp = replace(model.probe, rim="pixel", edge=0.3 * max(model.probe.edge - 1.0, 0.0))
        kinds = [
            replace(start, probe=replace(model.probe, edge=max(model.probe.edge, 0.5))),
            replace(start, probe=sharp),
        ]
        with ThreadPoolExecutor(len(kinds)) as pool:
            tried = list(pool.map(lambda kind: _improved(kind, fewer, ROUNDS), kinds))
        start = min(tried, key=lambda item: item[1])[0]
    if insides:
        flat = np.zeros((count, number_of(ORDER)))
        flat[:, 0] = 1.0
        taught = _reproduced(_improved(replace(start, insides=flat), few, ROUNDS, rim=rim)[0], few)
        # where what is inside moves about, disks without structure may fit better than those of the sample
        start = min(start, taught, key=lambda item: _misfit(item, few))
    return noise_of(start, few)


def _reproduced(model: Model, sample: Sample) -> Model:
    """Of the insides of disks only as much as two halves of the sample agree upon.

    What moves inside a disk from position to position averages to something in any sample, but not to the same.
    """
    halves = [
        _improved(model, Sample(sample.frames[k::2], sample.positions[k::2]), 1, rim=False)[0].insides[:, 1:]
        for k in (0, 1)
    ]
    if len(sample.frames) < 4:
        return model
    common = (halves[0] * halves[1]).sum(axis=1)
    either = 0.5 * (halves[0] ** 2 + halves[1] ** 2).sum(axis=1)
    share = np.clip(common / np.maximum(either, 1e-12), 0.0, 1.0)
    insides = model.insides.copy()
    insides[:, 1:] *= share[:, None]
    return replace(model, insides=insides)


def _improved(model: Model, sample: Sample, rounds: int, *, rim: bool = True) -> tuple[Model, float]:
    """A few rounds of fitting the lattice and improving the disks; the model, and the misfit before the last one."""
    misfit = np.inf
    for _ in range(rounds):
        normal, right, _, misfit = _sums_of(model, sample)
        model = _step(model, normal, right, rim=rim)
    return model, misfit


def _sums_of(model: Model, sample: Sample, fitted: Any = None) -> tuple[Any, Any, Any, float]:
    """Fit the sample; normal equations of modes and rim per site, sums for the model error, and the misfit."""
    fit = model.fit()
    frames = frames_of(sample)
    out, noted = fitted or cpu_lattice.details(fit, frames, sample.positions)
    modes = model.insides.shape[1]
    count = len(model.sites)
    half = int(fit.pixels.max())
    # where the model error alone is wanted, nothing is improved
    images = _derivatives(model.probe, half) if fitted is None else model.probe.image(half)[None]
    grid = np.arange(-COARSE_PHASES * (half + 1), COARSE_PHASES * (half + 1) + 1) / COARSE_PHASES / model.rim
    # one pixel's modes lie together in memory, and so do the images
    basis = np.moveaxis(zernike(*np.meshgrid(grid, grid, indexing="ij"), order_of(modes)), 0, -1)
    disks = [np.ascontiguousarray(table, np.float32) for table in (np.moveaxis(images, 0, -1), basis)]
    normal, right = np.zeros((count, modes + len(STEPS), modes + len(STEPS))), np.zeros((count, modes + len(STEPS)))
    error = np.zeros((count, 4))
    if fitted is not None:
        normal, right = normal[:, :0], right[:, :0]
    noise = np.array([model.gain, model.read**2, model.saturation, model.probe.radius])
    _accumulate(
        (frames.pixels, frames.starts, frames.shape), out, noted, (model.sites, model.first),
        (*disks, model.insides, fit.pixels, fit.window, fit.good), noise, (normal, right, error),
    )  # fmt: skip
    if fitted is None:
        normal += np.tril(normal, -1).swapaxes(1, 2)
    return normal, right, error, _usual(out)


def _misfit(model: Model, sample: Sample) -> float:
    """Reduced chi^2 that is usual in a sample."""
    return _usual(cpu_lattice.details(model.fit(), frames_of(sample), sample.positions)[0])


def _usual(rows: NDArray[np.float64]) -> float:
    good = np.isfinite(rows[:, 0])
    return float(np.median(rows[good, 10])) if good.any() else np.inf


def _outline(disk: Disk) -> NDArray[np.float64]:
    """Radius, edge, and how much longer the disk is along x than along y, and along the diagonal (logarithms)."""
    longer, angle = np.log(disk.ratio), np.radians(2 * disk.angle)
    return np.array([disk.radius, disk.edge, longer * np.cos(angle), longer * np.sin(angle)])


def _outlined(disk: Disk, outline: NDArray[np.float64]) -> Disk:
    """A disk with another outline."""
    radius, edge, along, diagonal = outline
    ratio, angle = np.exp(np.hypot(along, diagonal)), np.degrees(np.arctan2(diagonal, along)) / 2
    return replace(disk, radius=radius, edge=max(edge, LEAST_EDGE[disk.rim]), ratio=float(ratio), angle=float(angle))


def _derivatives(probe: Probe, half: int) -> NDArray[np.float64]:
    """The probe's image, and how it changes with its outline."""
    images = [probe.image(half)]
    if not isinstance(probe, Disk):
        return np.array(images + [0 * images[0]] * len(STEPS))
    for step in np.diag(STEPS):
        more, less = (_outlined(probe, _outline(probe) + sign * step) for sign in (1, -1))
        apart = (_outline(more) - _outline(less)) @ step / (step @ step)
        images.append((more.image(half) - less.image(half)) / (apart * step.sum()))
    return np.array(images)


def _step(model: Model, normal: Any, right: Any, *, rim: bool) -> Model:
    """One step of least squares: modes per site, shrunk, and the rim they share."""
    modes = model.insides.shape[1]
    prior = np.full(modes, SPREAD**-2.0)
    # the mean intensity belongs to the fit of every frame
    prior[0] = 1e12
    flat = np.zeros(modes)
    flat[0] = 1.0
    local = normal[:, :modes, :modes] + np.diag(prior)
    score = right[:, :modes] - prior * (model.insides - flat)
    cross = normal[:, :modes, modes:]
    solved, own = np.linalg.solve(local, cross), np.linalg.solve(local, score[..., None])[..., 0]
    shared = (normal[:, modes:, modes:] - np.einsum("sji,sjk->sik", cross, solved)).sum(axis=0)
    pull = (right[:, modes:] - np.einsum("sji,sj->si", cross, own)).sum(axis=0)
    change, probe = np.zeros(len(STEPS)), model.probe
    if rim and isinstance(probe, Disk):
        change = np.linalg.solve(shared + np.diag(OUTLINE_PRIOR), pull)
        change = np.clip(change, -LONGEST, LONGEST)
        probe = _outlined(probe, _outline(probe) + change)
    coefficients = model.insides + own - solved @ change
    coefficients[:, 0] = 1.0
    return replace(model, probe=probe, insides=coefficients)


@functools.partial(compiled, fastmath={"reassoc", "nsz", "contract"})
def _accumulate(frames: Any, out: Any, noted: Any, model: Any, probe: Any, noise: Any, sums: Any) -> None:
    """Normal equations of a sample's residuals: modes of every disk, radius and edge; see `learn`."""
    pixels, starts, shape = frames
    sites, first = model
    images, basis, insides, places, window, good = probe
    normal, right, error = sums
    modes = insides.shape[1]
    middle, coarse = images.shape[1] // 2, basis.shape[1] // 2
    column = np.empty(modes + images.shape[2] - 1)
    for f in range(starts.size):
        if not np.isfinite(out[f, 0]):
            continue
        grain = int(out[f, 13])
        for s in range(first[grain], first[grain + 1]):
            level, ground = noted[f, s, INTENSITY], noted[f, s, BACKGROUND]
            if level <= 0 or noted[f, s, INFORMATION] <= 0:
                continue
            cy = out[f, 0] + sites[s, 0] * out[f, 2] + sites[s, 1] * out[f, 4]
            cx = out[f, 1] + sites[s, 0] * out[f, 3] + sites[s, 1] * out[f, 5]
            top, left = int(np.floor(cy)), int(np.floor(cx))
            for i in range(window.size):
                y, x = top + places[0, i], left + places[1, i]
                if y < 0 or x < 0 or y >= shape[0] or x >= shape[1] or window[i] == 0:
                    continue
                value = pixels[starts[f] + y * shape[1] + x]
                if value >= noise[2] or (good.size > 0 and good[y * shape[1] + x] == 0):
                    continue
                at_y, at_x = (y - cy) * PHASES + middle, (x - cx) * PHASES + middle
                if at_y < 0 or at_x < 0 or at_y >= 2 * middle or at_x >= 2 * middle:
                    continue
                m, n = int(at_y + 0.5), int(at_x + 0.5)
                down, across = (y - cy) * COARSE_PHASES + coarse, (x - cx) * COARSE_PHASES + coarse
                mode = basis[int(down + 0.5), int(across + 0.5)]
                image = images[m, n]
                inside = 0.0
                for c in range(modes):
                    inside += insides[s, c] * mode[c]
                disk = image[0]
                slope = 1 + (noted[f, s, SLOPE] * (y - cy) + noted[f, s, SLOPE + 1] * (x - cx)) / noise[3]
                mu = ground + level * disk * inside
                plain = noise[0] * max(mu, 0.0) + noise[1]
                w = 1 / (plain + (0.03 * level) ** 2)
                rest = value - mu
                for c in range(modes if right.shape[1] else 0):
                    column[c] = level * disk * mode[c]
                for c in range(1, image.size):
                    column[modes + c - 1] = level * inside * image[c]
                for c in range(right.shape[1]):
                    weighted = w * column[c]
                    right[s, c] += weighted * rest
                    for d in range(c + 1):
                        normal[s, c, d] += weighted * column[d]
                rest -= level * disk * inside * (slope - 1)
                if disk > 0.5:
                    error[s, 2] += rest * rest - plain
                    error[s, 3] += (level * disk * inside) ** 2
                else:
                    square = level * level
                    error[s, 0] += square * (rest * rest - plain) / (plain * plain)
                    error[s, 1] += square * square / (plain * plain)


def noise_of(model: Model, sample: Sample) -> Model:
    """The priors of a model: how backgrounds, gradients and places of disks spread beyond what counting explains."""
    frames = frames_of(sample)
    count = len(model.sites)
    loose = replace(model, priors=np.tile([0.01**2, 0.5**2, 0.0, 0.0, 0.0, 0.0], (count, 1)))
    out, noted = cpu_lattice.details(loose.fit(), frames, sample.positions)
    error = _sums_of(loose, sample, fitted=(out, noted))[2]
    priors = np.zeros((count, 6))
    fitted = np.isfinite(out[:, 0])
    for site in range(count):
        grain = int(np.searchsorted(model.first, site, "right")) - 1
        rows = noted[fitted & (out[:, 13] == grain), site]
        rows = rows[rows[:, cpu_lattice.INFORMATION] > 0]
        priors[site] = _spread(rows)
    priors[:, 0] = np.clip(error[:, 0] / np.maximum(error[:, 1], 1e-30), 0.002**2, 0.3**2)
    priors[:, 4] = _offsets(noted[fitted])
    priors[:, 5] = np.clip(error[:, 2] / np.maximum(error[:, 3], 1e-30), 0.0, 1.0)
    return replace(model, priors=priors)


def _spread(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gradient variance, background and its precision, from what was noted of one disk over the sample."""
    if len(rows) < 4:
        return np.array([0.0, 0.1**2, 0.0, 0.0, 0.0, 0.0])
    slopes, variance = rows[:, 8:10], rows[:, 10:11]
    usable = np.isfinite(variance[:, 0])
    gradient = 0.02**2
    if usable.any():
        weight = 1 / (variance[usable] + 0.02) ** 2
        excess = (weight * (np.minimum(slopes[usable] ** 2, 9.0) - variance[usable])).sum() / (2 * weight.sum())
        gradient = float(np.clip(excess, 0.01**2, 1.0))
    ground, ground_variance = rows[:, 1], np.where(np.isfinite(rows[:, 12]), rows[:, 12], np.nanmax(rows[:, 12]))
    mean = float(ground.mean())
    excess = max(float(ground.var()) - float(ground_variance.mean()), 0.0) + (0.05 * mean) ** 2 + 1e-8
    return np.array([0.0, gradient, mean, 1 / excess, 0.0, 0.0])


def _offsets(noted: NDArray[np.float64]) -> float:
    """Variance of a disk's place off its lattice, in px^2, beyond what counting explains."""
    a, b, c = noted[..., 2], noted[..., 3], noted[..., 4]
    area = a * c - b * b
    known = area > 1e-9 * np.maximum(a * c, 1e-30)
    if not known.any():
        return 0.0
    variance = (0.5 * (a + c)[known] / area[known]).clip(1e-12)
    excess = (np.minimum(noted[..., 13][known], 25.0) / 2 - 1) * variance
    weight = 1 / (variance + 1e-4) ** 2
    return float(np.clip((weight * excess).sum() / weight.sum(), 0.0, 0.25))


def frames_of(sample: Sample) -> Frames:
    """A sample's frames as the backend takes them."""
    count, height, width = sample.frames.shape
    starts = np.arange(count, dtype=np.int64) * (height * width)
    return Frames(np.ascontiguousarray(sample.frames).reshape(-1), starts, (height, width))
