"""Strain by gpuem, libertem-blobfinder and py4DSTEM on the same patterns, against the physical limit, in one run.

    python bench/strain.py --blobfinder PYTHON --py4dstem PYTHON --sim FOLDER --out bench/records/strain.json

Each peer lives in an environment of its own. Set K (`gpuem.synthetic`) lies in a file in the page cache. Results are
compared with truth before anything is timed: a run that finds no lattice, or errs by far more than its peers, is an
error, not a number. What wasn't measured is recorded as null, never as met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from cpu import best, machine

import gpuem
from gpuem import selftest, synthetic
from gpuem.analyses import reference_lattice

HERE = Path(__file__).parent
DOSES = (1e3, 1e4, 1e5, 1e6)
UPSAMPLED = ",".join(f"fast*20/{name}" for name in ("RadialGradient", "Circular", "BackgroundSubtraction"))
SIM_SETTINGS = ",".join(
    f"{way}/{name}"
    for way in ("fast", "sparse", "fullframe", "fast*20")
    for name in ("RadialGradient", "Circular", "BackgroundSubtraction", "RadialGradientBackgroundSubtraction")
)
PHASES = 16  # bins of a pixel
LEAST_VALID = 0.99
MOST = 10  # times the bound: what errs more measures something else than it should
SIM = {
    "41 A": "strainA_Au001_16x16x128x128_poisson1e6_u16.npy",
    "8 A": "strainA_Au001_thin8A_16x16x128x128_poisson1e6_u16.npy",
}
SIM_LATTICE = (63.75, 63.75, 0.0, 19.31, 19.31, 0.0)
SIM_RADIUS, SIM_MOST = 6.0, {"41 A": 2.1e-4, "8 A": 2.0e-4}
REFERENCE = (slice(0, 4), slice(0, 4))  # the unstrained block of set A


# ---- what is compared


def named(results, name="strain"):
    """Maps of one analysis as flat arrays; vectors as (positions, 2)."""
    flat = {key.partition("/")[2]: results[key].data for key in results if key.startswith(f"{name}/")}
    return {key: np.reshape(v, (-1, 2) if key in ("a", "b", "center") else -1) for key, v in flat.items()}


def vectors_of(rows):
    """(n, 2) of vectors, None where there is none."""
    return np.array([[math.nan] * 2 if v is None else v for v in rows], float)


def lattice_errors(a, b, theta, lattice):
    """(n, 2, 2) of G G0^-1 for vectors (n, 2) as (y, x) px; NaN where there are none."""
    found = np.stack([vectors_of(a), vectors_of(b)], axis=1)
    wrong = np.moveaxis((found - theta[:, 2:].reshape(-1, 2, 2))[:, :, ::-1], 1, 2)
    return wrong @ np.linalg.inv(lattice)


def judged(one, theta, pattern, bound):
    """A peer's vectors against the truth."""
    errors = lattice_errors(one["a"], one["b"], theta, pattern.lattice)
    valid = float(np.isfinite(errors).all(axis=(1, 2)).mean())
    return {"valid": valid, "error": rms(errors), "ratio": rms(errors) / bound}


def rms(values):
    values = np.asarray(values, float)
    return float(np.sqrt(np.nanmean(values**2))) if np.isfinite(values).any() else math.nan


def same_basis(maps, pattern):
    """Vectors of gpuem in the basis of the truth."""
    found = np.stack([maps["a"], maps["b"]], axis=1).astype(float)
    a, b = np.nanmedian(found, axis=0).tolist()
    a0, b0 = pattern.lattice.T[:, ::-1].tolist()
    found = reference_lattice.same_basis(tuple(a), tuple(b), tuple(a0), tuple(b0)) @ found
    found[~maps["valid"].astype(bool)] = math.nan
    return found[:, 0], found[:, 1]


def measured(ds, theta, pattern):
    """Strain by gpuem with default options, checked: fraction valid, RMS error, pulls."""
    maps = named(gpuem.run(ds, [gpuem.Strain()], device="cpu"))
    return dict(zip(("valid", "error", "pull"), selftest.judge(maps, theta, pattern), strict=True))


def ask(python, script, *arguments):
    """What a peer prints, from its own environment."""
    command = [python, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("JSON")]
    if not lines:
        raise SystemExit(f"the peer failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[0])


def save(path, frames):
    """Write frames and leave them in the page cache."""
    np.save(path, frames)
    np.load(path, mmap_mode="r").reshape(-1)[:: 4096 // frames.itemsize].sum()
    return path


# ---- sections


def set_k(record, folder, given):
    """Speed and accuracy on the same file, peers in between two halves of our own runs."""
    pattern = synthetic.Pattern()
    frames, truth = synthetic.generate(pattern, (given.rows, 128), seed=1)
    theta, bound = truth["theta"].reshape(-1, 6), truth["bound"]
    path, count = save(folder / "set_k.npy", frames), len(theta)
    found = record["set K"] = {
        "patterns": count,
        "electrons": float(frames.sum(dtype=np.int64)) / count,
        "bound": bound,
    }
    ds = None
    if hasattr(gpuem, "Strain"):
        ds = gpuem.open(path)
        ours = measured(ds, theta, pattern)
        if not (ours["valid"] == 1 and ours["error"] < MOST * bound):
            raise SystemExit(f"set K: valid {ours['valid']:.3f}, error {ours['error']:.2e}, bound {bound:.2e}")
        seconds = best(lambda: gpuem.run(ds, [gpuem.Strain()], device="cpu"), given.repeats)
        found["gpuem"] = {**ours, "ratio": ours["error"] / bound, "patterns_per_s": count / seconds}
    # what is slow gets a part, evenly spread
    part = np.unique(np.linspace(0, count - 1, given.subset).astype(int))
    subset = save(folder / "subset.npy", frames.reshape(-1, *pattern.frame)[part])
    if given.blobfinder:
        found["blobfinder"] = blobfinder(given, path, theta, pattern, bound)
        found["blobfinder"]["upsampled"] = upsampled(given, subset, theta[part], pattern, bound)
    if given.py4dstem:
        found["py4DSTEM"] = py4dstem(given, subset, theta[part], pattern, bound)
    if ds is not None:
        again = best(lambda: gpuem.run(ds, [gpuem.Strain()], device="cpu"), given.repeats)
        found["gpuem"]["patterns_per_s"] = count / min(again, seconds)
        ratio(found)
        show("gpuem", found["gpuem"])
    path.unlink()


def ratio(found):
    if "blobfinder" in found:
        fastest = found["blobfinder"]["fastest"]["patterns_per_s"]
        found["gpuem"]["times_blobfinder"] = found["gpuem"]["patterns_per_s"] / fastest


def ask_blobfinder(given, path, pattern, repeats, *settings_and_executors):
    """From the undeformed lattice, with the true radius."""
    asked = (path, *pattern.theta.tolist(), pattern.radius, pattern.order, repeats, *settings_and_executors)
    return ask(given.blobfinder, "peer_blobfinder.py", *asked)


def blobfinder(given, path, theta, pattern, bound):
    """All settings and executors; the fastest, and the most exact."""
    told = ask_blobfinder(given, path, pattern, given.repeats, given.settings)
    rows = []
    for setting, one in told["settings"].items():
        executor, rate = max(one["patterns_per_s"].items(), key=lambda item: item[1])
        row = {"setting": setting, "executor": executor, "patterns_per_s": rate, "all": one["patterns_per_s"]}
        rows.append({**row, "disks": one["disks"], **judged(one, theta, pattern, bound)})
        show(f"blobfinder {setting}", rows[-1])
    # what finds no lattice is fast in vain
    sane = [row for row in rows if row["valid"] > 0.99 and row["error"] < 1e-2]
    if not sane:
        raise SystemExit("blobfinder finds no lattice: the comparison is wrong")
    chosen = {
        "fastest": max(sane, key=lambda row: row["patterns_per_s"]),
        "most_exact": min(sane, key=lambda row: row["error"]),
    }
    return {"version": told["version"], "libertem": told["libertem"], "settings": rows, **chosen}


def upsampled(given, path, theta, pattern, bound):
    """Blobfinder with peaks upsampled by DFT: slow, so of a subset; its own way to be more exact."""
    told, found = ask_blobfinder(given, path, pattern, 0, UPSAMPLED, "inline"), []
    for setting, one in told["settings"].items():
        rate = one["patterns_per_s"]["inline"]
        found.append({"setting": setting, "patterns_per_s": rate, **judged(one, theta, pattern, bound)})
        show(f"blobfinder {setting}", found[-1])
    return found


def py4dstem(given, path, theta, pattern, bound):
    """Both of its ways to find a peak between pixels, in one process, which is all it uses."""
    told = ask(given.py4dstem, "peer_py4dstem.py", path, *pattern.theta.tolist(), pattern.radius, pattern.edge)
    found = {"version": told.pop("version"), "patterns": len(theta), "processes": 1}
    for mode, one in told.items():
        found[mode] = {"patterns_per_s": one["patterns_per_s"], **judged(one, theta, pattern, bound)}
        show(f"py4DSTEM {mode}", found[mode])
    return found


def doses(record, folder, given):
    """Error over bound and pulls from few electrons to many."""
    setting = record.get("set K", {}).get("blobfinder", {}).get("most_exact", {}).get("setting", "sparse/Circular")
    record["doses"] = []
    for dose in DOSES:
        pattern = synthetic.Pattern(dose=dose)
        frames, truth = synthetic.generate(pattern, (8, 64), seed=2)
        theta, bound = truth["theta"].reshape(-1, 6), truth["bound"]
        row, path = {"dose": dose, "bound": bound}, save(folder / "dose.npy", frames)
        if hasattr(gpuem, "Strain"):
            try:
                row.update(measured(gpuem.open(path), theta, pattern))
                row["ratio"] = row["error"] / bound
            except gpuem.GpuemError as wrong:
                row["failed"] = str(wrong)
        if given.blobfinder:
            one = ask_blobfinder(given, path, pattern, 0, setting, "inline")["settings"][setting]
            row["blobfinder"] = {"setting": setting, **judged(one, theta, pattern, bound)}
        record["doses"].append(row)
        show(f"{dose:.0e} electrons", row)
        path.unlink()


def swept(folder, given, kind):
    """Patterns with disks at one sub-pixel phase after the other: path, phases, true lattices, bounds, pattern."""
    phase = (np.arange(PHASES) + 0.5) / PHASES
    parts, thetas, bounds = [], [], []
    for k, x in enumerate(phase.tolist()):
        y = float(phase[(7 * k) % PHASES])
        pattern = synthetic.Pattern(center=(127.0 + y, 128.0 + x) if kind == "centre" else (127.0, 128.0))
        stretch = np.eye(2) if kind == "centre" else np.diag([38 / (37.5 + x), 38 / (37.5 + y)])
        frames, truth = synthetic.generate(pattern, (given.each,), 3 + k, gradient=np.tile(stretch, (given.each, 1, 1)))
        parts.append(frames)
        thetas.append(truth["theta"])
        bounds.append(truth["bound"])
    return save(folder / "phase.npy", np.stack(parts)), phase.tolist(), np.concatenate(thetas), bounds, pattern


def locking(record, folder, given):
    """Error against the sub-pixel phase of the disks: of all together (centre), or h and k times it (vectors)."""
    setting = record.get("set K", {}).get("blobfinder", {}).get("fastest", {}).get("setting", "fast/RadialGradient")
    record["pixel locking"] = {}
    for kind in ("centre", "vectors"):
        path, phase, theta, bounds, pattern = swept(folder, given, kind)
        row = record["pixel locking"][kind] = {"phase": phase, "bound": bounds}
        if hasattr(gpuem, "Strain"):
            maps = named(gpuem.run(gpuem.open(path), [gpuem.Strain()], device="cpu"))
            valid = float(maps["valid"].astype(bool).mean())
            row["gpuem"] = {"valid": valid} | binned(*same_basis(maps, pattern), theta, pattern, bounds)
            show(f"phase, {kind}: gpuem", row["gpuem"])
        if given.blobfinder:
            one = ask_blobfinder(given, path, pattern, 0, setting, "inline")["settings"][setting]
            row["blobfinder"] = {"setting": setting, **binned(one["a"], one["b"], theta, pattern, bounds)}
            show(f"phase, {kind}: blobfinder", row["blobfinder"])
        path.unlink()


def binned(a, b, theta, pattern, bounds):
    """Error over bound for every phase; how far the worst is above the mean; the largest systematic part of xx.

    `a` and `b` are (n, 2) vectors or lists with None, in the order of the phases.
    """
    errors = lattice_errors(a, b, theta, pattern.lattice).reshape(len(bounds), -1, 2, 2)
    ratios = [rms(part) / bound for part, bound in zip(errors, bounds, strict=True)]
    bias = float(np.max(np.abs(np.nanmean(errors[..., 0, 0], axis=1)) / bounds))
    flat = max(ratios) / float(np.mean(ratios)) - 1
    return {"ratio": ratios, "mean_ratio": float(np.mean(ratios)), "flat_to": flat, "bias_over_bound": bias}


def set_a(record, folder, given):
    """Multislice gold: RMS of exx, eyy, exy relative to the unstrained block, with default parameters."""
    truth = np.load(given.sim / "strainA_Au001_F_true.npy").reshape(-1, 2, 2)
    true = stretch_of(truth)
    block = np.zeros((16, 16), bool)
    block[REFERENCE] = True
    record["set A"] = {}
    for label, name in SIM.items():
        row = record["set A"][label] = {}
        if hasattr(gpuem, "Strain"):
            maps = named(gpuem.run(gpuem.open(given.sim / name), [gpuem.Strain(reference=block)], device="cpu"))
            found = np.stack([maps[key] for key in ("exx", "eyy", "exy")], axis=1)
            row["gpuem"] = {"valid": float(maps["valid"].astype(bool).mean()), "error": rms(found - true)}
        if given.blobfinder:
            asked = (given.sim / name, *SIM_LATTICE, SIM_RADIUS, 2, 0, SIM_SETTINGS, "inline")
            told = ask(given.blobfinder, "peer_blobfinder.py", *asked)
            errors = {key: rms(peer_strain(one, block.ravel()) - true) for key, one in told["settings"].items()}
            least = min(errors, key=errors.get)
            row["blobfinder"] = {"best": least, "error": errors[least], "all": errors}
        show(f"set A, {label}", row)


def sigma(record, folder, given):
    """Pulls, error over the sigma reported, of multislice gold thinned to lower doses and of synthetic patterns."""
    truth = np.load(given.sim / "strainA_Au001_F_true.npy").reshape(-1, 2, 2)
    true, blocks = stretch_of(truth), np.arange(256).reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
    record["sigma"] = []
    for label, name in SIM.items():
        for dose in DOSES[1:]:
            full = np.load(given.sim / name)
            # a part of Poisson counts, taken at random, is Poisson
            frames = np.random.default_rng(0).binomial(full, dose / 1e6).astype(full.dtype)
            maps = named(gpuem.run(frames, [gpuem.Strain()], device="cpu"))
            found, told = (
                np.stack([maps[key + end] for key in ("exx", "eyy", "exy")], axis=1) for end in ("", "_sigma")
            )
            error = found - true
            pulls = (error - np.nanmedian(error, axis=0)) / told
            inside = (found[blocks] - found[blocks].mean(axis=1, keepdims=True)) / told[blocks] * math.sqrt(16 / 15)
            row = {"patterns": f"set A, {label}", "dose": dose, "valid": float(maps["valid"].astype(bool).mean())}
            row |= {"pull": rms(pulls), "inside_blocks": rms(inside), "below_2": float((np.abs(pulls) < 2).mean())}
            record["sigma"].append(row)
            show(f"sigma: {row['patterns']}, {dose:.0e} electrons", row)
    selftest.strain(DOSES[1:], scan=(4, 32), device="cpu", progress=lambda row: sigma_row(record, row))


def sigma_row(record, row):
    """Note the pulls of one kind of synthetic patterns."""
    record["sigma"].append({"patterns": row.case, "dose": row.dose, "valid": row.valid, "pull": row.pull})
    show(f"sigma: {row.case}, {row.dose:.0e} electrons", record["sigma"][-1])


def stretch_of(f):
    """exx, eyy, exy of F = R U, (n, 3)."""
    values, vectors = np.linalg.eigh(np.swapaxes(f, 1, 2) @ f)
    u = (vectors * np.sqrt(values)[:, None, :]) @ np.swapaxes(vectors, 1, 2) - np.eye(2)
    return np.stack([u[:, 0, 0], u[:, 1, 1], u[:, 0, 1]], axis=1)


def peer_strain(one, block):
    """Strain from a peer's vectors, relative to the median of the unstrained block; NaN where there are none."""
    g = np.stack([vectors_of(one[key])[:, ::-1] for key in "ab"], axis=2)
    reference = np.nanmedian(g[block], axis=0)
    f = np.full(g.shape, math.nan)
    good = np.isfinite(g).all(axis=(1, 2))
    f[good] = np.swapaxes(reference @ np.linalg.inv(g[good]), 1, 2)
    found = np.full((len(g), 3), math.nan)
    found[good] = stretch_of(f[good])
    return found


# ---- what was promised


def targets(record):
    """Every number that was promised, what was found, and whether it is met; null: not measured."""
    k = record.get("set K", {}).get("gpuem", {})
    rows = [
        ("error over bound, set K", k, "ratio", 0, 1.2),
        ("deviation of the pulls, set K", k, "pull", *selftest.PULLS),
        ("times blobfinder's fastest", k, "times_blobfinder", 5.0, math.inf),
    ]
    for row in record.get("doses", [{"dose": dose} for dose in DOSES]):
        rows.append((f"error over bound, {row['dose']:.0e} electrons", row, "ratio", 0, 1.2))
        rows.append((f"deviation of the pulls, {row['dose']:.0e} electrons", row, "pull", *selftest.PULLS))
    for kind in ("centre", "vectors"):
        flat = record.get("pixel locking", {}).get(kind, {}).get("gpuem", {})
        rows.append((f"pixel locking, {kind}: worst phase above the mean", flat, "flat_to", 0, 0.2))
    for label, most in SIM_MOST.items():
        row = record.get("set A", {}).get(label, {}).get("gpuem", {})
        rows.append((f"set A, {label}", row, "error", 0, most))
    found = []
    for what, row, key, low, high in rows:
        value = row.get(key)
        met = None if value is None else bool(low <= value <= high)
        # what gave up, or left positions out, hasn't met anything
        if "failed" in row or (met and row.get("valid", 1) < LEAST_VALID):
            met = False
        found.append({"what": what, "from": low, "to": None if high == math.inf else high, "found": value, "met": met})
    return found


def plain(value):
    """What JSON can hold: null for what is no number."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(label, row):
    told = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if not isinstance(v, list)}
    print(f"{label:45} " + ", ".join(f"{k} {v}" for k, v in told.items() if k not in ("setting", "all")), flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blobfinder", help="python of an environment with libertem-blobfinder 0.6.1")
    parser.add_argument("--settings", default="all", help="of blobfinder, such as fast/Circular,sparse/Circular")
    parser.add_argument("--py4dstem", help="python of an environment with py4DSTEM")
    parser.add_argument("--sim", type=Path, help="folder with set A, strainA_Au001*")
    parser.add_argument("--rows", type=int, default=16, help="of 128 patterns each, of the file that is timed")
    parser.add_argument("--subset", type=int, default=64, help="patterns for py4DSTEM and for upsampled peaks")
    parser.add_argument("--each", type=int, default=128, help="patterns for each sub-pixel phase")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["k", "doses", "locking", "a", "sigma"], action="append")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    chosen = given.only or ["k", "doses", "locking", "a", "sigma"]
    record = {
        "machine": {**machine(), "load_before": os.getloadavg()[0]},
        "arguments": {"rows": given.rows, "repeats": given.repeats},
    }
    if not hasattr(gpuem, "Strain"):
        print("gpuem.Strain isn't there: peers only")
    with tempfile.TemporaryDirectory() as folder:
        for name, section in (("k", set_k), ("doses", doses), ("locking", locking), ("a", set_a), ("sigma", sigma)):
            if name in chosen and (name not in ("a", "sigma") or given.sim):
                section(record, Path(folder), given)
    record["machine"]["load_after"] = os.getloadavg()[0]
    record["targets"] = targets(record)
    for row in record["targets"]:
        print(f"{row['what']:55} {row['from']} to {row['to']}: {row['found']}, met: {row['met']}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(plain(record), indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
