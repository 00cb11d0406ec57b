"""Ask a saved model about every row of a data set split, score its answers, and write scores, answers and pictures.

Run it as `imageprompt evaluate …` or `python scripts/evaluate.py …`. The answers go into a file beside the scores as
they come; the same command goes on where a stopped one was. Beside a captioner's score may stand that of the best
constant caption, one text for every image: a model that does not look scores no better.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pycocoevalcap.cider.cider import Cider
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from ..configuration import ImagePromptConfig
from ..cpu import prepack_weights
from ..data.rows import BrokenRow, Rows, read_rows
from ..data.sources import Source
from ..modeling import ImagePromptForConditionalGeneration
from ..options import spell_out_recipe
from ..processing import ImagePromptProcessor
from ..provenance import model_digests, model_folder, provenance
from .captions import caption_scores, java_caption_scores
from .learnt import find_learnt_rows
from .penn_treebank import tokenize_caption
from .pictures import save_confusion, save_grid
from .predictions import Predictions
from .tasks import ByLikelihood, Generated, Record, Settings, answer_rows, answered, images_of, make_task

logger = logging.get_logger(__name__)


@dataclass
class EvaluationArguments:
    """What to evaluate, how, and where the results go."""

    model: str = field(metadata={"help": "Saved model: a local folder or Hub id."})
    output: Path = field(metadata={"help": "JSON file for scores and settings; the answers go beside it."})
    task: Literal["caption", "vqa", "classify", "rank", "retrieval", "perplexity"] = field(
        default="caption",
        metadata={
            "help": "caption: BLEU, ROUGE-L, CIDEr; vqa: accuracy of answers; classify: the model writes the label; "
            "rank: the likeliest label; retrieval: texts for images and back; perplexity: of the references."
        },
    )
    split: str = field(default="test", metadata={"help": 'Such as test, or "test[:100]".'})
    batch_size: int = field(default=32, metadata={"help": "Rows at once; changes the speed only."})
    max_new_tokens: int = field(default=30, metadata={"help": "The longest generated answer."})
    num_beams: int = field(default=1, metadata={"help": "Beams of generation; 1 is greedy."})
    normalize: str = field(
        default="none",
        metadata={
            "help": "For rank and retrieval, what becomes of a log-likelihood: none, tokens (divided by them), text "
            "(minus that without the image); for retrieval also images (minus the mean over all)."
        },
    )
    java_metrics: bool = field(default=False, metadata={"help": "METEOR and SPICE of captions; they need Java."})
    constants: int = field(
        default=0, metadata={"help": "Score so many candidates for the best constant caption, drawn from train_split."}
    )
    train_split: str = field(default="train", metadata={"help": "Used with --constants."})
    captions: Path | None = field(default=None, metadata={"help": "Text file for the captions, one per line."})
    picture: Path | None = field(default=None, metadata={"help": "Picture of the first images with their answers."})
    picture_images: int = field(default=12)
    confusion_picture: Path | None = field(
        default=None, metadata={"help": "Picture of which classes are confused, of classify and rank."}
    )
    max_broken_rows: int = field(default=100, metadata={"help": "Leave out so many rows that cannot be read."})
    restart: bool = field(default=False, metadata={"help": "Begin anew, without the answers of an earlier run."})
    seed: int = field(default=0)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"`--batch_size` is at least 1, got {self.batch_size}.")
        for option, tasks in _OPTIONS_OF_TASKS.items():
            if getattr(self, option) and self.task not in tasks:
                raise ValueError(f"`--{option}` is for the task {' and '.join(tasks)}, not for {self.task!r}.")


_OPTIONS_OF_TASKS = {
    "java_metrics": ["caption"],
    "constants": ["caption"],
    "captions": ["caption"],
    "picture": ["caption", "vqa", "classify", "rank"],
    "confusion_picture": ["classify", "rank"],
}


def best_constant(
    candidates: Sequence[str], references: dict[int, list[str]], progress: bool = True
) -> tuple[str, dict[str, float]]:
    """The candidate with the highest CIDEr when it stands for every image, and its scores."""
    tokenized = {image: [tokenize_caption(text) for text in texts] for image, texts in references.items()}

    def cider(caption: str) -> float:
        return Cider().compute_score(tokenized, {image: [tokenize_caption(caption)] for image in tokenized})[0]

    best = max(tqdm(candidates, desc="constant captions", disable=not progress), key=cider)
    return best, caption_scores(dict.fromkeys(references, best), references)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (the command line by default), answer, score, and write the results."""
    parser = HfArgumentParser((EvaluationArguments, Source), description=__doc__, prog="imageprompt evaluate")
    args, source = parser.parse_args_into_dataclasses(spell_out_recipe(sys.argv[1:] if argv is None else argv))
    set_seed(args.seed)
    rows = read_rows(source, args.split, draw=False, max_broken=args.max_broken_rows)
    if args.picture and not source.has_images:
        raise ValueError("`--picture` shows images, and `--image_column none` says that there are none.")
    folder = model_folder(args.model)
    if learnt := find_learnt_rows(folder, source, args.split):
        logger.warning(
            f"{args.model} was trained on {learnt}. Rows of {args.split} (shuffle_rows {source.shuffle_rows}) are "
            "among them: the scores do not say how well it answers for new rows."
        )
    config = ImagePromptConfig.from_pretrained(folder)
    processor = ImagePromptProcessor.from_pretrained(folder)
    processor.check_model(config)
    settings = Settings(args.max_new_tokens, args.num_beams, args.normalize)
    task = make_task(args.task, rows, processor, settings)
    pool = _constant_captions(source, args) if args.constants else []

    if isinstance(task, Generated):
        decoding = {"do_sample": False, "max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    else:
        decoding = {"normalize": args.normalize}
    about = {
        "task": args.task,
        "decoding": decoding,
        "seed": args.seed,
        "model": model_digests(folder),
        "data_sha256": rows.fingerprint,
        "versions": provenance()["versions"],
    }
    if isinstance(task, ByLikelihood):
        about["candidates_sha256"] = hashlib.sha256(json.dumps(task.candidates).encode()).hexdigest()
    for path in filter(None, (args.output, args.captions, args.picture, args.confusion_picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    predictions = Predictions(
        args.output.with_suffix(".predictions.jsonl"),
        about,
        batch_size=args.batch_size,
        total=len(rows),
        restart=args.restart,
    )
    model = ImagePromptForConditionalGeneration.from_pretrained(folder, device_map="auto")
    prepack_weights(model, strict=False)
    for records in answer_rows(
        task, model, processor, batch_size=args.batch_size, done=predictions.records, progress=True
    ):
        predictions.add(records)

    records = answered(predictions.records)
    result = {
        **about,
        **task.score(records),
        "rows": len(records),
        "broken_rows": [record["broken"] for record in predictions.records if "broken" in record],
        "dataset_on_hub": source.on_hub,
        "settings": {name: _plain(value) for name, value in {**asdict(args), **asdict(source)}.items()},
        "device": model.device.type,
        **provenance(),
    }
    if args.task == "caption":
        if len(records) > 1 and result["distinct_captions"] == 1:
            caption = records[0]["answer"]
            logger.warning(
                f"All {len(records)} captions are equal ({caption!r}): the model does not look at its images yet."
            )
        answers = {record["row"]: record["answer"] for record in records}
        references = {record["row"]: record["references"] for record in records}
        if args.java_metrics:
            more, result["left_out"] = java_caption_scores(answers, references)
            result["scores"] |= more
        if args.constants:
            # Every distinct generated caption is one too: it is what the model finds likeliest.
            caption, scores = best_constant([*pool, *sorted(set(answers.values()))[: args.constants]], references)
            result["best_constant"] = {"caption": caption, "scores": scores}
    args.output.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_pictures(args, rows, records, result)
    print(json.dumps({key: result[key] for key in ("scores", "best_constant", "left_out") if key in result}, indent=2))


def _write_pictures(args: EvaluationArguments, rows: Rows, records: list[Record], result: dict[str, Any]) -> None:
    if args.captions:
        lines = [" ".join(record["answer"].split()) for record in records]
        args.captions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.picture:
        shown = [(images_of(rows[record["row"]]), record["answer"]) for record in records[: args.picture_images]]
        save_grid(
            [images[0] for images, _ in shown if images], [text for images, text in shown if images], args.picture
        )
    if args.confusion_picture:
        save_confusion(**result["confusion"], path=args.confusion_picture)


def _constant_captions(source: Source, args: EvaluationArguments) -> list[str]:
    """Captions of the training split, from all over it."""
    rows, captions = read_rows(source, args.train_split, draw=False), []
    for index in range(len(rows)):
        try:
            captions += [text.strip() for text in rows.texts(index)[1]]
        except BrokenRow:
            continue
    return captions[:: max(1, len(captions) // args.constants)]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
