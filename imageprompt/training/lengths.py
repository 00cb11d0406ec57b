"""Whether every training row fits into the language model, before hours of work find the one that does not."""

from contextlib import suppress

from ..data.rows import BrokenRow, Mixture, Rows, parts_of
from ..processing import ImagePromptProcessor


def check_lengths(rows: Rows | Mixture, processor: ImagePromptProcessor, max_length: int | None) -> None:
    """Refuse rows that would stop training when their turn comes.

    Args:
        max_length: answers are trimmed to so many tokens, prompt and images included; without it nothing is trimmed.

    Raises:
        ValueError: naming the first row with too many tokens, or with the placeholder of images in its texts.
    """
    for part in parts_of(rows):
        for index in range(len(part)):
            with suppress(BrokenRow):  # named and counted when it is read
                for prompt, suffixes in part.all_texts(index):
                    for suffix in suffixes:
                        _check(part, index, prompt, suffix, processor, max_length)


def _check(
    rows: Rows, index: int, prompt: str, suffix: str, processor: ImagePromptProcessor, max_length: int | None
) -> None:
    tokenizer, placeholder = processor.tokenizer, processor.image_token
    num_images, marks = rows.count_images(index), prompt.count(placeholder)
    if placeholder in suffix or (marks and marks != num_images):
        raise ValueError(
            f"{rows.name(index)}: {placeholder!r} stands for an image, of which the row has {num_images}, but its "
            f"texts are {prompt!r:.200} and {suffix!r:.200}."
        )
    in_images, limit = num_images * processor.num_image_tokens, max_length or tokenizer.model_max_length
    words = prompt.replace(placeholder, "")
    if in_images + len(words.encode()) + len(suffix.encode()) < limit:
        return  # a token is at least a byte
    before = in_images + len(tokenizer(words)["input_ids"])
    answer = len(tokenizer(suffix, add_special_tokens=False)["input_ids"]) + 1  # and the end of the text
    if before >= limit or (max_length is None and before + answer > limit):
        raise ValueError(
            f"{rows.name(index)} has {before} tokens before its answer ({processor.num_image_tokens} for each image) "
            f"and {answer} in it, more than "
            + (
                f"`--max_length` {max_length} leaves room for. Raise it, or shorten the prompt."
                if max_length is not None
                else f"the language model's {limit} positions. Shorten it, or trim with `--max_length {limit}`."
            )
        )
