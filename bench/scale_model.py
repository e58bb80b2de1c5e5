"""How long runs take on machines that aren't at hand: a small model, fitted to a record of `scale.py`.

    python bench/scale_model.py bench/records/scale.json --doc docs/scaling.md

prints the fit and the predictions, and writes them into the tables of the document. All stages of a run go on at once,
so it takes as long as its slowest stage, plus its beginning and the last shard. Rates of GPUs, storage and networks are
assumptions; seconds per shard and per byte of its results are measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

GB, TB, PB = 1e9, 1e12, 1e15
CLIENT = ("fixed_seconds", "shard_seconds", "result_seconds", "kept_shard_seconds", "kept_result_seconds")


@dataclass(frozen=True)
class Client:
    """The process that hands out shards and combines their results, as measured.

    Parameters
    ----------
    shard_seconds, result_seconds : float
        Its time per shard, and per byte of a shard's result.
    kept_shard_seconds, kept_result_seconds : float
        What keeping them adds.
    fixed_seconds : float
        Of each run: sending the job, planning.
    position_seconds : float
        Per scan position: maps, and saving them.
    """

    shard_seconds: float
    result_seconds: float
    kept_shard_seconds: float
    kept_result_seconds: float
    fixed_seconds: float
    position_seconds: float


@dataclass(frozen=True)
class Machine:
    """Nodes with GPUs. Rates are bytes per second; compressed data counts as stored until it is decoded.

    Parameters
    ----------
    nodes, gpus : int
        Nodes, and GPUs of each.
    disks : float
        A node's own disks; 0 where the data lies on storage that all share.
    storage, network : float
        Shared storage altogether, and what one node gets of it.
    copy, decode, kernels : float
        Of each GPU: bus, decoding and kernels; the latter two in decoded bytes.
    client_network, client_disk : float
        What results come in by, and where they are kept.
    startup, startup_worker : float
        Seconds until workers are there, and more for each.
    """

    nodes: int
    gpus: int
    disks: float = 0.0
    storage: float = 500 * GB
    network: float = 25 * GB
    copy: float = 50 * GB
    decode: float = 60 * GB
    kernels: float = 2000 * GB
    client_network: float = 2 * GB
    client_disk: float = 1 * GB
    startup: float = 15.0
    startup_worker: float = 0.01


@dataclass(frozen=True)
class Data:
    """Data sets of one size, run one after another by the same workers.

    Parameters
    ----------
    nbytes : float
        Of one, decoded.
    ratio : float
        Decoded bytes per stored byte.
    frame_nbytes, image_nbytes, row_nbytes, position_nbytes : int
        A frame; and of results: images of a shard, a row of a frame, what the client holds per scan position.
    sets : int
        How many.
    shard_nbytes : int
        Of a shard at least.
    combined : int
        Shards whose images a worker adds up before it sends them; 1 is what gpuem does.
    """

    nbytes: float
    ratio: float = 1.0
    frame_nbytes: int = 2 * 256 * 256
    image_nbytes: int = 8 * 256 * 256
    row_nbytes: int = 40
    position_nbytes: int = 832
    sets: int = 1
    shard_nbytes: int = 240 << 20
    combined: int = 1


@dataclass(frozen=True)
class Prediction:
    """Seconds of a run, and of each of its stages by itself.

    Parameters
    ----------
    seconds : float
        All of it.
    stages : dict of str to float
        What goes on at once, and what comes one after another: ``start`` and ``maps``.
    shards : int
        Of all data sets.
    client_nbytes : float
        Memory that the client needs for its results.
    """

    seconds: float
    stages: dict[str, float]
    shards: int
    client_nbytes: float

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.stages, key=lambda name: self.stages[name])


def shard_frames(data: Data, tile_nbytes=30 << 20, most_shards=1 << 14, most_frames=1 << 15, least_frames=32):
    """Frames of a shard, cut as `gpuem.tiles` cuts plain frames for a GPU."""
    tile = max(1, min(int(tile_nbytes // data.frame_nbytes), most_frames))
    target = max(data.shard_nbytes, data.nbytes // most_shards, least_frames * data.frame_nbytes)
    return max(1, min(int(target // data.frame_nbytes), most_frames) // tile) * tile


def predict(machine: Machine, client: Client, data: Data) -> Prediction:
    """How long a run takes, and what limits it."""
    gpus = machine.nodes * machine.gpus
    frames = data.nbytes / data.frame_nbytes
    each = shard_frames(data)
    shards = int(-(-frames // each))
    stored = data.nbytes / data.ratio
    result = each * data.row_nbytes + data.image_nbytes / data.combined
    decode = 1 / machine.decode if data.ratio > 1 else 0.0
    per_gpu = decode + 1 / machine.kernels
    if machine.disks:
        reading = {"disks of the nodes": stored / (machine.nodes * machine.disks)}
    else:
        reading = {"shared storage": stored / machine.storage, "network": stored / (machine.nodes * machine.network)}
    handing_out = shards * (client.shard_seconds + client.kept_shard_seconds)
    combining = shards * result * (client.result_seconds + client.kept_result_seconds)
    stages = {
        **reading,
        "bus": stored / (gpus * machine.copy),
        "decoding and kernels": data.nbytes * per_gpu / gpus,
        "client": handing_out + combining,
        "network of the client": shards * result / machine.client_network,
        "disk of the client": shards * result / machine.client_disk,
    }
    # the last shard goes alone through what was shared by a node, or by all
    part = each * data.frame_nbytes
    last = part / data.ratio * (1 / min(machine.disks or machine.network, machine.copy) + 1 / machine.copy)
    last += part * per_gpu
    saving = frames * client.position_seconds
    once = max(stages.values()) + last + client.fixed_seconds + saving
    start = machine.startup + machine.startup_worker * gpus
    told = {name: data.sets * value for name, value in stages.items()} | {"start": start, "maps": data.sets * saving}
    return Prediction(start + data.sets * once, told, data.sets * shards, frames * data.position_nbytes)


# ---- the fit


def fit(record):
    """The client, rates of the workers, and how well both tell what was measured.

    Least squares, relative to what was measured; all parameters are times, so none is negative. The client is fitted to
    the processor time of its process, which elsewhere has a processor for itself. Where it was measured it shared the
    processors with the workers, so that in the times by the clock what both take adds up.
    """
    runs = [one for one in record["runs"] if one["by"] == "workers" and one.get("section") != "killed"]
    works = sorted({one["what"] for one in runs} - {"tiny"})
    # the client's, then the workers'
    names = [*CLIENT, *(f"{work}: s/byte of a worker" for work in works), "all workers: s/byte"]
    table = np.zeros((len(runs), len(names)))
    for k, one in enumerate(runs):
        results, kept = one["shards"] * one["partial_nbytes"], float(one["kept"])
        table[k, : len(CLIENT)] = 1.0, one["shards"], results, kept * one["shards"], kept * results
        if one["what"] in works:
            table[k, len(CLIENT) + works.index(one["what"])] = one["nbytes"] / one["count"]
            table[k, -1] = one["nbytes"]
    points, values = [], {}
    for what, width in (("own", len(CLIENT)), ("seconds", len(names))):
        measured = np.array([one[what] for one in runs])
        found = non_negative(table[:, :width] / measured[:, None], np.ones(len(runs)))
        values[what] = dict(zip(names[:width], found.tolist(), strict=True))
        points.append(list(zip(runs, measured.tolist(), (table[:, :width] @ found).tolist(), strict=True)))
    maps = [one["seconds"] / one["positions"] for one in record["runs"] if one["what"] == "maps"]
    return Client(**values["own"], position_seconds=maps[0] if maps else 0.0), values, points


def non_negative(table, wanted):
    """Least squares where nothing is negative: what would be is 0, the most negative first."""
    free = np.flatnonzero(table.any(axis=0))
    scale = np.linalg.norm(table, axis=0)
    found = np.zeros(table.shape[1])
    while free.size:
        part = np.linalg.lstsq(table[:, free] / scale[free], wanted, rcond=None)[0]
        if part.min() >= 0:
            found[free] = part / scale[free]
            break
        free = np.delete(free, part.argmin())
    return found


# ---- what is predicted

FAST_DISKS = 50 * GB
MACHINES = {
    "1 GPU, own disks": Machine(1, 1, disks=FAST_DISKS, startup=3.0),
    "8 GPUs, own disks": Machine(1, 8, disks=FAST_DISKS),
    "8 GPUs, shared storage": Machine(1, 8),
    "64 nodes x 8 GPUs, own disks": Machine(64, 8, disks=FAST_DISKS),
    "64 nodes x 8 GPUs, shared storage": Machine(64, 8),
}
KINDS = {"raw": 1.0, "bslz4": 6.0}


def sizes_of(record):
    """Sizes of results as in the record: sum, an annulus and the centre of mass on 256x256."""
    return replace(Data(TB), **record["results"].get("tiny", {}))


def predictions(client, data):
    """Rows: machine, data, prediction."""
    for name, machine in MACHINES.items():
        for kind, ratio in KINDS.items():
            yield name, f"1 TB, {kind}", predict(machine, client, replace(data, ratio=ratio))
    for name in list(MACHINES)[3:]:
        for kind, ratio in KINDS.items():
            yield name, f"1000 x 1 TB, {kind}", predict(MACHINES[name], client, replace(data, ratio=ratio, sets=1000))
    yield name, "1 PB in one, raw, if it fitted", predict(MACHINES[name], client, replace(data, nbytes=PB))


def moved(client, data):
    """Rows: what is changed, prediction; 1000 data sets of 1 TB, bslz4, on the disks of 64 nodes."""
    machine, all_sets = MACHINES["64 nodes x 8 GPUs, own disks"], replace(data, ratio=6.0, sets=1000)
    yield "as it is", predict(machine, client, all_sets)
    yield "shards of 1 GiB", predict(machine, client, replace(all_sets, shard_nbytes=1 << 30))
    yield "images of 16 shards added up by workers", predict(machine, client, replace(all_sets, combined=16))
    yield "both", predict(machine, client, replace(all_sets, shard_nbytes=1 << 30, combined=16))
    without = replace(client, kept_shard_seconds=0.0, kept_result_seconds=0.0)
    yield "finished shards aren't kept", predict(replace(machine, client_disk=1e15), without, all_sets)
    # those of one data set while the next is computed
    yield "maps are made beside the next run", predict(machine, replace(client, position_seconds=0.0), all_sets)
    # eight runs side by side, each with an eighth of the nodes, of the data sets, and a client of its own
    eighth = replace(machine, nodes=machine.nodes // 8)
    yield "8 runs side by side, 8 nodes each", predict(eighth, client, replace(all_sets, sets=125))
    yield (
        "64 runs side by side, 1 node each",
        predict(replace(machine, nodes=1), client, replace(all_sets, sets=16)),
    )


# where the assumed rates come from
SOURCES = {
    "storage": "a large parallel file system; ask yours",
    "network": "one port of 200 Gb/s; 28 GB/s were seen with NFS over RDMA (GPUDirect Storage report)",
    "copy": "PCIe 5 x16 from page-locked memory, of 55 to 63",
    "decode": "bitshuffle-LZ4; a target, not yet measured",
    "kernels": "sum, annulus, centre of mass: half of what an H200's memory gives (4.3 TB/s copied)",
    "client_network": "25 Gb/s Ethernet through TCP",
    "client_disk": "one writer on shared storage",
    "startup": "job step, imports, CUDA context, kernels from the cache",
    "startup_worker": "its connection to the scheduler",
}


def assumptions():
    """A table of what is assumed."""
    machine = Machine(1, 1, disks=FAST_DISKS)
    why = {"disks": "four NVMe of PCIe 5, 14 GB/s each; four of PCIe 4 gave 23 (kvikio issue 850)", **SOURCES}
    rows = []
    for name, text in why.items():
        value = getattr(machine, name)
        rows.append([name, f"{value:g} s" if name.startswith("startup") else f"{value / GB:g} GB/s", text])
    return table(["parameter", "value", "why"], rows)


def table(head, rows):
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def spoken(seconds):
    """Seconds as people say them."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def slowest(found):
    """The two slowest stages, with their times."""
    slow = sorted(found.stages.items(), key=lambda pair: -pair[1])[:2]
    return [f"{name} {spoken(value)}" for name, value in slow]


def tables(record):
    """The tables of the document, by name."""
    client, values, points = fit(record)
    data = sizes_of(record)
    predicted = [
        [name, kind, spoken(one.seconds), rate(one, kind), *slowest(one), f"{one.shards:,}",
         f"{one.client_nbytes / GB:,.0f}"]
        for name, kind, one in predictions(client, data)
    ]  # fmt: skip
    walls = [[name, spoken(one.seconds), *slowest(one)] for name, one in moved(client, data)]
    wide = ["machine", "data", "time", "GB/s", "limited by", "next", "shards", "client's memory (GB)"]
    return {
        "assumptions": assumptions(),
        "fit": fit_tables(record["machine"], client, values, points),
        "predictions": table(wide, predicted),
        "walls": table(["what", "time", "limited by", "next"], walls),
    }


def fit_tables(machine, client, values, points):
    """What was fitted, and beside each other what was measured and what the model says."""
    made = (
        f"{machine['cpu']}, {machine['processors']} processors, commit {machine['commit']}, {machine['date']}, load "
        f"before {machine['load_before']:.1f}, after {machine['load_after']:.1f}"
    )
    names = [*values["seconds"], "position_seconds"]
    own = {**values["own"], "position_seconds": client.position_seconds}
    rows = [[name, *(f"{one[name]:.3g}" if name in one else "" for one in (own, values["seconds"]))] for name in names]
    checks = []
    for (one, own_measured, own_model), (_, measured, model) in zip(*points, strict=True):
        which = [one["what"], str(one["count"]), f"{one['shards']:,}", "yes" if one["kept"] else "no"]
        pairs = [f"{value:.3g}" for value in (own_measured, own_model, measured, model)]
        checks.append([*which, *pairs, f"{100 * (model / measured - 1):+.0f} %"])
    heads = ["what", "workers", "shards", "kept", "client (s)", "model", "by the clock (s)", "model", "off by"]
    return f"{made}.\n\n{table(['parameter', 'client', 'all'], rows)}\n\n{table(heads, checks)}"


def rate(found, kind):
    """Decoded GB/s over the whole time."""
    number = 1000 if kind.startswith(("1000", "1 PB")) else 1
    return f"{number * TB / found.seconds / GB:,.0f}"


def renew(text, made):
    """A document with its tables made anew; each lies between two comments."""
    for name, content in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="what scale.py wrote")
    parser.add_argument("--doc", type=Path, help="the document whose tables are made anew")
    given = parser.parse_args(arguments)
    made = tables(json.loads(given.record.read_text()))
    for name, content in made.items():
        print(f"{name}\n\n{content}\n")
    if given.doc:
        given.doc.write_text(renew(given.doc.read_text(), made))
    return made


if __name__ == "__main__":
    main()
