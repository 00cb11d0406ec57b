"""From the options of a command to a model, its processor and what of it learns."""

from ..composing import compose
from ..modeling import ImagePromptForConditionalGeneration
from ..options import feature_layer, json_object, new_gpt2
from ..processing import ImagePromptProcessor
from .arguments import ModelArguments


def build_model(args: ModelArguments) -> tuple[ImagePromptForConditionalGeneration, ImagePromptProcessor]:
    """The model that the arguments ask for, and its processor.

    Raises:
        ValueError: for parts that are missing, named twice or unknown.
    """
    parts = {name: value for name, value in vars(args).items() if value is not None and name != "model"}
    if args.model is not None:
        if parts:
            raise ValueError(f"--model is composed already: leave out {', '.join(f'--{name}' for name in parts)}.")
        return load_model(args.model)
    if args.vision is None or (args.text is None) == (args.text_config is None):
        raise ValueError("Pass --model, or --vision with one of --text and --text_config.")
    preprocessing = json_object("--preprocessing", args.preprocessing)
    if args.image_size:
        preprocessing["input_size"] = (3, args.image_size, args.image_size)
    if args.crop_pct is not None:
        preprocessing["crop_pct"] = args.crop_pct
    return compose(
        args.vision,
        args.text or new_gpt2("--text_config", args.text_config),
        tokenizer=args.tokenizer,
        pretrained=args.pretrained is not False,
        model_args=json_object("--model_args", args.model_args),
        preprocessing=preprocessing,
        connector_args=json_object("--connector_args", args.connector_args) or None,
        feature_layer=feature_layer("--feature_layer", args.feature_layer),
        **{name: parts[name] for name in ("connector", "num_image_tokens", "fusion") if name in parts},
    )


def load_model(folder: str) -> tuple[ImagePromptForConditionalGeneration, ImagePromptProcessor]:
    """A saved model and its processor."""
    model = ImagePromptForConditionalGeneration.from_pretrained(folder)
    processor = ImagePromptProcessor.from_pretrained(folder)
    processor.check_model(model)
    return model, processor
