"""Strain of a crystal from its diffraction disks: what may be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, InstanceOf, model_validator
from pydantic.json_schema import SkipJsonSchema

from gpuem.analyses import Sample, View
from gpuem.analyses.deformation import Measure
from gpuem.analyses.model import Model, Name
from gpuem.analyses.strain_maps import StrainFit

Pair = tuple[float, float]
Place = Annotated[
    Pair | None,
    # what is found without being asked for, said as for the other analyses
    BeforeValidator(lambda v: None if isinstance(v, str) and v == "auto" else v, Pair | Literal["auto"] | None),
]
Region = tuple[int, int] | tuple[int, int, int, int]
Image = Path | SkipJsonSchema[InstanceOf[np.ndarray[Any, Any]]]


class Strain(Model):
    """Strain and rotation of the crystal at every scan position, each with its error.

    Without parameters everything is found in a sample of frames: the direct beam, radius and rim of the disks, the
    lattice, the reflections that are there, what their insides look like, the noise. Then every frame's lattice is
    fitted to all pixels of all disks at once. `gpuem check` shows what was found before anything is computed.

    Maps of scan shape: ``exx`` (x along columns), ``eyy``, ``exy``, ``rotation`` (degrees, positive from x towards y)
    and ``exx_sigma`` ... ``rotation_sigma``, one standard deviation each; ``a``, ``b``, ``center`` with a further axis
    (y, x) in px; ``chi2`` (reduced; 1 where the model explains the pixels), ``disks`` (how many were found),
    ``counts`` (of all disks, per pixel of a disk), ``grain`` where there are several lattices, and ``valid``. What is
    not valid (no crystal, too few disks, too uncertain) is NaN.

    With r = F r0 and G = [a b] in (x, y), F = (G G0^-1)^-T exactly; ``measure`` says what is told of it.

    Parameters
    ----------
    name : str
        Name of the maps: ``name/exx`` and so on.
    center, a, b : tuple of float
        Direct beam and lattice vectors (y, x) in px; found in the data by default (``center = "auto"`` says so too).
        A centre alone is kept. What is given is compared with what the sample shows: any basis of the lattice in the
        data is taken, and any whose sites are a part of its disks or the other way round; another lattice is refused
        where it explains less than half of the disks' brightness that the found one does (in the tenth of the sampled
        frames where it does best), and warned of below 80 %. A centre farther than a quarter of the shortest vector
        from every disk is refused, one on another disk than the data's direct beam is warned of. The attributes
        ``center_px``, ``center_confidence``, ``center_second_px`` and ``center_second_confidence`` of the maps tell
        which disk was taken, how sure that is (strain hardly depends on it), and the next likely one.
    lattices : tuple of pairs of vectors
        Further lattices ((a_y, a_x), (b_y, b_x)): grains. The one that explains most is taken, see ``grain``.
    radius, edge : float
        Of the disks, in px; found by default. With `edge` both are taken as they are.
    ellipticity : (ratio, angle)
        Of an elliptical probe: half axis along `angle` (degrees from x towards y) over half axis across.
    probe : path or array
        An image of the probe (vacuum), .npy or .tif: any shape, patterned (bullseye) ones too.
    learn : {"reflections", "disk", "measured", "nothing"}
        What is learned from the sample: radius and rim, and every reflection's inside; only radius and rim; the whole
        probe, as the mean of all disks (for patterned probes without a vacuum image); nothing.
    registration : {"lattice", "guided", "correlation", "blobfinder"}
        The joint fit; correlation near the expected disks; correlation of whole frames, its peaks matched to the
        lattice; or as libertem-blobfinder does (logarithm, radial gradient, elevations as weights). The latter three
        fit the lattice to the places of the disks.
    power : float
        Of the correlation of whole frames: 1 cross, 0 phase, between hybrid.
    reference : "median", region, path, array, or pair of vectors
        The unstrained lattice: median over the scan; over a region ``(y0, y1, x0, x1)`` with ends excluded or a
        boolean mask of scan shape (.npy); that of another result (.zarr); or vectors ((a_y, a_x), (b_y, b_x)).
    reference_frame : {"undistorted", "detector"}
        Frame of vectors that are given as `reference` where there is a `distortion`: what an undistorted camera would
        show (such as the crystal's known lattice), or what this one shows. Those of another result are the detector's.
    measure : str
        "stretch" (right stretch - 1), "left", "infinitesimal", "hencky" (logarithm), "green-lagrange"; "py4dstem" and
        "pyxem": their formulas.
    axes : float or (h, k)
        The x axis of the strain: degrees from the detector's x towards y, or along a reflection.
    distortion : (ratio, angle)
        Elliptical distortion of the camera, undone: length along `angle` over length across, of what is a circle.
    mask : path or array
        Of detector shape, True where pixels are hidden (beam stop) or dead.
    gain, read_noise, saturation : float
        Counts per electron; noise of a pixel without electrons, in counts; counts from which a pixel is saturated.
    min_disks : int
        Fewer disks than this are no lattice.
    max_chi2 : float
        Larger reduced chi^2 is no crystal; by default 4 times what is usual in the sample, and at least 4.
    max_sigma : float
        Strain more uncertain than this is not valid.
    """

    kind: Literal["strain"] = "strain"
    name: Name = "strain"
    center: Place = None
    a: Pair | None = None
    b: Pair | None = None
    lattices: tuple[tuple[Pair, Pair], ...] = ()
    radius: float | None = Field(default=None, ge=1)
    edge: float | None = Field(default=None, ge=0)
    ellipticity: Pair = (1.0, 0.0)
    probe: Image | None = None
    learn: Literal["reflections", "disk", "measured", "nothing"] = "reflections"
    registration: Literal["lattice", "guided", "correlation", "blobfinder"] = "lattice"
    power: float = Field(default=1.0, ge=0, le=1)
    reference: Literal["median"] | Region | tuple[Pair, Pair] | Image = "median"
    reference_frame: Literal["undistorted", "detector"] = "undistorted"
    measure: Measure = "stretch"
    axes: float | tuple[int, int] = 0.0
    distortion: Pair = (1.0, 0.0)
    mask: Image | None = None
    gain: float = Field(default=1.0, gt=0)
    read_noise: float | None = Field(default=None, ge=0)
    saturation: float | None = Field(default=None, gt=0)
    min_disks: int = Field(default=4, ge=3)
    max_chi2: float | None = Field(default=None, gt=0)
    max_sigma: float = Field(default=0.03, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Strain:
        if (self.a is None) != (self.b is None):
            raise ValueError("a and b: give both or none")
        if self.edge is not None and self.radius is None:
            raise ValueError("edge needs radius")
        if self.probe is not None and self.radius is not None:
            raise ValueError("radius and probe: give one of them; the radius of a probe is measured")
        if self.lattices and self.a is None:
            raise ValueError("lattices: further ones beside a and b; give these too")
        if self.registration != "lattice" and self.lattices:
            raise ValueError(f'registration = "{self.registration}" knows one lattice; leave out lattices')
        for key in ("ellipticity", "distortion"):
            if getattr(self, key)[0] <= 0:
                raise ValueError(f"{key}: the ratio of the axes must be positive, found {getattr(self, key)[0]:g}")
        return self

    def look(self, view: View, sample: Sample) -> StrainFit:
        """Find what wasn't given: probe, lattice, reflections, noise.

        Raises
        ------
        DataError
            The sample shows no disk or no lattice; with what was found and what to give.
        RecipeError
            What was given doesn't fit the data.
        """
        from gpuem.analyses.strain_look import look

        return look(self, view, sample)
