"""Accuracy of answers to questions: VQA's, where ten people answered, and plain equality elsewhere.

VQA's accuracy (Goyal et al., arXiv 1612.00837; rules at visualqa.org/evaluation.html) counts an answer as right as far
as three people gave it. Its normalisation is that of the official script, oddities included: answers on which all ten
people agree are compared as they are.
"""

import re
from collections.abc import Mapping, Sequence

from .references import check_references

PEOPLE = 10

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = {"a", "an", "the"}
# Words to which a forgotten apostrophe is given back.
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't "
    "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll "
    "who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
# The words above, by what they are without one of their apostrophes.
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED.split() for mark in re.finditer("'", word)
}


def normalize_answer(answer: str) -> str:
    """An answer as VQA compares it: in lower case, without articles and most punctuation, with digits for numbers."""
    # Beside a space, or where a comma stands between digits, punctuation goes; elsewhere a space comes in its place.
    number_with_comma = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or number_with_comma else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(candidates: Mapping[object, str], references: Mapping[object, Sequence[str]]) -> float:
    """VQA's accuracy (arXiv 1612.00837): min(people who said so / 3, 1), the mean over each nine of the ten people.

    Args:
        candidates: one answer for each question.
        references: the answers of ten people, for each question.

    Returns:
        The mean over the questions, a fraction.

    Raises:
        ValueError: if the questions differ, there are none, or one has not ten answers.
    """
    check_references(candidates, references, row="row", text="text")
    for question, answers in references.items():
        if len(answers) != PEOPLE:
            raise ValueError(f"VQA's accuracy needs the answers of {PEOPLE} people; {question!r} has {len(answers)}.")
    return sum(_agreement(candidates[question], references[question]) for question in references) / len(references)


def exact_match(candidates: Mapping[object, str], references: Mapping[object, Sequence[str]]) -> float:
    """The share of answers that equal one of the accepted ones, but for case and white space.

    Args:
        candidates: one answer for each question.
        references: the accepted answers, at least one for each question.

    Raises:
        ValueError: if the questions differ, there are none, or one has no accepted answer.
    """
    check_references(candidates, references, row="row", text="text")
    right = sum(
        plain(candidates[question]) in {plain(answer) for answer in references[question]} for question in references
    )
    return right / len(references)


def plain(text: str) -> str:
    """A text without what a comparison should not hang on: case, and white space around and within."""
    return " ".join(text.casefold().split())


def _agreement(candidate: str, answers: Sequence[str]) -> float:
    candidate, answers = " ".join(candidate.split()), [" ".join(answer.split()) for answer in answers]
    if len(set(answers)) > 1:
        candidate, answers = normalize_answer(candidate), [normalize_answer(answer) for answer in answers]
    same = [answer == candidate for answer in answers]
    return sum(min((sum(same) - one) / 3, 1) for one in same) / len(same)
