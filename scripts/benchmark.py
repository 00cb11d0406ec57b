"""imageprompt beside what people pick instead, and beside the machine's limit: time and memory of the same work.

    python scripts/benchmark.py --output docs/speed/benchmark.json

The contestants are in `contestants.py`, what they do in `WORKS`. All have random weights of the same sizes (ViT-S/16 at
224 pixels with GPT-2's 124 million parameters; LLaVA's head is a matrix of its own), the same batch and the same dtype.
Each runs in a process of its own, so that its peak memory is its own, and the processes take turns, one repeat each, so
that what else the machine does falls on all alike: what counts is the median ratio of times of the same turn, held
against `GOALS`. A picture of the ratios is drawn beside the file, which also says in which of torch's operations the
time goes.

For a GPU, larger ones, and how much of its arithmetic is used (of the peak that its maker states, 989 TFLOP/s for an
H100 in bf16):

    python scripts/benchmark.py --large --dtypes bf16 --peak-tflops 989 --output docs/speed/gpu.json

`--quick` takes tiny models, to see that all runs; no time is looked at.
"""

import hashlib
import json
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contestants import CONTESTANTS, DTYPES, LARGE, QUICK, REFERENCE, Sizes, dtypes_of_this_machine
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from imageprompt.folders import write_whole
from imageprompt.provenance import differences, provenance

SCRIPTS = Path(__file__).parent

# Who does what; the first is what the others are compared with.
WORKS: dict[str, list[tuple[str, str]]] = {
    "train, all image tokens": [("Ours", "train"), ("Llava", "train")],
    "train, and the floor": [("Ours", "train"), ("Gemms", "train")],
    "train, logits where there are labels": [("Ours", "train"), ("Ours", "train_all_logits")],
    "train, GELU as one operation": [("Ours", "train"), ("Ours", "train_gelu_in_eight")],
    "train, a quarter of the tokens": [
        ("OursPooled", "train"),
        ("EncoderDecoder", "train"),
        ("GemmsPooled", "train"),
        ("OursPooled", "train_compiled"),
    ],
    "train, a frozen tower": [
        ("OursPooled", "train_frozen"),
        ("EncoderDecoder", "train_frozen"),
        ("OursPooled", "train_frozen_from_features"),
        ("EncoderDecoder", "train"),
    ],
    "train, the connector alone": [
        ("OursPooled", "train_connector"),
        ("OursPooled", "train_connector_from_features"),
    ],
    "train, a frozen tower larger than the text": [
        ("OursSmallText", "train_frozen"),
        ("OursSmallText", "train_frozen_from_features"),
    ],
    "train, texts of unlike length": [
        ("OursLongText", "train_padded"),
        ("OursLongText", "train_grouped"),
        ("OursLongText", "train_packed"),
    ],
    "a training batch, and its making from files": [
        ("OursPooled", "train"),
        ("OursPooled", "load_photos"),
        ("OursPooled", "load_features"),
    ],
    "generate": [
        ("OursPooled", "generate"),
        ("Ours", "generate"),
        ("Llava", "generate"),
        ("EncoderDecoder", "generate"),
        ("Loop", "generate"),
        ("OursPooled", "generate_prepacked"),
        ("Ours", "generate_prepacked"),
        ("OursPooled", "generate_static"),
        ("OursPooled", "generate_compiled"),
    ],
    "decode a token": [(name, "decode") for name in ("Ours", "Gpt2", "Gemms", "Bandwidth", "OursPooled")]
    + [("Ours", "decode_prepacked"), ("OursPooled", "decode_prepacked")]
    + [("Ours", "decode_static"), ("Ours", "decode_static_prepacked")],
    "questions about one image": [
        ("Ours", "questions_together_behind_a_prefix"),
        ("Ours", "questions_together"),
        ("Ours", "questions_behind_a_prefix"),
        ("Ours", "questions_one_by_one"),
        ("Ours", "questions_together_behind_a_prefix_prepacked"),
        ("Ours", "questions_together_prepacked"),
        ("Ours", "questions_behind_a_prefix_prepacked"),
        ("Ours", "questions_one_by_one_prepacked"),
    ],
    "cold start": [("Ours", "cold_start"), ("Llava", "cold_start"), ("EncoderDecoder", "cold_start")],
}


@dataclass(frozen=True)
class Goal:
    """How much faster one should be than the fastest of others, by dtype, and in how much of its memory."""

    work: str
    who: tuple[str, str]
    than: tuple[tuple[str, str], ...]
    faster: dict[str, float]
    memory: float | None = None


def _both(times: float) -> dict[str, float]:
    return dict.fromkeys(DTYPES, times)


_QUESTIONS = "questions about one image"
_CONNECTOR = "train, the connector alone"
_LARGE_TOWER = "train, a frozen tower larger than the text"
_FROZEN = "train, a frozen tower"
_FILES = "a training batch, and its making from files"
GOALS = [
    Goal("train, all image tokens", ("Ours", "train"), (("Llava", "train"),), _both(1.5), memory=0.75),
    Goal(
        "train, a quarter of the tokens", ("OursPooled", "train"), (("EncoderDecoder", "train"),), _both(1.5), memory=1
    ),
    *(
        Goal(_FROZEN, ("OursPooled", who), (("EncoderDecoder", than),), _both(1.5), memory=1)
        for than in ("train", "train_frozen")
        for who in ("train_frozen", "train_frozen_from_features")
    ),
    Goal(_FROZEN, ("OursPooled", "train_frozen_from_features"), (("OursPooled", "train_frozen"),), _both(5)),
    Goal(_CONNECTOR, ("OursPooled", "train_connector_from_features"), (("OursPooled", "train_connector"),), _both(5)),
    Goal(_LARGE_TOWER, ("OursSmallText", "train_frozen_from_features"), (("OursSmallText", "train_frozen"),), _both(5)),
    *(
        Goal(_FILES, ("OursPooled", method), (("OursPooled", "train"),), _both(1))
        for method in ("load_photos", "load_features")
    ),
    *(
        Goal(
            "generate",
            ("OursPooled", method),
            (("Llava", "generate"), ("EncoderDecoder", "generate"), ("Loop", "generate")),
            {"fp32": 1.5, "bf16": 2},
        )
        for method in ("generate", "generate_prepacked")
    ),
    *(
        Goal("generate", ("Ours", method), (("Llava", "generate"),), {"fp32": 1.5, "bf16": 2})
        for method in ("generate", "generate_prepacked")
    ),
    *(
        Goal("decode a token", (name, method), (("Gemms", "decode"),), _both(1 / 1.25))
        for name in ("Ours", "OursPooled")
        for method in ("decode", "decode_prepacked")
    ),
    *(
        Goal(
            _QUESTIONS,
            ("Ours", f"questions_{behind}{prepacked}"),
            (("Ours", f"questions_{than}{prepacked}"),),
            _both(5),
        )
        for behind, than in (
            ("together_behind_a_prefix", "one_by_one"),
            ("together_behind_a_prefix", "together"),
            ("behind_a_prefix", "one_by_one"),
        )
        for prepacked in ("", "_prepacked")
    ),
    Goal(
        "cold start",
        ("Ours", "cold_start"),
        (("Llava", "cold_start"), ("EncoderDecoder", "cold_start")),
        _both(1 / 1.15),
    ),
]


@dataclass(frozen=True)
class Job:
    """One contestant's part in a comparison."""

    contestant: str
    method: str
    sizes: Sizes


def _serve(pipe: Any, job: Job, dtype: str, device: str, threads: int) -> None:
    """A contestant's process: one repeat for every True that it receives, answered with its seconds and the peak memory
    of its repeats so far; for False the shares of its operations, and the end."""
    torch.set_num_threads(threads)
    work = getattr(CONTESTANTS[job.contestant](job.sizes, dtype, device), job.method)()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _linear_flops}) as counter:
        work()  # not timed: allocations and kernels' first calls
    work()  # without the counter, under which nothing is compiled
    _forget_peak(device)  # building takes more than some works
    pipe.send(counter.get_total_flops())  # only now may others be timed
    while pipe.recv():
        if device == "cuda":
            work()  # takes the memory that the others' turns were left
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - started, _peak(device)))
        if device == "cuda":
            torch.cuda.empty_cache()
    pipe.send(_operations(work, device))


def _linear_flops(rows: torch.Size, weight: torch.Size, *others: Any, **more: Any) -> int:
    """Of a product with a prepacked weight, (outputs, inputs), which torch does not count."""
    return 2 * math.prod(rows) * weight[0]


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) * 1024


def _operations(work: Any, device: str) -> dict[str, float]:
    """The operations that take most of a run, with their shares of the time that all of them take together."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = "compiled code" if event.key.startswith("## Call Compiled") else event.key
        times[name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(times.values()) or 1.0  # nothing, where the work is another process's
    most = sorted(times, key=lambda name: times[name], reverse=True)[:8]
    return {name: round(times[name] / total, 4) for name in most}


def compare(title: str, jobs: list[Job], dtype: str, repeats: int, at_least: float) -> list[dict[str, Any]]:
    """All contestants, in turns: seconds, peak bytes of the process, the floating-point operations of its matrix
    products, convolutions and attention, and what else the time went to.

    Short works are repeated for `at_least` so many seconds.

    Raises:
        RuntimeError: if a contestant cannot be built or run.
    """
    context = multiprocessing.get_context("spawn")
    device, threads = "cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads()
    contests = []
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, job, dtype, device, threads))  # may start some itself
        process.start()
        theirs.close()
        contests.append((job, ours, process))
    try:
        flops = [_receive(pipe, job) for job, pipe, _ in contests]  # once all are ready
        seconds: list[list[float]] = [[] for _ in contests]
        peaks = [0] * len(contests)
        turns, begun = tqdm(desc=f"{title}, {dtype}"), time.perf_counter()
        while len(seconds[0]) < repeats or time.perf_counter() - begun < at_least:
            for number, (job, pipe, _) in enumerate(contests):
                pipe.send(True)
                taken, peaks[number] = _receive(pipe, job)
                seconds[number].append(taken)
            turns.update()
        operations = []
        for job, pipe, process in contests:
            pipe.send(False)
            operations.append(_receive(pipe, job))
            process.join()
    finally:
        for _, _, process in contests:
            process.terminate()  # where another could not go on
    return [
        {
            "contestant": job.contestant,
            "method": job.method,
            "dtype": dtype,
            "seconds": {"median": statistics.median(taken), "lowest": min(taken), "highest": max(taken), "all": taken},
            "times_the_first": times_of(taken, seconds[0]),
            "peak_bytes": peak,
            "flops": counted,
            "share_by_operation": shares,
        }
        for (job, *_), counted, taken, peak, shares in zip(contests, flops, seconds, peaks, operations, strict=True)
    ]


def _receive(pipe: Any, job: Job) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(
            f"{job.contestant}: {job.method} has ended: see its error above; without one, the memory did not suffice."
        ) from None


def times_of(some: list[float], others: list[float]) -> float:
    """The median ratio of the seconds of each turn."""
    return statistics.median(ratios_of(some, others))


def ratios_of(some: list[float], others: list[float]) -> list[float]:
    """The ratio of the seconds of each turn."""
    return [one / other for one, other in zip(some, others, strict=True)]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contestant of each work; no memory of one that works in another process.

    Behind the TFLOP/s stands their share of the device's peak, where that was given.
    """
    lines = [
        "| work | dtype | contestant | seconds (lowest to highest) | times the first | peak GB | TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in results:
        seconds, outside = entry["seconds"], entry["method"] == "cold_start"
        utilization = entry.get("model_flops_utilization")
        share = "" if utilization is None else f" ({utilization:.1%})"
        lines.append(
            f"| {entry['work']} | {entry['dtype']} | {entry['contestant']}: {entry['method']} "
            f"| {seconds['median']:.3g} ({seconds['lowest']:.3g} to {seconds['highest']:.3g}) "
            f"| {entry['times_the_first']:.2f} | {'' if outside else format(entry['peak_bytes'] / 1e9, '.1f')} "
            f"| {entry['flops'] / seconds['median'] / 1e12:.3g}{share} |"
        )
    return "\n".join(lines) + "\n"


def operations_table(results: list[dict[str, Any]]) -> str:
    """Markdown: the operations that take most of each contestant's time."""
    lines = ["| work | dtype | contestant | of the time of all operations |", "| --- | --- | --- | --- |"]
    for entry in results:
        most = list(entry["share_by_operation"].items())[:5]
        shares = ", ".join(f"`{name.rpartition('::')[2]}` {share:.0%}" for name, share in most)
        who = f"{entry['contestant']}: {entry['method']}"
        lines.append(f"| {entry['work']} | {entry['dtype']} | {who} | {shares} |")
    return "\n".join(lines) + "\n"


def goals_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each goal and dtype that was measured."""
    found = {(entry["work"], entry["contestant"], entry["method"], entry["dtype"]): entry for entry in results}
    lines = [
        "| work | who | than | dtype | times as fast (lowest to highest) | goal | times the memory | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for goal in GOALS:
        for dtype, faster in goal.faster.items():
            who = found.get((goal.work, *goal.who, dtype))
            others = [found[key] for name in goal.than if (key := (goal.work, *name, dtype)) in found]
            if who is None or not others:
                continue
            fastest = min(others, key=lambda entry: entry["seconds"]["median"])
            ratios = ratios_of(fastest["seconds"]["all"], who["seconds"]["all"])
            speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            memory = "" if goal.memory is None else f"{who['peak_bytes'] / fastest['peak_bytes']:.2f}"
            most = "" if goal.memory is None else f"{goal.memory:g}"
            lines.append(
                f"| {goal.work} | {': '.join(goal.who)} | {fastest['contestant']}: {fastest['method']} | {dtype} "
                f"| {speed} | {faster:.3g} | {memory} | {most} |"
            )
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A picture of how many times the first contestant's seconds each takes, a panel for each work."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((entry["work"], entry["dtype"]) for entry in results))
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 1 + 1.6 * rows), layout="constrained")
    for axes in (places := list(figure.subplots(rows, 2, squeeze=False).flat))[len(panels) :]:
        axes.remove()
    for axes, panel in zip(places, panels, strict=False):
        entries = [entry for entry in results if (entry["work"], entry["dtype"]) == panel][::-1]
        names = [f"{entry['contestant']}: {entry['method']}" for entry in entries]
        bars = axes.barh(names, [entry["times_the_first"] for entry in entries])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(1, color="grey", linewidth=0.5)
        axes.set_title(", ".join(panel), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=120)


def is_for_this_machine(method: str) -> bool:
    """Weights are prepacked on CPUs only."""
    return not (torch.cuda.is_available() and method.endswith("_prepacked"))


def choose(names: Iterable[str], parts: str) -> list[str]:
    """The names that hold one of these parts, with commas between; all, if there are none."""
    names = list(names)
    for part in parts.split(",") if parts else []:
        if not part or not any(part in name for name in names):
            raise typer.BadParameter(f"{part!r} is in no name; there are: {'; '.join(names)}.")
    return [name for name in names if not parts or any(part in name for part in parts.split(","))]


def code_digest() -> str:
    """Of the package and the scripts; each entry of a result has that of its own run."""
    code = hashlib.sha256()
    for file in sorted([*SCRIPTS.glob("*.py"), *(SCRIPTS.parent / "imageprompt").rglob("*.py")]):
        code.update(file.read_bytes())
    return code.hexdigest()


def circumstances(sizes: Sizes) -> dict[str, Any]:
    """What a result holds besides what was measured: all that it depends on but the code."""
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    threads = torch.get_num_threads()
    return {"sizes": asdict(sizes), "device": device, "threads": threads} | provenance()


def begin(circumstances: dict[str, Any], name: str, output: Path | None) -> dict[str, Any]:
    """The file to go on with, if there is one of the same circumstances; what is measured anew replaces the old."""
    if output is None or not output.exists():
        return circumstances | {name: []}
    found = json.loads(output.read_text())
    others = differences({key: found.get(key) for key in circumstances}, circumstances)
    if others or name not in found:
        reason = "; ".join(others) or f"no {name}"
        raise typer.BadParameter(f"{output} was measured with {reason}: name another file, or delete it.")
    return found


def put_in_place(old: list[Any], new: list[Any], place: Callable[[Any], int]) -> list[Any]:
    """All entries in the order of their places, in which new ones replace old."""
    taken = {place(entry) for entry in new}
    return sorted([entry for entry in old if place(entry) not in taken] + new, key=place)


def write(result: dict[str, Any], output: Path | None) -> None:
    """Keep what there is so far."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(result, indent=2) + "\n")


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results; a picture is beside it.")] = None,
    works: Annotated[str, typer.Option(help="Which, with commas between: parts of their names.")] = "",
    dtypes: Annotated[
        str, typer.Option(help="Which, with commas between: fp32, bf16; those of the machine by default.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Of each work and contestant, at least.")] = 5,
    at_least: Annotated[float, typer.Option(help="Seconds for which short works are repeated.")] = 15,
    large: Annotated[bool, typer.Option("--large", help="ViT-L/16 and GPT-2 medium, for a GPU.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: to see that all runs, not how fast.")] = False,
    peak_tflops: Annotated[float | None, typer.Option(help="Of the device, to say how much of it is used.")] = None,
) -> None:
    """Time all, write the results after each work, and print them. A file that there is already is gone on with."""
    sizes = QUICK if quick else LARGE if large else REFERENCE
    chosen = choose(DTYPES, dtypes) if dtypes else dtypes_of_this_machine()
    result = begin(circumstances(sizes), "runs", output)
    order = [(work, dtype) for work in WORKS for dtype in DTYPES]
    for work in choose(WORKS, works):
        for dtype in chosen:
            jobs = [Job(name, method, sizes) for name, method in WORKS[work] if is_for_this_machine(method)]
            code, found = code_digest(), compare(work, jobs, dtype, repeats, 0 if quick else at_least)
            runs = [{"work": work, "code": code} | entry for entry in found]
            for entry in runs if peak_tflops is not None else []:
                entry["model_flops_utilization"] = entry["flops"] / entry["seconds"]["median"] / 1e12 / peak_tflops
            result["runs"] = put_in_place(result["runs"], runs, lambda run: order.index((run["work"], run["dtype"])))
            write(result, output)
    if output is not None:
        draw(result["runs"], output.with_suffix(".png"))
    print(table(result["runs"]))
    print(operations_table(result["runs"]))
    print(goals_table(result["runs"]))


if __name__ == "__main__":
    typer.run(main)
