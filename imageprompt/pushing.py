"""`imageprompt push`: a saved model to the Hub, with what is known of it and nothing else that lies in its folder.

Everything is checked before anything is sent: the checkpoint is whole and its own, the scores are of these very
weights, and somebody is logged in. Then all files go up in one commit.
"""

import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from .cards import (
    CARD,
    SAMPLE,
    CardFacts,
    example_prompt,
    example_tokens,
    model_card,
    read_card,
    refuse_hidden_sample,
)
from .configuration import REQUIREMENTS, ImagePromptConfig
from .generating import generate_texts
from .modeling import ImagePromptForConditionalGeneration
from .processing import ImagePromptProcessor
from .provenance import MODEL_FILES, model_digests
from .sharing import files_in, refuse_without_token, upload

logger = logging.get_logger(__name__)

TRAINING = "training.json"
SAMPLE_SIZE = 512


def push_folder(
    folder: str | Path,
    repo_id: str,
    facts: CardFacts | None = None,
    *,
    sample: str | Path | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    **details: Any,
) -> CommitInfo:
    """Upload the model and the processor of a folder, as `save_pretrained`, a Trainer or `imageprompt train` left them.

    Args:
        folder: with both of them. Checkpoints, optimizer states, predictions and all else in it stay where they are.
        repo_id: `"name"` or `"owner/name"`.
        facts: what the card says besides; `training` is read from the folder's `training.json` by default, if that is
            of these weights.
        sample: an image for the card, which the model answers for.
        details: `commit_description`, `private`, `revision` and `create_pr`, as of the library's `push_to_hub`.

    Raises:
        ValueError: if the folder is not a whole checkpoint of imageprompt's, scores are of another model, or as of
            [`imageprompt.sharing.upload`].
        OSError: if the Hub cannot be reached, or breaks off.
    """
    files, config, facts = _checked(folder, repo_id, facts, sample)
    refuse_without_token(token)
    if sample is not None:
        facts = replace(facts, sample=_answered(folder, sample, config, facts))
    commit_message = commit_message or "Upload model"
    return upload(
        folder, files, repo_id, config=config, facts=facts, token=token, commit_message=commit_message, **details
    )


def describe_push(
    folder: str | Path, repo_id: str, facts: CardFacts | None = None, *, sample: str | Path | None = None
) -> str:
    """What [`push_folder`] would upload, and the card; nothing is sent, and no token is needed.

    A card that may be in the repository is not looked at.

    Raises:
        ValueError: as of [`push_folder`].
    """
    files, config, facts = _checked(folder, repo_id, facts, sample)
    if sample is not None:
        facts = replace(facts, sample=_answered(folder, sample, config, facts))
    own_card = read_card(Path(folder) / CARD) if CARD in files else None
    sizes = {name: (Path(folder) / name).stat().st_size for name in files if name != CARD}
    sizes.setdefault(REQUIREMENTS, len(config.requirements.encode()))
    if facts.sample is not None:
        sizes[SAMPLE] = len(facts.sample[0])
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, "", str(model_card(config, repo_id, facts, own_card))])


def _checked(
    folder: str | Path, repo_id: str, facts: CardFacts | None, sample: str | Path | None
) -> tuple[list[str], ImagePromptConfig, CardFacts]:
    """The files to upload, the model's configuration and all that the card says, if nothing is wrong with them."""
    folder, facts = Path(folder), facts or CardFacts()
    validate_repo_id(repo_id)
    files = checkpoint_files(folder)
    if facts.training is None and (folder / TRAINING).is_file():
        facts = replace(facts, training=_training_of(folder))
    refuse_foreign_scores(folder, facts)
    if sample is not None:
        _picture(sample)
        if CARD in files:
            refuse_hidden_sample(read_card(folder / CARD))
    return files, ImagePromptConfig.from_pretrained(folder), facts


def checkpoint_files(folder: Path) -> list[str]:
    """The files in a folder that are a model and its processor: configuration, weights, code, tokenizer, card.

    Raises:
        ValueError: if they are not all there, or do not belong together.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no model: it has no {CONFIG_NAME}. `model.save_pretrained` writes one.")
    config = ImagePromptConfig.from_pretrained(folder)
    wanted = ImagePromptForConditionalGeneration.__name__
    if config.architectures != [wanted]:
        raise ValueError(f"{folder} holds a model of class {config.architectures}; what is shared is a {wanted}.")
    names = {CONFIG_NAME, GENERATION_CONFIG_NAME, REQUIREMENTS, CARD, *_weights(folder)}
    try:
        processor = ImagePromptProcessor.from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no processor, without which nobody can use the model ({error}): "
            "`processor.save_pretrained` puts it there."
        ) from error
    processor.check_model(config)
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        names |= {name for name in files_in(saved) if not name.endswith(".py")}
    names |= set(MODEL_FILES["processor_sha256"])
    return sorted(_code(folder, config)) + sorted(name for name in names if (folder / name).is_file())


def _weights(folder: Path) -> list[str]:
    """The weight files, each of them whole."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        names = [SAFE_WEIGHTS_NAME]
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        parts = set(_read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).values())
        if odd := sorted(part for part in parts if Path(part).name != part or not part.endswith(".safetensors")):
            raise ValueError(f"{folder / SAFE_WEIGHTS_INDEX_NAME} names {odd[0]!r}, no weight file of its folder.")
        names = [SAFE_WEIGHTS_INDEX_NAME, *sorted(parts)]
    else:
        pickles = sorted(path.name for ending in ("bin", "pt", "pth") for path in folder.glob(f"*model*.{ending}"))
        there = f"only {pickles[0]}, a pickle, which may run anything where it is loaded" if pickles else "none"
        raise ValueError(f"{folder} has no {SAFE_WEIGHTS_NAME} ({there}): save it again with `model.save_pretrained`.")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which {SAFE_WEIGHTS_INDEX_NAME} names: save the model again.")
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{folder / name} is broken ({error}): save the model again.") from error
    return names


def _code(folder: Path, config: ImagePromptConfig) -> set[str]:
    """The Python files that `trust_remote_code=True` runs: those that config.json names, and what they import."""
    auto_map = _read_json(folder / CONFIG_NAME).get("auto_map") or config.auto_map
    modules = {f"{reference.rpartition('--')[2].partition('.')[0]}.py" for reference in auto_map.values()}
    modules.add("processing.py")
    try:
        imported = {Path(file).name for name in modules for file in get_relative_import_files(folder / name)}
        missing = sorted(name for name in modules | imported if not (folder / name).is_file())
    except FileNotFoundError as error:
        missing = [Path(error.filename).name]
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[0]}, without which the model loads only where imageprompt is installed: save "
            "model and processor again with `save_pretrained`."
        )
    return modules | imported


def _training_of(folder: Path) -> dict[str, Any] | None:
    """What `imageprompt train` wrote in a folder, if the weights beside it are still those of that training."""
    training = _read_json(folder / TRAINING)
    of_training = training.get("model") or {}
    if of_training.get("weights_sha256") == model_digests(folder)["weights_sha256"]:
        return training
    logger.warning(f"{folder / TRAINING} is not of the weights in {folder}: the card does not speak of a training.")
    return None


def read_evaluation(file: str | Path) -> dict[str, Any]:
    """What `imageprompt evaluate` wrote.

    Raises:
        ValueError: if it did not write this file.
    """
    evaluation = _read_json(Path(file))
    if not isinstance(evaluation, dict) or not {"task", "scores", "model", "settings", "rows"} <= evaluation.keys():
        raise ValueError(
            f"{file} is not what `imageprompt evaluate` writes: it needs task, scores, model and settings."
        )
    return evaluation


def refuse_foreign_scores(folder: Path, facts: CardFacts) -> None:
    """Raise a ValueError if an evaluation was not of this folder's model."""
    if not facts.evaluations:
        return
    digests = model_digests(folder)
    for evaluation in facts.evaluations:
        if other := [kind for kind in digests if evaluation["model"].get(kind) != digests[kind]]:
            raise ValueError(
                f"The scores of task {evaluation['task']!r} are not of the model in {folder}: {' and '.join(other)} "
                "differ. Evaluate this model, or leave the scores out."
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error


def _answered(folder: str | Path, image: str | Path, config: ImagePromptConfig, facts: CardFacts) -> tuple[bytes, str]:
    """An image as a small JPEG file without its metadata, and what the model of a folder says of it."""
    picture = _picture(image)
    model = ImagePromptForConditionalGeneration.from_pretrained(folder, device_map="auto")
    processor = ImagePromptProcessor.from_pretrained(folder)
    prompt, new_tokens = example_prompt(facts) or "", example_tokens(config)
    (answer,) = generate_texts(model, processor, [picture], prompt, max_new_tokens=new_tokens)
    picture.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE))
    jpeg = io.BytesIO()
    Image.frombytes(picture.mode, picture.size, picture.tobytes()).save(jpeg, format="JPEG", quality=90)
    return jpeg.getvalue(), answer


def _picture(file: str | Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"{file} is no image that can be read ({error}).") from error
