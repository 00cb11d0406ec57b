"""Caption scores, equal to coco-caption's and without Java.

The scorers are pycocoevalcap's (the code behind the published COCO figures). Only its tokenizer, a Java program, is
replaced: by `penn_treebank.py`. METEOR and SPICE are Java programs themselves, and are apart.
"""

import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.spice import Spice

from .penn_treebank import tokenize_caption
from .references import check_references


def caption_scores(candidates: Mapping[object, str], references: Mapping[object, Sequence[str]]) -> dict[str, float]:
    """BLEU (Papineni et al., 2002), ROUGE-L (Lin, 2004) and CIDEr-D (arXiv 1411.5726) of captions.

    Args:
        candidates: one caption per image id.
        references: the captions that people wrote, per image id. CIDEr weighs words by how rare they are among all of
            these, so it depends on the whole set.

    Returns:
        `BLEU-1` … `BLEU-4`, `ROUGE-L` and `CIDEr`, as fractions (published tables often multiply by 100).

    Raises:
        ValueError: if the ids differ, an image has no reference, a caption is no text, or no reference has a word.
    """
    tokenized_references, tokenized_candidates = _tokenized(candidates, references)
    bleu, _ = Bleu(4).compute_score(tokenized_references, tokenized_candidates, verbose=0)
    rouge, _ = Rouge().compute_score(tokenized_references, tokenized_candidates)
    cider, _ = Cider().compute_score(tokenized_references, tokenized_candidates)
    scores = {f"BLEU-{n}": score for n, score in enumerate(bleu, start=1)} | {"ROUGE-L": rouge, "CIDEr": cider}
    return {name: float(score) for name, score in scores.items()}


def refuse_wordless(references: Collection[Sequence[str]]) -> None:
    """Raise a ValueError if no reference of any image has a word: CIDEr has nothing to weigh then."""
    if not any(tokenize_caption(text) for texts in references for text in texts):
        first = next(iter(references))[0]
        raise ValueError(f"No reference has a word; the first is {first!r}. Are they captions?")


def java_caption_scores(
    candidates: Mapping[object, str], references: Mapping[object, Sequence[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR 1.5 (Denkowski & Lavie, 2014) and SPICE (arXiv 1607.08822), as far as they run here.

    Nothing is downloaded: pycocoevalcap brings METEOR, but not the models of Stanford CoreNLP that SPICE needs.

    Args:
        candidates, references: as of [`caption_scores`].

    Returns:
        The scores, as fractions, and for each that is missing the reason.

    Raises:
        ValueError: as [`caption_scores`] does.
    """
    tokenized = _tokenized(candidates, references)
    scores: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, scorer, missing in (("METEOR", Meteor, None), ("SPICE", Spice, _missing_for_spice())):
        if shutil.which("java") is None:
            missing = "There is no `java` command."
        if missing is not None:
            left_out[name] = missing
            continue
        try:
            score, _ = scorer().compute_score(*tokenized)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            left_out[name] = f"Its Java program failed: {error}"
        else:
            scores[name] = float(score)
    return scores, left_out


def _missing_for_spice() -> str | None:
    package = find_spec("pycocoevalcap.spice")
    models = Path(package.origin).parent / "lib" / "stanford-corenlp-3.6.0-models.jar"
    if models.exists():
        return None
    return "Stanford CoreNLP's models are not there; `python -m pycocoevalcap.spice.get_stanford_models` fetches them."


def _tokenized(
    candidates: Mapping[object, str], references: Mapping[object, Sequence[str]]
) -> tuple[dict[object, list[str]], dict[object, list[str]]]:
    """References and candidates as the scorers take them."""
    check_references(candidates, references, row="image", text="caption")
    refuse_wordless(references.values())
    words = {text: tokenize_caption(text) for texts in (candidates.values(), *references.values()) for text in texts}
    # Texts may be such words already, as in coco-caption's demo. Then a stop that is left at an end is of its word.
    changed = [text for text in words if words[text] != text]
    if len(changed) < len(words) / 100 and all(words[text] == text.removesuffix(".") for text in changed):
        words = {text: text for text in words}
    return (
        {image: [words[text] for text in references[image]] for image in references},
        {image: [words[candidates[image]]] for image in references},
    )
