"""Whether candidates can be compared with references: what every score of texts asks first."""

from collections.abc import Mapping, Sequence


def check_references(
    candidates: Mapping[object, str], references: Mapping[object, Sequence[str]], *, row: str, text: str
) -> None:
    """Refuse what could not be scored.

    Args:
        candidates: one text for each id.
        references: at least one text for each id.
        row: what an id stands for, in messages.
        text: what a reference is called there.

    Raises:
        ValueError: if the ids differ, there are none, one has no reference, or what should be a text is none.
    """
    if set(candidates) != set(references):
        different = sorted(map(str, set(candidates) ^ set(references)))
        raise ValueError(f"Candidates and references are of different {row}s: {len(different)} ids, {different[:3]}…")
    if not candidates:
        raise ValueError("There is nothing to score: no candidates.")
    for name, candidate in candidates.items():
        if not isinstance(candidate, str):
            raise ValueError(f"A candidate is a text, empty if there is none; {row} {name!r} has {candidate!r}.")
    for name, texts in references.items():
        if isinstance(texts, str) or not texts or not all(isinstance(each, str) for each in texts):
            raise ValueError(f"References are lists of at least one {text}; {row} {name!r} has {texts!r:.200}.")
