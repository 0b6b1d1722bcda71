"""The sections of the data-preparation benchmark, each a function from the shared context to its part of the report."""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.bench_prep_context import Context, Pair, Run
from tests.benchmarks.bench_prep_measure import Usage, measure
from tests.benchmarks.bench_prep_report import Bar, Section, megabytes, table, values
from tests.benchmarks.bench_prep_sides import ROWS, Row
from tests.benchmarks.bench_prep_tasks import SAMPLES_PER_TASK
from tests.benchmarks.corpus import write_list
from tests.data_prep.web_server import ServerProcess
from tests.peers.environments import interpreter
from tests.peers.kill_contrast import contrast

SPEED, CPU, MEMORY, READ, SIZE, RAY, WORKERS = 1.6, 0.6, 1.5, 1.7, 0.95, 1.05, 1.9
"""The bars."""

LARGE_COUNT, LARGE_SIDE = 48, 3300
LARGE_MEMORY = 2**30
"""`ray.memory_per_task_bytes` of the run with large pictures."""


def compare(context: Context, name: str) -> Section:
    """Both sides over the short and the long list, turn by turn."""
    row = ROWS[name]
    rounds, sizes = (context.runs, (context.short, context.long)) if row.gates else (1, (context.short, 2 * context.short))
    pairs: dict[str, list[Pair]] = {"img2dataset": [], "jetway": []}
    for turn in range(rounds):
        for side in sorted(pairs, reverse=bool(turn % 2)):
            short, long = (_one(context, side, rows, row) for rows in sizes)
            pairs[side].append(Pair(short=short, long=long))
            _keep(context, side, row, pairs[side][-1])
    lines = [
        f"{row.note}.",
        "",
        f"`{' '.join(row.ours) or '(defaults)'}` against `{' '.join(f'--{key}={value}' for key, value in row.peer.items())}`",
        "",
    ]
    lines += _comparison(pairs, context, sizes)
    speed, cpu, memory = (_ratio(pairs, of) for of in (_speed, _cpu, _memory))
    lines += ["", f"Ratios of the medians, ours over theirs: speed **{speed:.2f}**, CPU per image **{cpu:.2f}**, memory **{memory:.2f}**."]
    bars = [
        Bar(what=f"images/s, {name}", aim=SPEED, found=speed, at_least=True),
        Bar(what=f"CPU s per image, {name}", aim=CPU, found=cpu, at_least=False),
        Bar(what=f"peak memory (PSS), {name}", aim=MEMORY, found=memory, at_least=False),
    ]
    return Section(title=f"Against img2dataset: {name}", lines=lines, bars=bars if row.gates else ())


def peer_settings(context: Context) -> Section:
    """Which processes and threads suit the peer best here: one round each, on the settings that gate."""
    rows, found = [], {}
    processes, threads, shard = context.processes, context.threads, context.samples_per_shard
    context.samples_per_shard = max(1, context.short // 4)  # a whole number of shards for each of 2 and of 4 processes
    for context.processes, context.threads in ((2, 16), (2, 32), (2, 64), (3, 32), (4, 16)):
        pair = Pair(**{name: _one(context, "img2dataset", size, ROWS["same"]) for name, size in (("short", context.short), ("long", context.long))})
        found[context.processes, context.threads] = pair.images_per_s
        rows.append([f"{context.processes} x {context.threads}", f"{pair.images_per_s:.0f}", f"{pair.cpu_ms:.2f}", f"{pair.long.usage.wall_s:.1f}"])
    context.processes, context.threads, context.samples_per_shard = processes, threads, shard
    best = max(found, key=lambda setting: found[setting])
    lines = table(["processes x threads", "images/s", "CPU ms/image", "wall s, long list"], rows)
    return Section(title="The peer's best settings", lines=[*lines, "", f"Fastest: {best[0]} processes, {best[1]} threads each."])


def ray_overhead(context: Context) -> Section:
    """The same tasks called in this process and through Ray, everything of either on one and the same core."""
    few, many = 2, 8
    times: dict[str, list[float]] = {"process": [], "ray": []}
    cpu: dict[str, list[float]] = {"process": [], "ray": []}
    core, cores = min(os.sched_getaffinity(0)), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        for _ in range(2):
            for mode in times:
                usages = [_tasks(context, mode, tasks, 1) for tasks in (few, many)]
                further = (many - few) * SAMPLES_PER_TASK
                times[mode].append(1e3 * (usages[1].wall_s - usages[0].wall_s) / further)
                cpu[mode].append(1e3 * (usages[1].cpu_s - usages[0].cpu_s) / further)
    finally:
        os.sched_setaffinity(0, cores)
    rows = [
        [name, values(times[mode], 2), values(cpu[mode], 2)]
        for mode, name in (("process", "called in one process"), ("ray", "through `data_prep.cluster`"))
    ]
    ratio = statistics.median(times["ray"]) / statistics.median(times["process"])
    lines = [f"{few} and {many} tasks of {SAMPLES_PER_TASK} pictures from a folder, slope between them; Ray's own processes share the one core.", ""]
    lines += table(["", "wall ms/image", "CPU ms/image, all processes"], rows)
    return Section(
        title="What Ray costs", lines=lines, bars=[Bar(what="wall time through Ray over in-process", aim=RAY, found=ratio, at_least=False)]
    )


def workers(context: Context) -> Section:
    """One worker and two, and what the machine itself allows: two plain processes against one."""
    found: dict[str, list[float]] = {"jetway, ray.num_cpus": [], "plain processes, no Ray": []}
    rows = []
    settings = (f"samples_per_shard={SAMPLES_PER_TASK}", *ROWS["same"].ours)
    small, large = context.folder(2 * SAMPLES_PER_TASK), context.folder(10 * SAMPLES_PER_TASK)
    for _ in range(2):
        speeds = []
        for number in (1, 2):
            runs = [context.our_run(folder, (*settings, f"ray.num_cpus={number}")) for folder in (small, large)]
            speeds.append(Pair(short=runs[0], long=runs[1]).images_per_s)
        plain = []
        for number in (1, 2):
            usages = [_tasks(context, "pool", tasks, number) for tasks in (2, 8)]
            plain.append(6 * SAMPLES_PER_TASK / (usages[1].wall_s - usages[0].wall_s))
        for name, (one, two) in zip(found, (speeds, plain), strict=True):
            found[name].append(two / one)
            rows.append([name, f"{one:.0f}", f"{two:.0f}", f"{two / one:.2f}"])
    lines = ["From a folder, so that no server takes part of the second core; slopes between two lengths.", ""]
    lines += table(["", "images/s, 1 worker", "images/s, 2 workers", "ratio"], sorted(rows))
    ours, plain_ratio = (statistics.median(ratios) for ratios in found.values())
    lines += ["", f"Two plain processes without Ray reach {plain_ratio:.2f} times one here: more than that the machine does not give."]
    return Section(title="One worker, two workers", lines=lines, bars=[Bar(what="2 workers over 1", aim=WORKERS, found=ours, at_least=True)])


def read(context: Context) -> Section:
    """webdataset's own loader over the shards that both sides wrote of the same list with the same settings."""
    for side in ("img2dataset", "jetway"):
        if side not in context.kept:
            _keep(context, side, ROWS["same"], Pair(short=(run := _one(context, side, context.long, ROWS["same"])), long=run))
    rows, ratios, size = [], [], {}
    for name, python in (("installed", Path(sys.executable)), ("the peer's", interpreter("webdataset-0.2.111"))):
        speeds: dict[str, list[float]] = {"img2dataset": [], "jetway": []}
        for _ in range(3):
            for side, side_speeds in speeds.items():
                found = _read_once(python, context.kept[side])
                side_speeds.append(found["samples"] / found["cpu_s"])
                size[side] = found["tars"] / found["samples"]
        ratios.append(statistics.median(speeds["jetway"]) / statistics.median(speeds["img2dataset"]))
        for side, side_speeds in speeds.items():
            rows.append([f"webdataset {found['version']} ({name})", side, values(side_speeds, 0), f"{size[side]:,.0f}"])
    lines = ["Second pass over the same shards, page cache warm, nothing decoded; CPU time of the reading process.", ""]
    lines += table(["reader", "shards of", "samples/s/core", "bytes/sample in tars"], rows)
    bars = [
        Bar(what="reading our shards over theirs, installed webdataset", aim=READ, found=ratios[0], at_least=True),
        Bar(what="reading our shards over theirs, webdataset 0.2.111", aim=READ, found=ratios[1], at_least=True),
        Bar(what="bytes of our tars over theirs", aim=SIZE, found=size["jetway"] / size["img2dataset"], at_least=False),
    ]
    return Section(title="Reading the shards back", lines=lines, bars=bars)


def large_pictures(context: Context) -> Section:
    """Memory with pictures of 20 MB each."""
    folder = context.work / "large"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (LARGE_SIDE, LARGE_SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=92, subsampling="4:4:4")
    (folder / "000000.jpg").write_bytes(buffer.getvalue())
    urls = context.work / "large.parquet"
    row = Row(name="large", note="", peer={**ROWS["same"].peer, "number_sample_per_shard": str(LARGE_COUNT // 2)}, ours=())
    memory = (f"ray.memory_per_task_bytes={LARGE_MEMORY}", f"limits.max_decode_bytes={LARGE_MEMORY // 2}")
    settings = (*ROWS["same"].ours, f"samples_per_shard={LARGE_COUNT // 2}", *memory, "ray.num_cpus=2")
    with ServerProcess(folder) as server:
        write_list(urls, [server.url("")], files=1, rows=LARGE_COUNT)
        theirs, ours = context.peer_run(urls, row), context.our_run(urls, settings)
    idle = _idle_memory(context)
    rows = [
        [side, f"{run.outcome.kept}", f"{run.usage.wall_s:.1f}", megabytes(run.usage.peak_pss), megabytes(run.usage.peak_rss)]
        for side, run in (("img2dataset", theirs), ("jetway", ours))
    ]
    size = len(buffer.getvalue())
    lines = [f"{LARGE_COUNT} addresses of a picture of {size / 1e6:.0f} MB and {LARGE_SIDE**2 / 1e6:.0f} MP, two tasks at once.", ""]
    lines += table(["side", "kept", "wall s", "peak PSS, all processes", "peak RSS"], rows)
    cap = 2 * LARGE_MEMORY + idle
    lines += ["", f"Our cap: 2 tasks x {megabytes(LARGE_MEMORY)} (`ray.memory_per_task_bytes`) above the {megabytes(idle)} of a run of small ones."]
    bar = Bar(what="peak PSS over the cap, pictures of 20 MB", aim=1.0, found=ours.usage.peak_pss / cap, at_least=False)
    return Section(title="Pictures of 20 MB", lines=lines, bars=[bar])


def long_list(context: Context) -> Section:
    """Memory of the process that the user starts, with a short list and in the first seconds of one of 100,000 rows."""
    rows, growth = [], {}
    for side in ("img2dataset", "jetway"):
        small = _one(context, side, 1000, ROWS["same"])
        large = _one(context, side, 100_000, ROWS["same"], stop_after_s=15.0)
        growth[side] = large.usage.peak_main_rss - small.usage.peak_main_rss
        rows.append([side, megabytes(small.usage.peak_main_rss), megabytes(large.usage.peak_main_rss), megabytes(growth[side])])
    lines = ["Peak RSS of the command's own process; the run over 100,000 addresses is ended after 15 seconds.", ""]
    return Section(title="A list of 100,000 rows", lines=[*lines, *table(["side", "1,000 rows", "100,000 rows", "growth"], rows)])


def kill(context: Context) -> Section:
    """SIGKILL in the middle."""
    folder = context.new("kill")
    folder.mkdir()
    lines = [f"- {aftermath.line()}" for aftermath in contrast(context.corpus, 3000, folder)]
    return Section(title="SIGKILL in the middle", lines=[*lines, "", "`python -m tests.peers.kill_contrast CORPUS` repeats this."])


SECTIONS: dict[str, Callable[[Context], Section]] = {
    **{name: partial(compare, name=name) for name in ROWS},
    "ray": ray_overhead,
    "workers": workers,
    "read": read,
    "large": large_pictures,
    "list": long_list,
    "kill": kill,
    "peer-settings": peer_settings,
}


def _one(context: Context, side: str, rows: int, row: Row, *, stop_after_s: float | None = None) -> Run:
    urls = context.urls(rows)
    run = context.our_run(urls, row.ours, stop_after_s=stop_after_s) if side == "jetway" else context.peer_run(urls, row, stop_after_s=stop_after_s)
    assert stop_after_s is not None or run.outcome.kept > 0.99 * rows, f"{side} kept {run.outcome.kept} of {rows}: see {run.output}.log"
    return run


def _keep(context: Context, side: str, row: Row, pair: Pair) -> None:
    """Deletes the outputs of a round, except one of each side for the reading section."""
    if row.gates and side not in context.kept:
        context.kept[side] = pair.long.output
    for run in (pair.short, pair.long):
        if run.output not in context.kept.values():
            shutil.rmtree(run.output, ignore_errors=True)


def _speed(pair: Pair) -> float:
    return pair.images_per_s


def _cpu(pair: Pair) -> float:
    return pair.cpu_ms


def _memory(pair: Pair) -> float:
    return float(pair.long.usage.peak_pss)


def _ratio(pairs: dict[str, list[Pair]], of: Callable[[Pair], float]) -> float:
    ours, theirs = (statistics.median(of(pair) for pair in pairs[side]) for side in ("jetway", "img2dataset"))
    return ours / theirs


def _comparison(pairs: dict[str, list[Pair]], context: Context, sizes: tuple[int, int]) -> list[str]:
    """The table of both sides: medians, and every run."""
    cells: list[tuple[str, Callable[[Pair], float], int]] = [
        ("**images/s, steady**", _speed, 0),
        ("**CPU ms/image, steady**", _cpu, 2),
        (f"wall s, {sizes[1]:,} rows", lambda pair: pair.long.usage.wall_s, 1),
        (f"wall s, {sizes[0]:,} rows", lambda pair: pair.short.usage.wall_s, 1),
        (f"images/s, {sizes[1]:,} rows, start-up included", lambda pair: pair.long.outcome.read / pair.long.usage.wall_s, 0),
        ("s once per run", lambda pair: pair.once_s, 1),
        (f"CPU s, {sizes[1]:,} rows", lambda pair: pair.long.usage.cpu_s, 1),
        ("server CPU ms/image, counted apart", lambda pair: pair.server_ms, 2),
        ("peak PSS, all processes, MiB", lambda pair: pair.long.usage.peak_pss / 2**20, 0),
        ("peak RSS, all processes, MiB", lambda pair: pair.long.usage.peak_rss / 2**20, 0),
        ("kept", lambda pair: pair.long.outcome.kept, 0),
        ("tars, MB", lambda pair: pair.long.outcome.num_bytes / 1e6, 1),
        ("whole output, MB", lambda pair: pair.long.outcome.num_bytes_all / 1e6, 1),
    ]
    sides = list(pairs)
    rows = [[name, *(values([of(pair) for pair in pairs[side]], digits) for side in sides)] for name, of, digits in cells]
    peer = f"{context.processes} processes x {context.threads} threads"
    return ["Median (every run).", "", *table(["", *(f"{side} ({peer})" if side == "img2dataset" else side for side in sides)], rows)]


def _tasks(context: Context, mode: str, tasks: int, num_workers: int) -> Usage:
    folder, output = context.folder(8 * SAMPLES_PER_TASK), context.new(mode)
    options = ["--tasks", str(tasks), "--workers", str(num_workers), *ROWS["same"].ours]
    log = output.with_suffix(".log")
    usage = measure([sys.executable, "-m", "tests.benchmarks.bench_prep_tasks", mode, str(folder), str(output), *options], log=log)
    assert usage.returncode == 0, log.read_text(errors="replace")[-3000:]
    shutil.rmtree(output, ignore_errors=True)
    return usage


def _read_once(python: Path, output: Path) -> dict[str, float]:
    shards = sorted(str(path) for path in output.rglob("*.tar") if path.parent.name in ("shards", output.name))
    script = Path(__file__).with_name("bench_prep_read.py")
    done = subprocess.run([python, script, *shards], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _idle_memory(context: Context) -> int:
    """Peak PSS of a run that has next to nothing to do: Ray, the driver and idle workers."""
    return context.our_run(context.folder(64), ("samples_per_shard=32", "ray.num_cpus=2")).usage.peak_pss
