"""Tables and figures of docs/speed.md are those of the committed files, and what these lack is said."""

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest
import scaling
from contestants import DTYPES, REFERENCE

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "speed.md").read_text()
SAID = " ".join(PAGE.split())
FOUND = json.loads((DOCS / "speed" / "benchmark.json").read_text())
RUNS = FOUND["runs"]
SCALING = json.loads((DOCS / "speed" / "scaling.json").read_text())


@pytest.mark.parametrize("make", [benchmark.table, benchmark.operations_table, benchmark.goals_table])
def test_tables_are_what_was_measured(make):
    assert make(RUNS) in PAGE


@pytest.mark.parametrize("make", [scaling.table, scaling.throughput])
def test_what_one_more_costs_is_what_was_measured(make):
    assert make(SCALING["curves"]) in PAGE


def run(work: str, who: str, method: str) -> dict[str, Any]:
    (found,) = [r for r in RUNS if (r["work"], r["contestant"], r["method"]) == (work, who, method)]
    return found


def seconds(work: str, who: str, method: str) -> float:
    return run(work, who, method)["seconds"]["median"]


def times(work: str, some: tuple[str, str], others: tuple[str, str]) -> float:
    """The median ratio of their seconds."""
    return benchmark.times_of(*(run(work, *who)["seconds"]["all"] for who in (some, others)))


def share(work: str, who: str, method: str, *operations: str) -> float:
    """Of the time of all operations."""
    shares = run(work, who, method)["share_by_operation"]
    return sum(value for name, value in shares.items() if name.rpartition("::")[2] in operations)


def gigabytes(work: str, some: tuple[str, str], others: tuple[str, str]) -> float:
    """By how much one peak is above the other."""
    more, less = (run(work, *who)["peak_bytes"] for who in (some, others))
    return (more - less) / 1e9


def curve(name: str, who: str, method: str) -> dict[str, Any]:
    (found,) = [c for c in SCALING["curves"] if (c["name"], c["contestant"], c["method"]) == (name, who, method)]
    return found


def tera(work: str, who: str, method: str) -> str:
    return f"{run(work, who, method)['flops'] / 1e12:.2f}"


def pace(name: str, who: str, method: str) -> str:
    """GFLOP/s of one more."""
    found = curve(name, who, method)
    return f"{found['flops']['each'] / found['seconds']['each'] / 1e9:.0f}"


def best(who: str, method: str) -> float:
    """Captions a second at the best batch size."""
    found = curve("images that are captioned at once", who, method)
    return max(n / point["seconds"]["median"] for n, point in zip(found["values"], found["points"], strict=True))


def each(who: str, method: str) -> float:
    """GFLOP of one more image that is captioned."""
    return curve("images that are captioned at once", who, method)["flops"]["each"] / 1e9


OURS, POOLED, PEER = ("Ours", "train"), ("OursPooled", "train"), ("EncoderDecoder", "train")
ALL, QUARTER, FROZEN = "train, all image tokens", "train, a quarter of the tokens", "train, a frozen tower"
LOGITS, GELU, FLOOR = "train, logits where there are labels", "train, GELU as one operation", "train, and the floor"
LENGTHS, FILES = "train, texts of unlike length", "a training batch, and its making from files"
DECODE, GENERATE, QUESTIONS = "decode a token", "generate", "questions about one image"
TOGETHER = "questions_together_behind_a_prefix"
PADDED, PACKED, GROUPED = (("OursLongText", f"train_{how}") for how in ("padded", "packed", "grouped"))
PIXELS = [entry["ratio"] for entry in json.loads((DOCS / "preprocessing" / "benchmark.json").read_text())["results"]]
POSITION = REFERENCE.text_layers * 2 * REFERENCE.text_width * 4  # bytes that the cache has of one, in fp32
STATEMENTS = [
    f"{tera(QUARTER, *PEER)} against {tera(QUARTER, *POOLED)} TFLOP",
    f"{tera(FROZEN, 'EncoderDecoder', 'train_frozen')} against {tera(FROZEN, 'OursPooled', 'train_frozen')} TFLOP, or "
    f"with features {tera(FROZEN, 'OursPooled', 'train_frozen_from_features')}.",
    f"would be {times(QUARTER, PEER, ('GemmsPooled', 'train')):.2f} times as fast as that peer",
    f"{best('OursPooled', 'generate_prepacked'):.2f} captions a second with prepacked weights, against "
    f"{best('EncoderDecoder', 'generate'):.2f} of VisionEncoderDecoder",
    f"{best('OursPooled', 'generate_prepacked') / best('EncoderDecoder', 'generate'):.2f} times as fast; the goal",
    f"{each('OursPooled', 'generate'):.1f} against {each('EncoderDecoder', 'generate'):.1f} GFLOP",
    f"`cat` takes {share(QUESTIONS, 'Ours', TOGETHER, 'cat'):.0%} of the time, and "
    f"{share(QUESTIONS, 'Ours', f'{TOGETHER}_prepacked', 'cat'):.0%} with prepacked weights",
    f"Reading the same bytes takes {seconds(DECODE, 'Bandwidth', 'decode'):.3f} seconds",
    f"{min(PIXELS):.2f} to {max(PIXELS):.2f} of the time of timm's transform",
    f"from files takes {times(FILES, ('OursPooled', 'load_photos'), POOLED):.1%} of the time of a step",
    f"about {run(FLOOR, 'Gemms', 'train')['flops'] / seconds(FLOOR, 'Gemms', 'train') / 1e9:.0f} GFLOP/s",
    f"takes {POSITION / 1e3:.0f} kB (keys and values of 12 layers), an image's 82 positions "
    f"{82 * POSITION / 1e6:.0f} MB",
    f"for eight rows at {pace('new tokens', 'OursPooled', 'generate')} GFLOP/s",
    f"196 positions take {196 * POSITION / 1e6:.0f} MB",
    f"take {times(LOGITS, ('Ours', 'train_all_logits'), OURS):.2f} times as long, and "
    f"{gigabytes(LOGITS, ('Ours', 'train_all_logits'), OURS):.1f} GB more",
    f"`mul`, {share(GELU, 'Ours', 'train_gelu_in_eight', 'mul'):.0%} of the time before, is gone, and with it "
    f"{gigabytes(GELU, ('Ours', 'train_gelu_in_eight'), OURS):.1f} GB",
    f"were {share(DECODE, 'Ours', 'decode', 'addmm', 'mm'):.0%} of a step of {seconds(DECODE, 'Ours', 'decode'):.3f} "
    f"seconds; what replaces them is {share(DECODE, 'Ours', 'decode_prepacked', '_linear_pointwise'):.0%} of "
    f"{seconds(DECODE, 'Ours', 'decode_prepacked'):.3f}",
    f"takes {times(FLOOR, OURS, ('Gemms', 'train')):.2f} times as long as its matrix products alone",
    f"`--pack_length 512` takes {times(LENGTHS, PACKED, PADDED):.2f} of the time, one of texts grouped by length "
    f"{times(LENGTHS, GROUPED, PADDED):.2f}",
    f"takes {times(DECODE, ('Ours', 'decode_static'), ('Ours', 'decode')):.2f} of the time, and all of `generate` "
    f"{times(GENERATE, ('OursPooled', 'generate_static'), ('OursPooled', 'generate')):.2f}",
    f"it is {times(GENERATE, ('OursPooled', 'generate_compiled'), ('OursPooled', 'generate')):.2f}, after minutes",
    f"are at {times(GENERATE, ('OursPooled', 'generate_prepacked'), ('OursPooled', 'generate')):.2f}",
    f"on two cores: {times(QUARTER, ('OursPooled', 'train_compiled'), POOLED):.2f} of the time",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_figures_in_sentences_are_what_was_measured(statement):
    assert statement in SAID


def test_every_point_of_a_curve_was_measured():
    found = [(c["name"], c["size"], c["values"], (c["contestant"], c["method"])) for c in SCALING["curves"]]
    curves = [(name, c) for name, c in scaling.CURVES.items() if name in {entry[0] for entry in found}]
    assert found == [(name, c.size, [*c.values], series) for name, c in curves for series in c.series]
    assert SCALING["sizes"] == vars(REFERENCE)
    assert all(SCALING[name] == FOUND[name] for name in ("device", "threads", "versions"))


def test_every_contestant_of_a_work_was_measured_at_the_sizes_of_reference():
    for work, dtype in {(run["work"], run["dtype"]) for run in RUNS}:
        found = [(run["contestant"], run["method"]) for run in RUNS if (run["work"], run["dtype"]) == (work, dtype)]
        assert found == benchmark.WORKS[work]
        assert len({run["code"] for run in RUNS if (run["work"], run["dtype"]) == (work, dtype)}) == 1
    assert FOUND["sizes"] == vars(REFERENCE)


def test_what_was_not_measured_is_said():
    works, dtypes = ({run[name] for run in RUNS} for name in ("work", "dtype"))
    curves = {curve["name"] for curve in SCALING["curves"]}
    wanted = ((benchmark.WORKS, works), (DTYPES, dtypes), (scaling.CURVES, curves))
    missing = [name for names, found in wanted for name in names if name not in found]
    assert not missing or f"Not measured yet: {'; '.join(missing)}." in SAID


def test_the_readme_says_what_was_measured():
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    memory = run(ALL, *OURS)["peak_bytes"] / run(ALL, "Llava", "train")["peak_bytes"]
    faster = times(ALL, ("Llava", "train"), OURS)
    assert f"a training step {faster:.2f} times as fast as LLaVA's in {memory:.2f} of its memory" in readme
    captions = times(GENERATE, ("EncoderDecoder", "generate"), ("OursPooled", "generate_prepacked"))
    assert f"captions (with prepacked weights) {captions:.2f} times as fast as VisionEncoderDecoder's" in readme


def test_the_training_page_says_what_compiling_brought():
    (ratio,) = {run["times_the_first"] for run in RUNS if run["method"] == "train_compiled"}
    assert f"a step then took {ratio:.2f} of the time" in (DOCS / "training.md").read_text()


def test_the_page_names_machine_and_versions():
    assert FOUND["device"] in PAGE
    assert all(f"{name} {FOUND['versions'][name]}" in PAGE for name in ("torch", "transformers"))
