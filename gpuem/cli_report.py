"""What the commands say: of data, of a run before it begins, of results, of many data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from gpuem.errors import GpuemError, InputError
from gpuem.pictures import drawing
from gpuem.progress import duration, err, rate

if TYPE_CHECKING:
    from gpuem.analyses import Sample, View
    from gpuem.analyses.strain_maps import StrainFit
    from gpuem.dataset import Dataset
    from gpuem.engine import Job
    from gpuem.many import Campaign, Outcome
    from gpuem.recipe import Recipe
    from gpuem.results import Results

# a timeline is drawn of runs that took so many seconds
LONG = 10.0
out = Console(highlight=False, soft_wrap=True)


def check_one(asked: Recipe, path: Path) -> None:
    """Do all of a run before it streams, and say what it would do."""
    from gpuem import job, outputs, region, sampling
    from gpuem.analyses.strain_maps import StrainFit

    ds = job.open_input(asked)
    wanted = region.region(ds.scan_shape, asked.input.roi)
    seen, why = sampling.check_sample(ds, asked.analysis, wanted, job.allowed_memory(asked.run))
    analyses, prepared = job.begin(ds, asked.analysis, asked.run, asked.input.roi, seen)
    describe_data(ds)
    _describe_plan(asked, ds, prepared)
    _show_places(analyses, sampling.view_of(ds), seen, why, asked.output.path)
    looked = [analysis for analysis in analyses if isinstance(analysis, StrainFit)]
    for analysis in looked:
        _show_look(analysis, asked.output.path)
    out.print("The recipe is good; nothing was streamed.")
    try:
        outputs.check(asked, path, overwrite=False)
        outputs.refuse_overlaps(outputs.places(asked), outputs.inputs(asked, ds))
    except GpuemError as error:
        out.print(f"But: {escape(str(error))}")


def _describe_plan(asked: Recipe, ds: Dataset, prepared: Job) -> None:
    plan = prepared.plan
    wanted = int(prepared.wanted.sum())
    out.print(f"scan positions   {wanted:,} of {ds.positions:,} wanted")
    out.print(f"analyses         {', '.join(f'{a.name} ({a.kind})' for a in asked.analysis)}")
    out.print(f"device           {prepared.backend.NAME}, {_threads(plan.threads)}")
    if plan.device_nbytes:
        out.print(f"GPU memory       {sum(plan.device_nbytes.values()) / 1e6:,.0f} MB")
        for name, nbytes in plan.device_nbytes.items():
            out.print(f"                 {nbytes / 1e6:,.0f} MB {name}")
    out.print(f"shards           {len(plan.shards):,} of up to {max(s.frames for s in plan.shards):,} frames")
    out.print(f"memory           {plan.total_nbytes / 1e6:,.0f} MB")
    for name, nbytes in plan.nbytes.items():
        out.print(f"                 {nbytes / 1e6:,.0f} MB {name}")
    stored = sum(f.size for f in ds.source.files)
    out.print(f"to read          {stored * wanted / ds.positions / 1e9:,.3f} GB of files")
    slow, fast = ds.source.nbytes * wanted / ds.positions / 2e9, ds.source.nbytes * wanted / ds.positions / 2e8
    out.print(
        f"estimated time   {duration(slow)} from memory (2 GB/s per run) to {duration(fast)} from a disk of 200 MB/s"
    )
    out.print(f"result           {escape(str(asked.output.path))}")


def _show_look(found: StrainFit, output: Path) -> None:
    """What was found in the sample: in words, and over the mean pattern as a picture."""
    for line in found.picture.lines:
        out.print(f"{found.name:<16} {escape(line)}")

    def draw() -> Any:
        from gpuem.plot_look import figure_of_look

        return figure_of_look(found)

    _save_picture(draw, output.parent / f"{output.name.removesuffix('.zarr')}.{found.name}.look.png")


def _show_places(analyses: Sequence[Any], view: View, seen: Sample | None, why: str, output: Path) -> None:
    """Where the beam is and the detectors are: in words, and over the mean pattern as a picture."""
    if seen is None:
        out.print(f"direct beam      not measured: {escape(why)}")
        return
    beam = None
    try:
        beam = seen.direct_beam
        out.print(escape(beam.describe().replace("direct beam ", "direct beam      ", 1)))
    except GpuemError as error:
        out.print(f"direct beam      {escape(str(error).removeprefix('direct beam: '))}")
    places = {a.name: p for a in analyses if hasattr(a, "place") and "center_y" in (p := a.place(view))}
    for name, place in places.items():
        center = f"centre ({place['center_y']:.2f}, {place['center_x']:.2f}) px, {place['center_from']}"
        lengths = "".join(f", {k} {place[f'{k}_px']:.2f} px" for k in ("inner", "outer") if place.get(f"{k}_px"))
        out.print(f"{name:<16} {escape(place['shape'])}, {escape(center + lengths)}")
    if not places:
        return

    def draw() -> Any:
        from gpuem.plot_detectors import detectors_figure

        return detectors_figure(seen.mean, places, beam)

    _save_picture(draw, output.parent / f"{output.name.removesuffix('.zarr')}.detectors.png")


def _save_picture(draw: Callable[[], Any], target: Path) -> None:
    """Draw a picture and say where it lies; what goes wrong with it is a warning."""
    with drawing("picture"):
        from gpuem.panels import save_picture

        save_picture(draw(), target, 110)
        out.print(f"picture          {escape(str(target))}")


def check_many(campaign: Campaign) -> None:
    """Open all data sets of a recipe, list them, and check the first as `check_one` does.

    Raises
    ------
    InputError
        Some can't be opened; all the others were listed.
    """
    from rich.table import Table

    from gpuem import job, many, results

    alone = campaign.alone
    table = Table("name", "scan", "frame", "GB", "", title=f"{len(alone):,} data sets", title_justify="left")
    bad, good = 0, None
    for name, asked in alone.items():
        try:
            ds = job.open_input(asked)
        except (GpuemError, OSError) as error:
            table.add_row(escape(name), "", "", "", f"[red]{escape(first_line(error))}[/red]")
            bad += 1
            continue
        good = good or asked
        scan, frame = (" x ".join(map(str, shape)) for shape in (ds.scan_shape, ds.frame_shape))
        there = "its result is there" if results.is_result(asked.output.path) else "good"
        table.add_row(escape(name), scan, frame, f"{ds.source.nbytes / 1e9:,.3f}", there)
    out.print(table)
    if good is not None:
        check_one(good, campaign.path)
    try:
        many.check_outputs(campaign)
    except GpuemError as error:
        out.print(f"But: {escape(str(error))}")
    if bad:
        raise InputError(f"{bad:,} of {len(alone):,} data sets can't be opened; see the list")


def say_outcome(outcome: Outcome) -> None:
    """What became of a data set, in a line on the way."""
    words = _state(outcome)
    if outcome.state == "done" and outcome.seconds and not outcome.earlier:
        words += (
            f", {outcome.frames:,} frames, {outcome.nbytes / 1e9:.3f} GB in {duration(outcome.seconds)} "
            f"({rate(outcome.nbytes / outcome.seconds)})"
        )
    err.print(f"{escape(outcome.name)}: {escape(words)}")


def report_many(outcomes: Sequence[Outcome], summary: Path) -> None:
    """What became of many data sets, as a table."""
    from rich.table import Table

    table = Table(title=f"{len(outcomes):,} data sets", title_justify="left")
    table.add_column("name", overflow="fold")
    for column in ("frames", "GB", "GB/s", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for outcome in outcomes:
        cells = ["", "", ""]
        if outcome.state == "done":
            gigabytes = outcome.nbytes / 1e9
            speed = f"{gigabytes / outcome.seconds:.2f}" if outcome.seconds else ""
            cells = [f"{outcome.frames:,}", f"{gigabytes:,.3f}", speed]
        seconds = f"{outcome.seconds:,.2f}" if outcome.seconds else ""
        table.add_row(escape(outcome.name), *cells, seconds, escape(_state(outcome)))
    out.print(table)
    out.print(f"summary          {escape(str(summary))}")


def _state(outcome: Outcome) -> str:
    words = outcome.state + (" before" if outcome.earlier else "")
    words += f", {outcome.masked:,} masked" if outcome.masked else ""
    return words if outcome.error is None else f"{words}: {first_line(outcome.error)}"


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error) or type(error).__name__).splitlines()[0]


def previews(found: Results, where: Path) -> None:
    """Draw the maps as pictures beside the result; what goes wrong with them is a warning."""
    with drawing("pictures"):
        from gpuem import outputs, plot

        folder = outputs.previews_folder(where)
        if plot.save_previews(found, folder):
            out.print(f"pictures         {escape(str(folder))}")
        if found.provenance["seconds"]["total"] > LONG:
            from gpuem.plot_timeline import save_timeline
            from gpuem.run_folder import beside

            out.print(f"timeline         {escape(str(save_timeline(beside(where))))}")


def report(found: Results, where: Path) -> None:
    """What a run did."""
    facts = found.provenance
    frames, seconds = facts["frames"], facts["seconds"]["total"]
    from gpuem import run_folder, status, timings

    kept = facts.get("kept_shards", 0)
    speed = f"; {kept:,} shards were kept from before" if kept else f" ({rate(facts['bytes'] / seconds)})"
    out.print(
        f"read             {frames['read']:,} frames, {facts['bytes'] / 1e9:.3f} GB in {duration(seconds)}{speed} "
        f"on {_device(facts)}"
    )
    spent = timings.stages(status.Log(run_folder.beside(where)).read())
    if spent.sentence:
        out.print(f"time             {spent.sentence}")
    if frames["masked"]:
        out.print(f"masked           {frames['masked']:,} of {frames['wanted']:,} positions have no readable frame")
    for item in facts["lost"][:10]:
        out.print(f"                 {escape(item['frames'])}: {escape(item['reason'])}")
    if len(facts["lost"]) > 10:
        out.print(f"                 and {len(facts['lost']) - 10} more, listed in the result")
    for name, item in found.maps.items():
        if name.endswith("/field_y") and item.attributes:
            angle, flip = item.attributes["rotation_deg"], item.attributes["flip"]
            certainty = item.attributes.get("curl_to_divergence")
            if certainty is not None:
                doubt = ": the data hardly tell" if certainty > 0.8 else ""
                out.print(
                    f"{name.split('/')[0]:<16} rotation {angle:.2f} degrees, flip {'yes' if flip else 'no'}, "
                    f"curl/divergence that is left {certainty:.2f}{doubt}"
                )
    beams = {item.attributes["direct_beam_y"]: item.attributes for item in found.maps.values()
             if "direct_beam_y" in item.attributes}  # fmt: skip
    for beam in beams.values():
        out.print(
            f"direct beam      ({beam['direct_beam_y']:.2f}, {beam['direct_beam_x']:.2f}) +- "
            f"({beam['direct_beam_sigma_y']:.2g}, {beam['direct_beam_sigma_x']:.2g}) px (y, x), "
            f"radius {beam['direct_beam_radius']:.2f} px"
        )
    out.print(f"result           {escape(str(where))}")


def describe_data(ds: Dataset) -> None:
    """What a data set is."""
    for file in ds.source.files[:3]:
        out.print(f"file             {escape(str(file.path))} ({file.size:,} bytes)")
    if len(ds.source.files) > 3:
        out.print(f"                 and {len(ds.source.files) - 3} more")
    out.print(f"format           {ds.source.format}")
    for label, axes in (("scan", ds.scan), ("detector", ds.detector)):
        sizes = " x ".join(str(a.size) for a in axes)
        steps = ", ".join(f"{a.name} {a.step:g} {a.unit}" for a in axes if a.unit != "px")
        out.print(f"{label:<16} {sizes}{f'  ({steps})' if steps else ''}")
    out.print(f"pixels           {ds.source.raw_dtype.name}, {ds.source.nbytes / 1e9:.3f} GB decoded")
    from gpuem.correction import summary

    _describe_correction(summary(ds.source.correction))
    for note in ds.notes:
        out.print(f"note             {escape(note)}")


def _describe_correction(facts: dict[str, Any] | None) -> None:
    if facts is None:
        return
    for name in ("dark", "gain", "dead"):
        if name in facts:
            count = f" ({facts['dead_pixels']:,} dead pixels)" if name == "dead" else ""
            out.print(f"{name:<16} {escape(facts[name])}{count}")
    out.print(f"corrected        as {facts['dtype']}")


def describe_results(found: Results, path: Path) -> None:
    """What a result holds, and how it came about."""
    facts = found.provenance
    out.print(f"result           {escape(str(path))}")
    out.print(f"made             {facts['finished']} by gpuem {facts['gpuem']} on {_device(facts)}")
    for file in facts["input"]["files"]:
        out.print(f"from             {escape(file['path'])} ({file['size']:,} bytes)")
    _describe_correction(facts.get("correction"))
    frames = facts["frames"]
    out.print(f"frames           {frames['read']:,} read, {frames['masked']:,} masked")
    from rich.table import Table

    table = Table("map", "shape", "type", "unit", "meaning")
    for name, item in found.maps.items():
        table.add_row(name, " x ".join(map(str, item.data.shape)), item.data.dtype.name, item.units, item.description)
    out.print(table)


def _device(facts: dict[str, Any]) -> str:
    if "workers" in facts:
        what = f" on {escape(facts['gpu']['name'])} and the like" if facts["device"] == "cuda" else ""
        return f"{facts['workers']} worker{'s' if facts['workers'] > 1 else ''} ({facts['device']}){what}"
    if facts["device"] == "cuda":
        ways = {
            "gds": "through GPUDirect",
            "pinned": "through page-locked memory",
            "resident": "from its own memory",
            "kvikio": "through kvikio's remote files",
        }
        return f"{escape(facts['gpu']['name'])} (cuda), {ways[facts['transfer']['kind']]}"
    return f"{facts['device']}, {_threads(facts['threads'])}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
