"""JSON files with a form of their own: captions as of COCO and of Karpathy, questions as of VQA."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def read_annotated(path: Path, image_root: Path, annotations: str | None) -> DatasetDict | None:
    """All splits of a JSON file in one of these forms; None for any other.

    Args:
        image_root: the folder in which VQA's images are looked for.
        annotations: the file of answers to a file of questions.

    Raises:
        ValueError: naming the file and the keys that were found, if an entry lacks one, or if there are no entries.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError:  # one object a line, or broken, as `datasets` will say
        return None
    if not content:
        raise ValueError(f"{path} has no rows.")
    if not isinstance(content, dict):
        return None
    images, questions = content.get("images"), content.get("questions")
    if _holds_objects(questions):
        splits = {"train": _vqa(path, questions, image_root, annotations)}
    elif _holds_objects(images) and "sentences" in images[0]:
        splits = _karpathy(path, images)
    elif _holds_objects(images) and isinstance(content.get("annotations"), list):
        splits = {"train": _coco(path, images, content["annotations"])}
    else:
        return None
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})


def _coco(path: Path, images: list[dict], annotations: list[dict]) -> list[dict[str, Any]]:
    """COCO's captions (arXiv 1504.00325): `image`, `image_id` and `captions`, the images without captions left out."""
    captions = defaultdict(list)
    for annotation in annotations:
        id, caption = _take(path, annotation, "image_id", "caption", mend="COCO's captions are in captions_….json.")
        captions[id].append(caption)
    files = dict(_take(path, image, "id", "file_name") for image in images)
    rows = [{"image": files[id], "image_id": id, "captions": texts} for id, texts in captions.items() if id in files]
    if not rows:
        raise ValueError(f"{path} has no captions of its images.")
    return rows


def _karpathy(path: Path, images: list[dict]) -> dict[str, list[dict[str, Any]]]:
    """Karpathy's JSON (arXiv 1412.2306) of COCO, Flickr8k and Flickr30k: `image` and `captions` for each split."""
    splits = defaultdict(list)
    for image in images:
        name, split, sentences = _take(path, image, "filename", "split", "sentences")
        file = "/".join(filter(None, (image.get("filepath"), name)))
        captions = [caption for sentence in sentences for caption in _take(path, sentence, "raw")]
        splits["validation" if split == "val" else split].append({"image": file, "captions": captions})
    return splits


def _vqa(path: Path, questions: list[dict], image_root: Path, annotations: str | None) -> list[dict[str, Any]]:
    """VQA's JSON (arXiv 1612.00837): `image`, `question`, the ten `answers` and the commonest, `answer`.

    A question names its image by number; the image is the file whose name ends with it.
    """
    files = {}
    for file in sorted(image_root.iterdir()):
        if number := re.search(r"(\d+)\.\w+$", file.name):
            files[int(number[1])] = file.name
    answers = {} if annotations is None else _read_answers(Path(annotations).expanduser())
    rows = []
    for entry in questions:
        mend = 'A table of your own is a list of objects, without {"questions": …} around it.'
        id, image_id, question = _take(path, entry, "question_id", "image_id", "question", mend=mend)
        image = files.get(image_id, f"image {image_id} in {image_root}")
        row = {"question_id": id, "image_id": image_id, "question": question, "image": image}
        if annotations is not None:
            row["answer"], row["answers"] = answers.get(id, (None, []))
        rows.append(row)
    return rows


def _read_answers(path: Path) -> dict[int, tuple[str | None, list[str]]]:
    """The commonest answer and all of them, by the number of the question."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    (entries,) = _take(path, content, "annotations", mend="`--annotations` names the file of answers.")
    found = {}
    for entry in entries:
        id, answers = _take(path, entry, "question_id", "answers")
        found[id] = (
            entry.get("multiple_choice_answer"),
            [text for each in answers for text in _take(path, each, "answer")],
        )
    return found


def _holds_objects(entries: Any) -> bool:
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], dict)


def _take(path: Path, entry: Any, *keys: str, mend: str = "") -> list[Any]:
    """The values of these keys."""
    found = list(entry) if isinstance(entry, dict) else []
    if missing := [key for key in keys if key not in found]:
        there = f"has only {', '.join(found)}" if found else f"is {entry!r:.100}"
        raise ValueError(f"{path}: an object without {', '.join(missing)}; it {there}. {mend}".strip())
    return [entry[key] for key in keys]
