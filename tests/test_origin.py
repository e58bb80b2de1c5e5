"""Which site of a lattice is the direct beam, on patterns that mislead."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from crystal import run

from gpuem.analyses.lattice_origin import SiteCounts, rank_origins

SQUARE, OBLIQUE, HEXAGONAL = ((0, 24.9), (24.3, 0)), ((-0.24, 24.91), (24.34, -0.24)), ((0, 26), (22.517, 13))
CENTER = (79.2, 81.1)


def counts(intensity, *, lattice=SQUARE, center=CENTER, shape=(160, 160), margin=2.0, hidden=None, seed=0, noise=0.01):
    """What is measured of all sites of a lattice: `intensity(h, k)`; NaN where `hidden(h, k)`."""
    basis, rng = np.array(lattice, float), np.random.default_rng(seed)
    hk = np.stack(np.meshgrid(*[np.arange(-9, 10)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    places = center + hk @ basis
    inside = np.all((places >= margin) & (places <= np.array(shape) - 1 - margin), axis=1)
    # numbered from some other site
    hk, places = hk[inside], places[inside]
    value = np.array([intensity(h, k) for h, k in hk.tolist()], float)
    sigma = noise * np.sqrt(np.maximum(value, 0.3))
    value += sigma * rng.normal(size=value.size)
    masked = np.array([bool(hidden and hidden(h, k)) for h, k in hk.tolist()])
    value[masked] = np.nan
    return SiteCounts(hk - hk[0], places, value, sigma, value + 0.3, np.where(masked, 0.0, 1.0), masked)


def q(h, k):
    return h * h + k * k


def falling(decay, direct=1.0):
    return lambda h, k: 300 / (1 + q(h, k) / decay) * (direct if h == k == 0 else 1)


def random_factors(seed, direct=3.0, tilt=(0.0, 0.0)):
    """Intensities of Friedel pairs alike, all others independent; along a tilt they rise."""
    rng, pairs = np.random.default_rng(seed), collections.defaultdict(lambda: np.exp(rng.normal()))

    def of(h, k):
        own = direct if h == k == 0 else pairs[max((h, k), (-h, -k))]
        return 200 * np.exp(-q(h, k) / 6 + tilt[0] * h + tilt[1] * k) * own

    return of


def laue(center, width, direct=2.0):
    y, x = center
    return lambda h, k: 300 * np.exp(-(((h - y) ** 2 + (k - x) ** 2) / (2 * width**2))) * (direct if h == k == 0 else 1)


def ring(h, k):
    """The Laue circle of a tilted crystal goes through the direct beam."""
    return 600 if h == k == 0 else 200 * np.exp(-((np.hypot(h - 2, k) - 2) ** 2) / 0.5)


PATTERNS = {
    "falling fast": ({}, falling(1)),
    "falling slowly, oblique": ({"lattice": OBLIQUE}, falling(3)),
    "tilted": ({}, laue((0.6, 0.2), 1.5)),
    "tilted, hexagonal": ({"lattice": HEXAGONAL}, laue((0.6, 0.2), 1.5)),
    "tilted, a row missing": ({"margin": 7}, laue((0.6, 0.2), 1.5)),
    "Laue circle": ({}, ring),
    "direct beam three times weaker": ({}, falling(3, 1 / 3)),
    "direct beam weak, random structure factors": ({}, random_factors(1, 1 / 3)),
    "tilted, random structure factors": ({}, random_factors(2, 1 / 2, (0.4, -0.3))),
    "a ring is missing": (
        {"lattice": HEXAGONAL},
        lambda h, k: 300 / (1 + (q(h, k) + h * k) / 3) * (q(h, k) + h * k != 3),
    ),
    "a brighter disk": ({}, lambda h, k: falling(3)(h, k) * (4 if (h, k) == (2, 1) else 1)),
    "only near the direct beam": ({}, lambda h, k: 100.0 * (max(abs(h), abs(k)) <= 2)),
    "half of the disks outside": ({"center": (30.0, 84.0)}, falling(3)),
    "in a corner": ({"center": (35.0, 28.5), "lattice": OBLIQUE}, falling(2)),
    "a long detector": ({"center": (40.0, 140.0), "shape": (80, 256)}, falling(3)),
    "behind a mask": ({"hidden": lambda h, k: k == 0 and h >= 0}, random_factors(3)),
    "behind a mask, smooth": ({"hidden": lambda h, k: k == 0 and h >= 0}, falling(3)),
    "half of the detector shadowed": ({}, lambda h, k: falling(3)(h, k) * (h >= 0)),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_direct_beam_of_patterns_that_mislead(name, seed):
    options, intensity = PATTERNS[name]
    found = counts(intensity, seed=seed, **options)
    ranked = rank_origins(found, options.get("shape", (160, 160)))
    assert ranked[0].place == pytest.approx(options.get("center", CENTER), abs=0.1)
    assert sum(one.confidence for one in ranked) == pytest.approx(1)
    assert ranked[0].runner[2] == ranked[1].confidence
    assert ranked[1].runner[2] == ranked[0].confidence


def test_what_cannot_be_told_is_not_told_as_sure():
    # the same disk everywhere
    ranked = rank_origins(counts(lambda h, k: 100.0), (160, 160))
    assert ranked[0].confidence < 0.5
    # without any disk
    ranked = rank_origins(counts(lambda h, k: 0.0), (160, 160))
    assert ranked[0].confidence < 0.5
    # symmetric structure factors tell it at once
    assert rank_origins(counts(random_factors(0)), (160, 160))[0].confidence > 0.95


def test_a_hidden_direct_beam_is_told():
    ranked = rank_origins(counts(falling(3), hidden=lambda h, k: h == k == 0), (160, 160))
    assert ranked[0].state == "masked"
    assert "beam stop?" in ranked[0].doubt()


def test_other_grains_share_the_direct_beam():
    alike = counts(lambda h, k: 100.0)
    turned = np.array(SQUARE) @ np.array([[0.94, 0.342], [-0.342, 0.94]])
    center = np.array(CENTER) + turned[1]
    ranked = rank_origins(alike, (160, 160), [(center, turned)])
    assert ranked[0].place == pytest.approx(CENTER, abs=0.1)
    assert ranked[0].confidence > rank_origins(alike, (160, 160))[0].confidence + 0.3


def frames(lattice, intensity, margin):
    y, x = np.mgrid[:160, :160]
    mean = np.full((160, 160), 0.3)
    for h in range(-5, 6):
        for k in range(-5, 6):
            place = CENTER + np.array([h, k]) @ np.array(lattice, float)
            if margin < place.min() and place.max() < 160 - margin:
                mean += intensity(h, k) * np.clip(5.5 - np.hypot(y - place[0], x - place[1]), 0, 1)
    return np.random.default_rng(0).poisson(mean, (4, 4, 160, 160)).astype(np.uint16)


@pytest.mark.parametrize(
    ("lattice", "intensity", "margin"),
    [(SQUARE, falling(1), 7), (SQUARE, falling(3), 7), (OBLIQUE, laue((0.6, 0.2), 1.5), -10)],
    ids=["shadowed, refused", "shadowed, a vector off", "tilted, a vector off"],
)
def test_the_centre_of_a_measurement_is_the_direct_beam(lattice, intensity, margin):
    results = run(frames(lattice, intensity, margin), threads=1)
    assert np.median(results["strain/center"].data.reshape(-1, 2), axis=0) == pytest.approx(CENTER, abs=0.1)
    assert np.abs(results["strain/exx"].data).max() < 2e-3
    attributes = results["strain/exx"].attributes
    assert attributes["center_px"] == pytest.approx(CENTER, abs=0.1)
    assert attributes["center_from"] == "sample"
    assert attributes["center_confidence"] > 5 * attributes["center_second_confidence"]
    assert "Friedel pairs" in attributes["found"][0]
