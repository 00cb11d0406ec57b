"""Captions for folders of any size, written as they come, into a file that a stopped run goes on with.

It is a JSON lines file with an object for each image, `image` and `caption`, or `image` and `error` for one that cannot
be read, which a later run tries again. Beside it, `about.json` behind its name says which model wrote it, and how.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from .cpu import prepack_weights
from .folders import write_whole
from .generating import default_length, stream_texts
from .modeling import ImagePromptForConditionalGeneration
from .processing import ImagePromptProcessor
from .provenance import differences, model_digests, model_folder, provenance


class Captioned(NamedTuple):
    """How many images have a caption in the file, and how many could not be read."""

    captions: int
    errors: int


def caption_images(
    model: str,
    images: Sequence[str],
    output: Path,
    prompt: str = "",
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    dtype: str = "auto",
    progress: bool = False,
    **generation: Any,
) -> Captioned:
    """Caption the images that a file has no caption of yet.

    Args:
        model: saved model: a local folder or Hub id.
        images: files or URLs.
        output: JSON lines file, new or of an earlier call with the same model and settings.
        prompt: text before every caption.
        batch_size, num_workers: as of [`stream_texts`].
        dtype: in which the model computes: "float32", "bfloat16", "float16"; "auto", as it was saved.
        progress: show a bar.
        generation: of `generate`; the model's own settings by default, or 30 new tokens.

    Raises:
        ValueError: before any work, if the file is of another model or other settings, which are named, or of none.
    """
    folder = model_folder(model)
    about = {
        "model": model_digests(folder),
        "prompt": prompt,
        "dtype": dtype,
        "generation": generation,
        "versions": provenance()["versions"],
    }
    done = _captions_of(output, about)
    images = [image for image in dict.fromkeys(images) if image not in done]
    processor = ImagePromptProcessor.from_pretrained(folder)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map="auto")
    processor.check_model(loaded)
    prepack_weights(loaded, strict=False)
    settings = default_length(loaded, generation)
    captions, errors = len(done), 0
    with output.open("a", encoding="utf-8") as file, tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for number, answer in stream_texts(
            loaded, processor, images, prompt, batch_size=batch_size, num_workers=num_workers, **settings
        ):
            is_error = isinstance(answer, ValueError)
            file.write(_line({"image": images[number], "error" if is_error else "caption": str(answer)}))
            file.flush()
            captions, errors = captions + (not is_error), errors + is_error
            bar.update()
    return Captioned(captions, errors)


def _captions_of(output: Path, about: dict[str, Any]) -> set[str]:
    """The images that have a caption in the file, from which all else is taken out."""
    origin, about = output.with_name(f"{output.name}.about.json"), json.loads(json.dumps(about))
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        origin.write_text(json.dumps(about, indent=2) + "\n")
        output.touch()
        return set()
    if not origin.exists():
        raise ValueError(f"{output} is there already and no captions of imageprompt's: name another --output.")
    if different := differences(json.loads(origin.read_text()), about):
        raise ValueError(
            f"{output} was written otherwise, with {'; '.join(different)}. Name another --output, or delete that one."
        )
    # What stands behind the last line's end was being written when the run was stopped.
    lines = output.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        records = [record for record in (dict(json.loads(line)) for line in lines) if "caption" in record]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{output} has a line that is no JSON object ({error}): mend it, or delete it.") from error
    write_whole(output, "".join(map(_line, records)))
    return {record["image"] for record in records}


def _line(record: dict[str, str]) -> str:
    # A file's name need not be UTF-8: Python has other bytes as surrogates, which JSON writes as "\udce9".
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"
