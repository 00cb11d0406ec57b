"""What one more costs: time and memory against batch, image tokens, text length, images in a row, and photos.

    python scripts/scaling.py --output docs/speed/scaling.json

Each curve of `CURVES` changes one of the benchmark's sizes; its points take turns as the benchmark's contestants do. A
straight line is fitted to the medians: what is fixed, what each further unit costs in seconds and in bytes, and, beside
it, in floating-point operations, which explain most of it. A picture is drawn beside the file. `--quick` takes tiny
models, to see that all runs. The points of a curve are in memory together: in fp32 their values fit into 24 GB.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark import (
    Job,
    begin,
    choose,
    circumstances,
    code_digest,
    compare,
    is_for_this_machine,
    put_in_place,
    write,
)
from contestants import QUICK, REFERENCE, dtypes_of_this_machine


@dataclass(frozen=True)
class Curve:
    """Values of one of the sizes, and who does what at each."""

    size: str
    values: tuple[int, ...]
    series: tuple[tuple[str, str], ...]


PEERS = ("Llava", "EncoderDecoder")
_GENERATE = (
    ("OursPooled", "generate"),
    ("OursPooled", "generate_prepacked"),
    ("Llava", "generate"),
    ("EncoderDecoder", "generate"),
)
_TRAIN_AND_GENERATE = (("Ours", "train"), ("Ours", "generate"))
CURVES = {
    "rows that are learnt at once": Curve("batch", (1, 2, 4, 8), (("OursPooled", "train"),)),
    "images that are captioned at once": Curve("batch", (1, 8, 32, 64), _GENERATE),
    "tokens of an image": Curve("image_tokens", (1, 4, 49, 196), _TRAIN_AND_GENERATE),
    "tokens of a text": Curve("text_tokens", (8, 32, 128), (("OursPooled", "train"),)),
    "new tokens": Curve("new_tokens", (8, 16, 32, 64), (("OursPooled", "generate"),)),
    "images in a row": Curve("images", (1, 2, 4), (("OursPooled", "train"), ("OursPooled", "generate"))),
    "questions about one image": Curve("questions", (1, 4, 16, 64), (("Ours", "questions_together_behind_a_prefix"),)),
    "photos on the disk": Curve("files", (8, 16, 32), (("OursPooled", "caption_files"),)),
}


def line(values: tuple[int, ...], figures: list[float]) -> dict[str, float]:
    """The straight line through figures at values, by least squares, and the share of their variance that it leaves."""
    slope, fixed = statistics.linear_regression(values, figures)
    mean = statistics.mean(figures)
    left = sum((figure - fixed - slope * value) ** 2 for value, figure in zip(values, figures, strict=True))
    return {"fixed": fixed, "each": slope, "unexplained": left / (sum((f - mean) ** 2 for f in figures) or 1.0)}


def table(curves: list[dict[str, Any]]) -> str:
    """Markdown: a row for each series, with its first and last point and what each further unit costs."""
    lines = [
        "| one more of | contestant | seconds | ms each | variance left | peak GB | MB each | GFLOP each | GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve in curves:
        seconds, flops = curve["seconds"], curve["flops"]["each"]
        peaks = [point["peak_bytes"] / 1e9 for point in curve["points"]]
        times = [point["seconds"]["median"] for point in curve["points"]]
        values = f"{curve['values'][0]} to {curve['values'][-1]}"
        lines.append(
            f"| {curve['name']}, {values} | {curve['contestant']}: {curve['method']} "
            f"| {times[0]:.2f} to {times[-1]:.2f} | {1e3 * seconds['each']:.3g} | {seconds['unexplained']:.2%} "
            f"| {peaks[0]:.2f} to {peaks[-1]:.2f} | {curve['bytes']['each'] / 1e6:.3g} "
            f"| {flops / 1e9:.3g} | {flops / 1e9 / seconds['each']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def throughput(curves: list[dict[str, Any]]) -> str:
    """Markdown: images captioned in a second at each batch size, and at the best one."""
    chosen = [curve for curve in curves if curve["name"] == "images that are captioned at once"]
    if not chosen:
        return ""
    batches = chosen[0]["values"]
    rates = [[n / p["seconds"]["median"] for n, p in zip(batches, curve["points"], strict=True)] for curve in chosen]
    best_peer = max(max(own) for curve, own in zip(chosen, rates, strict=True) if curve["contestant"] in PEERS)
    lines = [f"| captions a second, batch of | {' | '.join(map(str, batches))} | best | times the best peer |"]
    lines.append(f"|{' --- |' * (len(batches) + 3)}")
    for curve, own in zip(chosen, rates, strict=True):
        figures = [*own, max(own), max(own) / best_peer]
        who = f"{curve['contestant']}: {curve['method']}"
        lines.append(f"| {who} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return "\n".join(lines) + "\n"


def draw(curves: list[dict[str, Any]], path: Path) -> None:
    """A picture: a row for each curve, seconds on the left, peak memory on the right."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve["name"] for curve in curves))
    figure = Figure(figsize=(10, 2.6 * len(names)), layout="constrained")
    for pair, name in zip(figure.subplots(len(names), 2, squeeze=False), names, strict=True):
        for curve in (curve for curve in curves if curve["name"] == name):
            label = f"{curve['contestant']}: {curve['method']}"
            pair[0].plot(curve["values"], [p["seconds"]["median"] for p in curve["points"]], "o-", label=label)
            pair[1].plot(curve["values"], [p["peak_bytes"] / 1e9 for p in curve["points"]], "o-")
        pair[0].legend(fontsize=7)
        for axes, what in zip(pair, ("seconds", "peak GB"), strict=True):
            axes.set(xlabel=name, ylabel=what, ylim=(0, None))
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results; a picture is beside it.")] = None,
    curves: Annotated[str, typer.Option(help="Which, with commas between: parts of their names.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; bf16 by default, if the machine has it.")] = "",
    repeats: Annotated[int, typer.Option(help="Of each point, at least.")] = 3,
    at_least: Annotated[float, typer.Option(help="Seconds for which short works are repeated.")] = 15,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: to see that all runs, not how fast.")] = False,
) -> None:
    """Measure all curves, write each when it is done, and print them. A file that there is already is gone on with."""
    sizes, dtype = QUICK if quick else REFERENCE, dtype or dtypes_of_this_machine()[-1]
    result = begin(circumstances(sizes) | {"dtype": dtype}, "curves", output)
    for name in choose(CURVES, curves):
        curve, found, code = CURVES[name], [], code_digest()
        values = (1, 4, 16) if quick else curve.values
        for contestant, method in filter(lambda pair: is_for_this_machine(pair[1]), curve.series):
            jobs = [Job(contestant, method, replace(sizes, **{curve.size: value})) for value in values]
            points = compare(f"{name}: {contestant}, {method}", jobs, dtype, repeats, 0 if quick else at_least)
            found.append(
                {
                    "name": name,
                    "code": code,
                    "size": curve.size,
                    "contestant": contestant,
                    "method": method,
                    "values": values,
                    "seconds": line(values, [point["seconds"]["median"] for point in points]),
                    "bytes": line(values, [point["peak_bytes"] for point in points]),
                    "flops": line(values, [point["flops"] for point in points]),
                    "points": points,
                }
            )
        result["curves"] = put_in_place(result["curves"], found, lambda entry: list(CURVES).index(entry["name"]))
        write(result, output)
    if output is not None:
        draw(result["curves"], output.with_suffix(".png"))
    print(table(result["curves"]))
    print(throughput(result["curves"]))


if __name__ == "__main__":
    typer.run(main)
