"""What can be evaluated: for each task, what the model is asked for every row, and how the answers are scored.

A task looks at the texts of all rows before the model is loaded, and refuses what could not be scored.
`generated_metrics` runs a task on a model at hand, as training does between its epochs; `imageprompt evaluate` runs the
same tasks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.rows import BrokenRow, Rows, stop_if_too_many
from ..data.texts import separate
from ..decoding import evaluating
from ..generating import generate_texts
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from .captions import caption_scores, refuse_wordless
from .classification import classification_scores, number_labels
from .likelihood import EncodedPrompts
from .retrieval import retrieval_scores
from .vqa import PEOPLE, exact_match, vqa_accuracy

Record = dict[str, Any]


@dataclass
class Settings:
    """How a model answers.

    Args:
        max_new_tokens: the longest generated answer.
        num_beams: beams of generation; 1 is greedy.
        normalize: what becomes of a log-likelihood before texts are ranked by it: "none" (nothing), "tokens" (divided
            by the text's tokens), "text" (minus that of the same text without the image), "images" (minus its mean over
            all images).
    """

    max_new_tokens: int = 30
    num_beams: int = 1
    normalize: str = "none"

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError(
                f"`max_new_tokens` and `num_beams` are at least 1, got {self.max_new_tokens} and {self.num_beams}."
            )


@dataclass
class Texts:
    """The texts of a row: its prompt and its references, or why it cannot be used."""

    row: int
    prompt: str = ""
    references: tuple[str, ...] = ()
    broken: BrokenRow | None = None


class Task(ABC):
    """Asks the model for every row, and scores the answers.

    Args:
        rows: their texts are read here, their images when the model is asked.
        settings: how the model answers.

    Raises:
        ValueError: if texts or settings do not fit the task, or too many rows have no texts.
    """

    name: str
    normalizations: tuple[str, ...] = ("none",)

    def __init__(self, rows: Rows, settings: Settings):
        if settings.normalize not in self.normalizations:
            raise ValueError(
                f"For the task {self.name!r}, `normalize` is one of {', '.join(self.normalizations)}, not "
                f"{settings.normalize!r}."
            )
        if not len(rows):
            raise ValueError(f"{rows.source.dataset} has no rows to evaluate on.")
        self.rows, self.settings = rows, settings
        self.texts = [self._read(index) for index in range(len(rows))]
        self.usable = [texts for texts in self.texts if texts.broken is None]
        broken = [texts.broken for texts in self.texts if texts.broken is not None]
        if len(broken) > rows.max_broken or not self.usable:
            stop_if_too_many(len(broken), rows.max_broken, len(rows), broken[-1])

    def _read(self, index: int) -> Texts:
        try:
            prompt, references = self.rows.texts(index)
        except BrokenRow as error:
            return Texts(index, broken=error)
        return Texts(index, prompt, tuple(text.strip() for text in references))

    def check_lengths(self, processor: ImagePromptProcessor) -> None:
        """Refuse rows that would not fit into the language model's positions.

        Raises:
            ValueError: naming the first such row.
        """
        tokenizer, image = processor.tokenizer, processor.image_token
        counts = _token_counts(processor, (texts.prompt for texts in self.usable), special=True)
        behind = self.longest_answers(processor)
        for texts, answer in zip(self.usable, behind, strict=True):
            in_front = 0 if image in texts.prompt or not self.rows.source.has_images else processor.num_image_tokens
            before = counts[texts.prompt] + in_front
            if not before:
                raise ValueError(
                    f"{self.rows.name(texts.row)} has neither image nor prompt to begin with: pass "
                    f"`--prompt {tokenizer.eos_token!r}`."
                )
            if before + answer > tokenizer.model_max_length:
                raise ValueError(
                    f"{self.rows.name(texts.row)} has {before} tokens before its answer "
                    f"({processor.num_image_tokens} for each image) and up to {answer} in it: more than the language "
                    f"model's {tokenizer.model_max_length} positions. Shorten the texts"
                    + (", or lower `max_new_tokens`." if isinstance(self, Generated) else ".")
                )

    @abstractmethod
    def longest_answers(self, processor: ImagePromptProcessor) -> list[int]:
        """Tokens behind the prompt of each usable row."""

    @abstractmethod
    def answer(
        self,
        model: ImagePromptForConditionalGeneration,
        processor: ImagePromptProcessor,
        images: list[list[Any]],
        texts: list[Texts],
    ) -> list[Record]:
        """What the model says of each row, given its images and texts."""

    @abstractmethod
    def score(self, records: Sequence[Record]) -> dict[str, Any]:
        """`scores`, a number for each name, and what else there is to tell, from the records of answered rows."""


class Generated(Task):
    """The model writes its answer."""

    def longest_answers(self, processor):
        return [self.settings.max_new_tokens] * len(self.usable)

    def answer(self, model, processor, images, texts):
        prompts = [each.prompt for each in texts]
        settings = {"max_new_tokens": self.settings.max_new_tokens, "num_beams": self.settings.num_beams}
        answers = generate_texts(model, processor, images, prompts, batch_size=len(images), do_sample=False, **settings)
        return [{"answer": answer} for answer in answers]


class Caption(Generated):
    """A caption beside those that people wrote."""

    name = "caption"

    def __init__(self, rows: Rows, settings: Settings):
        super().__init__(rows, settings)
        refuse_wordless([texts.references for texts in self.usable])

    def score(self, records):
        answers = [record["answer"] for record in records]
        references = [record["references"] for record in records]
        scores = caption_scores(dict(enumerate(answers)), dict(enumerate(references)))
        return {"scores": scores, "distinct_captions": len(set(answers))}


class ShortAnswer(Generated):
    """An answer that is right if it equals a reference, so the model must be able to write one in full."""

    def check_lengths(self, processor):
        super().check_lengths(processor)
        texts = (separate(each.prompt, text) for each in self.usable for text in each.references)
        counts = _token_counts(processor, texts)
        for each in self.usable:
            shortest = min(counts[separate(each.prompt, text)] for text in each.references)
            if shortest > self.settings.max_new_tokens:
                raise ValueError(
                    f"{self.rows.name(each.row)} has no answer of fewer than {shortest} tokens "
                    f"({each.references[0]!r:.200}): `max_new_tokens` {self.settings.max_new_tokens} is too small."
                )


class Vqa(ShortAnswer):
    """An answer beside those of ten people, or beside the accepted ones."""

    name = "vqa"

    def __init__(self, rows: Rows, settings: Settings):
        super().__init__(rows, settings)
        counts = {len(texts.references): texts.row for texts in self.usable}
        if PEOPLE in counts and len(counts) > 1:
            other = next(count for count in counts if count != PEOPLE)
            raise ValueError(
                f"{self.rows.name(counts[PEOPLE])} has {PEOPLE} answers, {self.rows.name(counts[other])} has {other}: "
                f"VQA's accuracy needs those of {PEOPLE} people for each question and cannot be mixed with exact "
                "match. Evaluate the rows apart."
            )

    def score(self, records):
        answers = {record["row"]: record["answer"] for record in records}
        references = {record["row"]: record["references"] for record in records}
        if all(len(people) == PEOPLE for people in references.values()):
            return {"scores": {"vqa_accuracy": vqa_accuracy(answers, references)}}
        return {"scores": {"exact_match": exact_match(answers, references)}}


class Labelled(Task):
    """Rows with one label each."""

    def __init__(self, rows: Rows, settings: Settings):
        super().__init__(rows, settings)
        for texts in self.usable:
            if len(texts.references) != 1:
                raise ValueError(
                    f"{self.rows.name(texts.row)} has {len(texts.references)} references; the task "
                    f"{self.name!r} takes one label for each row."
                )
        names = self.rows.class_names or sorted({texts.references[0] for texts in self.usable})
        self.labels = [name.strip() for name in names]
        number_labels(self.labels, (texts.references[0] for texts in self.usable))

    def score(self, records):
        truth = [record["references"][0] for record in records]
        return classification_scores(truth, [record["answer"] for record in records], self.labels)


class Classify(Labelled, ShortAnswer):
    """The model writes the label."""

    name = "classify"


class ByLikelihood(Task):
    """The model says how likely each of the same candidate texts is."""

    normalizations = ("none", "tokens", "text")
    candidates: list[str]

    def __init__(self, rows: Rows, settings: Settings):
        super().__init__(rows, settings)
        self._without_image: dict[str, torch.Tensor] = {}

    def longest_answers(self, processor):
        # With a space in front, as behind a prompt, and the end-of-text token.
        counts = _token_counts(processor, (f" {text}" for text in self.candidates))
        return [1 + max(counts.values())] * len(self.usable)

    def candidate_scores(self, model, processor, images, texts) -> torch.Tensor:
        """(rows, candidates), higher is better."""
        prompts = [each.prompt for each in texts]
        scores = self._log_likelihoods(EncodedPrompts(model, processor, images, prompts), prompts)
        if self.settings.normalize == "text":
            for prompt in set(prompts) - self._without_image.keys():
                words = prompt.replace(processor.image_token, "") or processor.tokenizer.eos_token
                (self._without_image[prompt],) = self._log_likelihoods(
                    EncodedPrompts(model, processor, [[]], [words]), [prompt]
                )
            scores = scores - torch.stack([self._without_image[prompt] for prompt in prompts])
        return scores

    def _log_likelihoods(self, encoded: EncodedPrompts, prompts: list[str]) -> torch.Tensor:
        columns = []
        for text in tqdm(self.candidates, desc="texts", leave=False, disable=len(self.candidates) < 100):
            values, tokens, _ = encoded.score([separate(prompt, text) for prompt in prompts])
            columns.append(values / tokens if self.settings.normalize == "tokens" else values)
        return torch.stack(columns, dim=1).cpu()


class Rank(ByLikelihood, Labelled):
    """The likeliest of the labels."""

    name = "rank"

    def __init__(self, rows: Rows, settings: Settings):
        super().__init__(rows, settings)
        self.candidates = self.labels

    def answer(self, model, processor, images, texts):
        scores = self.candidate_scores(model, processor, images, texts)
        best = [self.labels[index] for index in scores.argmax(1)]
        return [
            {"answer": label, "label_scores": dict(zip(self.labels, row, strict=True))}
            for label, row in zip(best, scores.tolist(), strict=True)
        ]


class Retrieval(ByLikelihood):
    """The texts of all rows, ranked for each image, and the images for each text."""

    name = "retrieval"
    normalizations = ("none", "tokens", "text", "images")

    def __init__(self, rows: Rows, settings: Settings):
        super().__init__(rows, settings)
        if not self.rows.source.has_images:
            raise ValueError("The task 'retrieval' needs images: name their column with `--image_column`.")
        # A text that several images have is one text, and right for each of them.
        self.candidates = list(dict.fromkeys(text for texts in self.usable for text in texts.references))

    def answer(self, model, processor, images, texts):
        return [{"text_scores": row} for row in self.candidate_scores(model, processor, images, texts).tolist()]

    def score(self, records):
        scores = torch.tensor([record["text_scores"] for record in records], dtype=torch.float64)
        matches = torch.tensor([[text in record["references"] for text in self.candidates] for record in records])
        kept = matches.any(0)  # not the texts of images that could not be read
        scores, matches = scores[:, kept], matches[:, kept]
        if self.settings.normalize == "images":
            scores = scores - scores.mean(0)
        return {"scores": retrieval_scores(scores, matches), "images": len(scores), "texts": scores.shape[1]}


class Perplexity(Task):
    """How well the model expects the references."""

    name = "perplexity"

    def longest_answers(self, processor):
        texts = (separate(each.prompt, text) for each in self.usable for text in each.references)
        counts = _token_counts(processor, texts)
        return [1 + max(counts[separate(each.prompt, text)] for text in each.references) for each in self.usable]

    def answer(self, model, processor, images, texts):
        encoded = EncodedPrompts(model, processor, images, [each.prompt for each in texts])
        records: list[Record] = [{"log_likelihoods": [], "tokens": []} for _ in texts]
        for number in range(max(len(each.references) for each in texts)):
            # Rows with fewer references score their last one again, which is not kept.
            suffixes = [separate(each.prompt, (each.references[number:] or each.references[-1:])[0]) for each in texts]
            values, tokens, _ = encoded.score(suffixes)
            for record, each, value, count in zip(records, texts, values.tolist(), tokens.tolist(), strict=True):
                if number < len(each.references):
                    record["log_likelihoods"].append(value)
                    record["tokens"].append(count)
        return records

    def score(self, records):
        tokens = sum(sum(record["tokens"]) for record in records)
        nats = -math.fsum(value for record in records for value in record["log_likelihoods"]) / tokens
        return {"scores": {"perplexity": math.exp(nats), "nats_per_token": nats}, "tokens": tokens}


TASKS: dict[str, type[Task]] = {task.name: task for task in (Caption, Vqa, Classify, Rank, Retrieval, Perplexity)}


def make_task(name: str, rows: Rows, processor: ImagePromptProcessor, settings: Settings) -> Task:
    """A task with everything checked that can be checked without a model.

    Raises:
        ValueError: if there is no such task, or rows or settings do not fit it.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
    task = TASKS[name](rows, settings)
    task.check_lengths(processor)
    return task


def answer_rows(
    task: Task,
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    *,
    batch_size: int,
    done: Sequence[Record] = (),
    progress: bool = False,
) -> Iterator[list[Record]]:
    """The records of the rows that follow those done, batch by batch, in the rows' order.

    A record holds `row` (its number), `name`, `prompt`, `references` and what the task answers; that of a row that
    cannot be read holds `row`, `name` and `broken`, the reason.

    Raises:
        ValueError: if more rows are broken than `task.rows.max_broken`, or all.
    """
    broken = sum("broken" in record for record in done)
    total = len(task.texts)
    with tqdm(total=total, initial=len(done), desc=task.name, unit="row", disable=not progress) as bar:
        for start in range(len(done), total, batch_size):
            records: list[Record] = []
            images: list[list[Any]] = []
            for index in range(start, min(start + batch_size, total)):
                texts = task.texts[index]
                record = {"row": index, "name": task.rows.name(index)}
                try:
                    if texts.broken is not None:
                        raise texts.broken
                    row = task.rows[index]
                except BrokenRow as error:
                    broken += 1
                    stop_if_too_many(broken, task.rows.max_broken, total, error)
                    records.append(record | {"broken": str(error)})
                else:
                    images.append(images_of(row))
                    records.append(record | {"prompt": texts.prompt, "references": list(texts.references)})
            readable = [record for record in records if "broken" not in record]
            if readable:
                with evaluating(model):
                    answers = task.answer(model, processor, images, [task.texts[record["row"]] for record in readable])
                for record, answer in zip(readable, answers, strict=True):
                    record |= answer
            yield records
            bar.update(len(records))


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images of a row: several, one or none."""
    return row["images"] if "images" in row else [row["image"]] if "image" in row else []


def answered(records: Iterable[Record]) -> list[Record]:
    """The records without those of broken rows."""
    return [record for record in records if "broken" not in record]


def generated_metrics(
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    rows: Rows,
    task: str,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 30,
    num_beams: int = 1,
) -> dict[str, float]:
    """The scores of a model on a task, as `imageprompt evaluate` measures them; writes no file.

    Args:
        rows: with references, from `read_rows(…, draw=False)`.
        task: "caption", "vqa", "classify", "rank", "retrieval" or "perplexity".
        batch_size: rows that are answered at once.
        max_new_tokens: the longest generated answer.
        num_beams: beams of generation; 1 is greedy.

    Returns:
        A number for each name, such as `CIDEr` or `accuracy`. The model is left in the mode in which it was.

    Raises:
        ValueError: if the rows do not fit the task, or too many are broken.
    """
    made = make_task(task, rows, processor, Settings(max_new_tokens=max_new_tokens, num_beams=num_beams))
    batches = answer_rows(made, model, processor, batch_size=batch_size)
    return made.score(answered(record for batch in batches for record in batch))["scores"]


def _token_counts(processor: ImagePromptProcessor, texts: Iterable[str], special: bool = False) -> dict[str, int]:
    """How many tokens each of the texts has, image tokens included."""
    distinct = list(dict.fromkeys(texts))
    encoded = processor.tokenizer(distinct, add_special_tokens=special)["input_ids"]
    more = processor.num_image_tokens - 1
    return {
        text: len(ids) + more * ids.count(processor.image_token_id) for text, ids in zip(distinct, encoded, strict=True)
    }
