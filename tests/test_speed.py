"""The tables of docs/speed.md, and the figures between them, are those of the committed files; what they lack is said."""

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
    return sum(run(work, who, method)["share_by_operation"].get(f"aten::{name}", 0) for name in operations)


def gigabytes(work: str, some: tuple[str, str], others: tuple[str, str]) -> float:
    """By how much one peak is above the other."""
    more, less = (run(work, *who)["peak_bytes"] for who in (some, others))
    return (more - less) / 1e9


def curve(name: str, who: str, method: str) -> dict[str, Any]:
    (found,) = [c for c in SCALING["curves"] if (c["name"], c["contestant"], c["method"]) == (name, who, method)]
    return found


STATEMENTS = [
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_figures_in_sentences_are_what_was_measured(statement):
    assert statement in SAID


def test_every_point_of_every_curve_was_measured():
    found = [(c["name"], c["size"], c["values"], (c["contestant"], c["method"])) for c in SCALING["curves"]]
    curves = scaling.CURVES.items()
    assert found == [(n, c.size, [*c.values], series) for n, c in curves for series in c.series]
    assert SCALING["sizes"] == vars(REFERENCE)
    assert all(SCALING[name] == FOUND[name] for name in ("device", "threads", "versions"))


def test_every_contestant_of_a_work_was_measured_at_the_sizes_of_reference():
    for work, dtype in {(run["work"], run["dtype"]) for run in RUNS}:
        found = [(run["contestant"], run["method"]) for run in RUNS if (run["work"], run["dtype"]) == (work, dtype)]
        assert found == benchmark.WORKS[work]
    assert FOUND["sizes"] == vars(REFERENCE)


def test_what_was_not_measured_is_said():
    works, dtypes = ({run[name] for run in RUNS} for name in ("work", "dtype"))
    missing = [name for name in benchmark.WORKS if name not in works] + [name for name in DTYPES if name not in dtypes]
    assert not missing or f"Not measured yet: {'; '.join(missing)}." in SAID


def test_the_training_page_says_what_compiling_brought():
    (ratio,) = {run["times_the_first"] for run in RUNS if run["method"] == "train_compiled"}
    assert f"a step then took {ratio:.2f} of the time" in (DOCS / "training.md").read_text()


def test_the_page_names_machine_and_versions():
    assert FOUND["device"] in PAGE
    assert all(f"{name} {FOUND['versions'][name]}" in PAGE for name in ("torch", "transformers"))
