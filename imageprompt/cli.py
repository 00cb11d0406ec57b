"""The `imageprompt` command. Each subcommand imports what it needs when it runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from huggingface_hub.errors import StrictDataclassError

if TYPE_CHECKING:
    from .conversion.conversion import Conversion

app = typer.Typer(
    help="An image is a prompt: any timm backbone in front of GPT-2.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

convert_app = typer.Typer(help="Make published checkpoints of other projects imageprompt models.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Argument(help="For the model and a picture of its answers.")] = Path(
        "runs/quickstart"
    ),
    epochs: Annotated[float, typer.Option(help="Passes over the 1,437 training scans.", min=0.01)] = 12,
) -> None:
    """Train a small model on handwritten digits, reload it and let it answer in words (about a minute)."""
    from .training.quickstart import quickstart

    quickstart(folder, epochs)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train or fine-tune on a data set of images and texts (see `imageprompt train --help`)."""
    from .training.train import main

    main(context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def pretrain(context: typer.Context) -> None:
    """Train a language model on plain text, to be composed afterwards (see `imageprompt pretrain --help`)."""
    from .training.pretrain import main

    main(context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Ask a saved model about a data set split and score its answers (see `imageprompt evaluate --help`)."""
    from .evaluation.evaluate import main

    main(context.args)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Saved model: a local folder or Hub id.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders of images, or URLs.")],
    prompt: Annotated[str, typer.Option(help="Text before the answer, for example a question.")] = "",
    batch_size: Annotated[int, typer.Option(help="Images answered at once.", min=1)] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens; by default the model's own, or 30.", min=1)
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(help="Beams; 1 is greedy search; by default the model's own.", min=1)
    ] = None,
) -> None:
    """Print one line per image: its name, a tab, and what the model says."""
    from .cpu import prepack_weights
    from .generating import default_length, find_images, generate_texts
    from .modeling import ImagePromptForConditionalGeneration
    from .processing import ImagePromptProcessor

    files = find_images(images)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(model, device_map="auto")
    processor = ImagePromptProcessor.from_pretrained(model)
    processor.check_model(loaded)
    prepack_weights(loaded, strict=False)
    settings = default_length(loaded, _given(max_new_tokens=max_new_tokens, num_beams=num_beams))
    answers = generate_texts(
        loaded,
        processor,
        files,
        prompt,
        batch_size=batch_size,
        progress=len(files) > batch_size,
        **settings,
    )
    for file, answer in zip(files, answers, strict=True):
        typer.echo(f"{file}\t{answer}")


@app.command()
def caption(
    model: Annotated[str, typer.Argument(help="Saved model: a local folder or Hub id.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders with all folders in them, or URLs.")],
    output: Annotated[Path, typer.Option(help="JSON lines file; a stopped run goes on with it.")] = Path(
        "captions.jsonl"
    ),
    prompt: Annotated[str, typer.Option(help="Text before every caption.")] = "",
    batch_size: Annotated[int, typer.Option(help="Images captioned at once.", min=1)] = 32,
    workers: Annotated[int, typer.Option(help="Processes that read images meanwhile.", min=0)] = 2,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="In which to compute; as it was saved.")
    ] = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest caption, in tokens; by default the model's own, or 30.", min=1)
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(help="Beams; 1 is greedy search; by default the model's own.", min=1)
    ] = None,
) -> None:
    """Caption folders of any size into a file, which is written as captions come."""
    from .captioning import caption_images
    from .generating import find_images

    done = caption_images(
        model,
        find_images(images, recursive=True),
        output,
        prompt,
        batch_size=batch_size,
        num_workers=workers,
        dtype=dtype,
        progress=True,
        **_given(max_new_tokens=max_new_tokens, num_beams=num_beams),
    )
    typer.echo(f"{done.captions:,} captions in {output}.")
    if done.errors:
        typer.echo(f"{done.errors:,} images could not be read: {output} says why. Run the same again to retry.")
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Saved model with its processor, such as a training's output.")],
    repo: Annotated[str, typer.Argument(help="Where to: name or owner/name.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Scores of this model, as `imageprompt evaluate` wrote them.")
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="An image to show in the card, with the model's answer.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text before the answer, in the example and of the sample; that of the scores.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Under which others may use it, such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="That the model writes, such as en.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub name of data that it was trained on.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Further tag of the card.")] = None,
    private: Annotated[bool | None, typer.Option(help="For you alone, or for all; as it is, by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; main by default, made if there is none.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the card; send nothing.")] = False,
) -> None:
    """Upload a saved model to the Hub: weights, processor, code and a model card, in one commit."""
    from .cards import CardFacts
    from .pushing import describe_push, push_folder, read_evaluation

    facts = CardFacts(
        license=license,
        language=language or [],
        datasets=dataset or [],
        tags=tag or [],
        prompt=prompt,
        evaluations=[read_evaluation(file) for file in evaluation or []],
    )
    if dry_run:
        typer.echo(describe_push(folder, repo, facts, sample=sample))
        return
    commit = push_folder(
        folder,
        repo,
        facts,
        sample=sample,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    typer.echo(commit.pr_url or commit.commit_url)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Answer OpenAI-style requests with images over HTTP (see `imageprompt serve --help`)."""
    from .serving import serve

    serve(context.args)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="Saved model: a local folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="New folder for the smaller model.")],
    quantize: Annotated[str | None, typer.Option(help="int8, int8-dynamic or int4.")] = None,
    prune: Annotated[float | None, typer.Option(help="Share of the weights to set to zero, such as 0.5.")] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option("--part", help="vision, connector or text; by default text is quantised, and all are pruned."),
    ] = None,
    scope: Annotated[
        Literal["layer", "model"], typer.Option(help="Prune this share of each layer, or of all layers together.")
    ] = "layer",
) -> None:
    """Quantise a model's weights, set a share of them to zero, or both; check what was saved."""
    from .compression import compress

    report = compress(model, output, quantize=quantize, share=prune, parts=parts, scope=scope)
    if quantize is not None:
        typer.echo(f"Quantised {len(report['quantized_layers'])} layers.")
    if prune is not None:
        typer.echo(f"{report['share_of_zeros']:.1%} of the weights of layers are zero.")
    before, after = report["bytes_before"], report["bytes_after"]
    typer.echo(f"{before / 1e6:.1f} MB became {after / 1e6:.1f} MB ({after / before:.0%}).")
    typer.echo(f"Logits moved by {report['logit_difference']:.1%} of the largest. Saved to {output}.")


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Saved model, its config.json, or a backbone; a Hub id or local path.")],
    text: Annotated[
        str | None, typer.Argument(help="With a backbone: the language model, or JSON of a new GPT-2's settings.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the text.")] = None,
    connector: Annotated[str | None, typer.Option(help="Connector between the parts; mlp by default.")] = None,
    num_image_tokens: Annotated[int | None, typer.Option(help="Tokens per image; the connector's default.")] = None,
    connector_args: Annotated[str | None, typer.Option(help='What it takes besides, JSON: {"depth": 2}.')] = None,
    fusion: Annotated[str | None, typer.Option(help="prefix or cross_attention.")] = None,
    feature_layer: Annotated[
        str | None, typer.Option(help="Features of an earlier block (-2), several ([-2, -1]), pooled or tokens.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Whether the parts' weights are to be loaded.")] = True,
    model_args: Annotated[str | None, typer.Option(help="Further timm.create_model keywords, JSON.")] = None,
    preprocessing: Annotated[
        str | None, typer.Option(help='Overrides of the backbone\'s, JSON: {"input_size": [3, 96, 96]}.')
    ] = None,
    freeze: Annotated[list[str] | None, typer.Option(help="Part that does not learn: vision, connector, text.")] = None,
    lora: Annotated[str | None, typer.Option(help='Modules for LoRA: "c_attn,c_proj", or all-linear.')] = None,
    modules_to_save: Annotated[str | None, typer.Option(help='Modules that learn beside LoRA: "connector".')] = None,
    images_per_row: Annotated[int, typer.Option(help="Images in a row.", min=1)] = 1,
    text_tokens: Annotated[int, typer.Option(help="Text tokens in a row: prompt and answer.", min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer, in tokens.", min=1)] = 30,
    num_beams: Annotated[int, typer.Option(help="Beams in generation.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 8,
    dtype: Annotated[
        Literal["float32", "autocast", "bfloat16"],
        typer.Option(help="autocast: float32 weights that compute in bfloat16, as training with --bf16."),
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model will cost, and whether training would fail; no weights are loaded.

    Ends with 0 if training would run, 1 if it would fail, 2 if the input means nothing.
    """
    from .diagnosis import Plan, diagnose
    from .options import feature_layer as parse_layer
    from .options import json_object

    plan = Plan(
        images_per_row=images_per_row,
        text_tokens=text_tokens,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        batch_size=batch_size,
        dtype=dtype,
        trainable=dict.fromkeys(freeze or [], False),
        lora=lora if lora in (None, "all-linear") else lora.split(","),
        modules_to_save=modules_to_save.split(",") if modules_to_save else [],
    )
    report = diagnose(
        model,
        text,
        plan=plan,
        tokenizer=tokenizer,
        model_args=json_object("--model-args", model_args) or None,
        preprocessing=json_object("--preprocessing", preprocessing) or None,
        pretrained=pretrained,
        connector=connector,
        num_image_tokens=num_image_tokens,
        connector_args=json_object("--connector-args", connector_args) or None,
        fusion=fusion,
        feature_layer=parse_layer("--feature-layer", feature_layer),
    )
    typer.echo(report.to_json() if as_json else report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Saved model: a local folder or Hub id.")],
    folder: Annotated[Path, typer.Argument(help="Where to write; new or empty.")],
    formats: Annotated[
        list[str], typer.Option("--format", help="onnx (needs imageprompt[export]) or torch; both by default.")
    ] = ["onnx", "torch"],  # noqa: B006 - typer reads it
) -> None:
    """Write a model as ONNX and torch.export graphs, and check them against the model."""
    from .exporting import export

    for kind, difference in export(model, folder, formats).items():
        typer.echo(f"{kind}: logits differ from the model's by up to {difference}.")
    typer.echo(f"{folder} is done.")


@convert_app.command()
def clipcap(
    checkpoint: Annotated[str, typer.Argument(help="ClipCap's .pt file.")],
    output: Annotated[Path, typer.Argument(help="Folder for the model; new or empty.")],
    vision: Annotated[
        str | None,
        typer.Option(help="CLIP's tower, of timm; by default ViT-B/32 or RN50x4, by the size of the embedding."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="CLIP's weights, instead of timm's: OpenAI's own file, or transformers' folder or Hub id."),
    ] = None,
    text: Annotated[str, typer.Option(help="The GPT-2 that it was trained from.")] = "openai-community/gpt2",
    normalize: Annotated[
        bool | None, typer.Option(help="Whether it was trained on normalised embeddings; needed for transformers.")
    ] = None,
    clip_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of CLIP's Hub id.")] = None,
    text_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the GPT-2's Hub id.")] = None,
) -> None:
    """A ClipCap checkpoint: CLIP's embedding, a mapper to a prefix, and GPT-2."""
    from .conversion.clipcap import convert_clipcap

    _save_conversion(
        output,
        lambda: convert_clipcap(
            checkpoint,
            vision=vision,
            clip=clip,
            text=text,
            normalize=normalize,
            clip_revision=clip_revision,
            text_revision=text_revision,
        ),
        "Logits differ from ClipCap's",
    )


@convert_app.command("vision-encoder-decoder")
def convert_vision_encoder_decoder(
    source: Annotated[str, typer.Argument(help="VisionEncoderDecoder checkpoint with GPT-2: a folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the model and its processor; new or empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
) -> None:
    """Import a vit-gpt2 captioner: same logits, same captions, checked before anything is written."""
    from .conversion.vision_encoder_decoder import convert_vision_encoder_decoder

    _save_conversion(
        output,
        lambda: convert_vision_encoder_decoder(source, revision=revision),
        "Greedy and beam captions are the same. Logits differ from transformers' VisionEncoderDecoderModel's",
    )


def _given(**settings: Any) -> dict[str, Any]:
    """Those that are not left to their defaults."""
    return {name: value for name, value in settings.items() if value is not None}


def _save_conversion(output: Path, convert: "Callable[[], Conversion]", said: str) -> None:
    """Write what a conversion gives, and say what was compared and assumed."""
    from .comparing import described
    from .folders import new_folder

    with new_folder(output) as draft:
        conversion = convert()
        conversion.model.save_pretrained(draft)
        conversion.processor.save_pretrained(draft)
    for sentence in conversion.assumed:
        typer.echo(sentence)
    typer.echo(f"{said} by up to {described(conversion.differences)}.")
    typer.echo(f"Saved to {output}.")


def main(command: Callable[[], Any] = app) -> None:
    """Run a command, by default `imageprompt`; a mistake in the input ends with its message, without a traceback."""
    try:
        command()
    except ModuleNotFoundError as error:
        typer.secho(f'Error: {error}. The command needs: pip install "imageprompt[train]"', fg="red", err=True)
        raise SystemExit(1) from error
    except (FloatingPointError, OSError, StrictDataclassError, ValueError) as error:
        typer.secho(f"Error: {_sentence(error)}", fg="red", err=True)
        raise SystemExit(2) from error


def _sentence(error: Exception) -> str:
    """What an error says, without the traceback that PyTorch puts around one from a process that loads data."""
    text = str(error)
    if re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback", text):
        text = re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", text, flags=re.MULTILINE)[-1]
    return text.strip()


if __name__ == "__main__":
    main()
