"""Caption a data set split with a saved model, score the captions, and write scores, captions and a picture.

Beside the model's score stands that of the best constant caption, one text for every image: a model that does not
look scores no better.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, set_seed

from ..data.reading import read_split, require_columns
from ..generating import generate_texts
from ..provenance import provenance
from .captions import caption_scores, tokenize_caption
from .pictures import save_grid


@dataclass
class EvaluationArguments:
    """What to evaluate, and where the results go."""

    model: str = field(metadata={"help": "Saved model: a local folder or Hub id."})
    dataset: str = field(metadata={"help": "Local folder or Hub name."})
    output: Path = field(metadata={"help": "JSON file for scores and settings."})
    split: str = field(default="test")
    image_column: str = field(default="image")
    references_column: str = field(default="captions", metadata={"help": "Captions that people wrote, a list each."})
    prompt: str = field(default="")
    batch_size: int = field(default=50)
    max_new_tokens: int = field(default=30)
    num_beams: int = field(default=3)
    constants: int = field(
        default=0, metadata={"help": "Score so many candidates for the best constant caption, drawn from train_split."}
    )
    train_split: str = field(default="train")
    captions: Path | None = field(default=None, metadata={"help": "Text file for the captions, one per line."})
    picture: Path | None = field(default=None, metadata={"help": "Picture of the first images with their captions."})
    picture_images: int = field(default=12)
    seed: int = field(default=0)


def best_constant(
    candidates: Sequence[str], references: dict[int, list[str]], progress: bool = True
) -> tuple[str, dict[str, float]]:
    """The candidate with the highest CIDEr when it stands for every image, and its scores."""
    tokenized = {image: [tokenize_caption(text) for text in texts] for image, texts in references.items()}

    def cider(caption: str) -> float:
        return Cider().compute_score(tokenized, {image: [tokenize_caption(caption)] for image in tokenized})[0]

    best = max(tqdm(candidates, desc="constant captions", disable=not progress), key=cider)
    return best, caption_scores(dict.fromkeys(references, best), references)


def _weights_digest(model_folder: str) -> str | None:
    files = sorted(Path(model_folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else None


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (the command line by default), generate, score, and write the results."""
    parser = HfArgumentParser(EvaluationArguments, description=__doc__, prog="imageprompt evaluate")
    (args,) = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    split = read_split(args.dataset, args.split)
    require_columns(split, args.image_column, args.references_column)
    references = dict(enumerate(split[args.references_column]))
    model = AutoModelForImageTextToText.from_pretrained(args.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(args.model)
    processor.check_model(model)

    generation = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    images = split[args.image_column]
    captions = generate_texts(
        model, processor, images, args.prompt, batch_size=args.batch_size, progress=True, **generation
    )
    result = {
        "scores": caption_scores(dict(enumerate(captions)), references),
        "images": len(captions),
        "distinct_captions": len(set(captions)),
        "references_sha256": hashlib.sha256(json.dumps(references, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": _weights_digest(args.model),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(args).items()},
        "device": model.device.type,
        **provenance(),
    }
    if args.constants:
        pool = [text for texts in read_split(args.dataset, args.train_split)[args.references_column] for text in texts]
        # Every distinct generated caption is one too: it is what the model finds likeliest.
        step = max(1, len(pool) // args.constants)
        caption, scores = best_constant([*pool[::step], *sorted(set(captions))[: args.constants]], references)
        result["best_constant"] = {"caption": caption, "scores": scores}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    if args.captions:
        args.captions.write_text("\n".join(captions) + "\n")
    if args.picture:
        shown = range(min(args.picture_images, len(captions)))
        save_grid([images[i] for i in shown], [captions[i] for i in shown], args.picture)
    shown_keys = [key for key in ("scores", "best_constant", "distinct_captions") if key in result]
    print(json.dumps({key: result[key] for key in shown_keys}, indent=2))


if __name__ == "__main__":
    main()
