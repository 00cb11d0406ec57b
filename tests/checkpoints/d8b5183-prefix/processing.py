"""The processor: images and text in, model inputs out.

The library's `ProcessorMixin.__call__` does the work. What is added here: where image tokens go when the text does not
say, flat and nested image lists, rows without images, and `suffix` (PaliGemma's word for the text to learn), from
which `labels` are made.
"""

from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .image_processing import ImagePromptImageProcessor

IGNORE_INDEX = -100

# One line per turn, in plain words: GPT-2 has no control tokens for roles. An answer ends with EOS.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}<image>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ render(message.content) + '\\n' }}
{%- elif message.role == 'user' -%}{{ 'User: ' + render(message.content) + '\\n' }}
{%- elif message.role == 'assistant' -%}
{{- 'Assistant:' -}}
{%- generation -%}{{ ' ' + render(message.content) + eos_token }}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}{{ raise_exception("roles are 'system', 'user' and 'assistant', got '" + message.role + "'") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""


class ImagePromptProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, for [`ImagePromptForConditionalGeneration`].

    Args:
        image_processor (`ImagePromptImageProcessor`): the backbone's preprocessing.
        tokenizer: the language model's tokenizer, with `image_token` among its special tokens; `compose` adds it.
        num_image_tokens (`int`): placeholders per image, from the model's configuration.
        chat_template (`str`, *optional*): Jinja template; a plain "User: … Assistant: …" one by default.
    """

    def __init__(
        self,
        image_processor: ImagePromptImageProcessor | None = None,
        tokenizer=None,
        num_image_tokens: int | None = None,
        chat_template: str | None = None,
    ):
        if getattr(tokenizer, "image_token", None) is None:
            raise ValueError(
                "The tokenizer has no `image_token`. `imageprompt.compose` adds one; by hand: "
                '`AutoTokenizer.from_pretrained(path, extra_special_tokens={"image_token": "<image>"})`.'
            )
        if not num_image_tokens or num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` is the model's `config.num_image_tokens`, got {num_image_tokens}.")
        self.num_image_tokens = num_image_tokens
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self, images: Any = None, text: Any = None, suffix: str | list[str] | None = None, **kwargs
    ) -> BatchFeature:
        """Prepare rows of text and images.

        Args:
            images: one image; a flat list, one per row (`None` for a row without); or a nested list, any number per
                row. What an image may be: see [`ImagePromptImageProcessor`].
            text: one text or a list of rows. `<image>` marks where an image goes; a row without a mark gets its
                images in front. One text for several rows of images is repeated. `None` means just the images.
            suffix: the text to learn after each row's prompt, literally appended and closed with EOS. Adds `labels`
                and pads on the right; without it, rows are padded on the left, ready for `generate`.
            kwargs: of the tokenizer and the image processor: `padding`, `return_tensors`, `max_length`, …

        Returns:
            `input_ids` and `attention_mask`, (rows, positions); `pixel_values`, (images, channels, height, width),
            row by row, when there are images; `labels`, (rows, positions), with −100 at prompt, image and padding
            positions, when there is a suffix.

        Raises:
            ValueError: if images and marks do not match row by row, an image cannot be read, truncation would cut an
                image, or a row is longer than the language model's positions.
        """
        if suffix is not None:
            kwargs = self._with_suffix(suffix, kwargs)
        outputs = super().__call__(images=images, text=text, **kwargs)
        self._check_lengths(outputs["input_ids"], outputs.get("attention_mask"), kwargs)
        if suffix is not None:
            outputs["labels"] = _labels(outputs["input_ids"], outputs.pop("token_type_ids"))
        return outputs

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Rows of text with one mark per image, and the images in one flat list: what the library expects."""
        if videos is not None or audio is not None:
            raise ValueError("An image prompt takes images and text; it cannot use `videos` or `audio`.")
        if images is None and text is None:
            raise ValueError("Pass `images`, `text` or both.")
        images, text = self._align(images, text)
        num_suffixes = len(kwargs["text_pair"]) if kwargs.get("text_pair") is not None else len(text)
        if num_suffixes != len(text):
            raise ValueError(f"{len(text)} rows but {num_suffixes} suffixes: pass one suffix per row.")
        return super().prepare_inputs_layout(images=images, text=text)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders that stand for one image."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Placeholders for images of the given (height, width) sizes; the size does not matter here."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def check_model(self, model) -> None:
        """Refuse a model that was not made for this processor, before any work starts.

        Args:
            model: an imageprompt model or its configuration.

        Raises:
            ValueError: naming every difference in tokens per image, placeholder, vocabulary and preprocessing.
        """
        config = getattr(model, "config", model)
        expected = config.vision_config.pretrained_cfg
        pairs = {
            "num_image_tokens": (self.num_image_tokens, config.num_image_tokens),
            "image_token_id": (self.image_token_id, config.image_token_id),
            **{key: (value, expected[key]) for key, value in self.image_processor.pretrained_cfg.items()},
        }
        differences = [
            f"{key} {mine} here, {theirs} in the model" for key, (mine, theirs) in pairs.items() if mine != theirs
        ]
        if len(self.tokenizer) > config.vocab_size:
            differences.append(f"{len(self.tokenizer)} tokens here, {config.vocab_size} in the model's vocabulary")
        if differences:
            raise ValueError(
                f"Processor and model do not belong together: {'; '.join(differences)}. "
                "Load both from the same checkpoint."
            )

    def _with_suffix(self, suffix: str | list[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        suffix = [suffix] if isinstance(suffix, str) else list(suffix)
        for row, answer in enumerate(suffix):
            if not isinstance(answer, str):
                raise ValueError(f"`suffix` of row {row} is {answer!r}, not a text.")
            if self.image_token in answer:
                raise ValueError(f"`suffix` of row {row} holds {self.image_token}; images belong in `text`.")
        text_kwargs = dict(kwargs.get("text_kwargs") or {})
        kwargs = {**kwargs, "return_token_type_ids": True, "text_pair": [s + self.tokenizer.eos_token for s in suffix]}
        if "padding_side" not in text_kwargs:
            kwargs.setdefault("padding_side", "right")
        if kwargs.get("truncation") is True:
            # Only the answer may be cut: without its prompt it would teach something else.
            kwargs["truncation"] = "only_second"
        return kwargs

    def _check_lengths(self, input_ids, attention_mask, kwargs) -> None:
        limits = {"positions of the language model": self.tokenizer.model_max_length}
        if kwargs.get("truncation"):
            limits["tokens of `max_length`"] = kwargs.get("max_length") or self.tokenizer.model_max_length
        if attention_mask is None:
            lengths = [len(row) for row in input_ids]
        else:
            lengths = [int(row.sum()) if hasattr(row, "sum") else sum(row) for row in attention_mask]
        for row, length in enumerate(lengths):
            for name, limit in limits.items():
                if length > limit:
                    raise ValueError(
                        f"Row {row} has {length} tokens ({self.num_image_tokens} for each image), more than the "
                        f"{limit} {name}. Shorten its text, pass fewer images, or allow `truncation=True`."
                    )
            if length == 0:
                raise ValueError(f"Row {row} is empty: give it a text or an image.")

    def _align(self, images: Any, text: Any) -> tuple[list | None, list[str]]:
        """Flat images and marked texts, whatever the nesting; see `__call__`."""
        if text is not None and not isinstance(text, (str, list, tuple)):
            raise ValueError(f"`text` is a string or a list of strings, not {type(text).__name__}.")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        for row, sample in enumerate(texts or []):
            if not isinstance(sample, str):
                raise ValueError(f"`text` of row {row} is a {type(sample).__name__}, not a string.")
        if images is None:
            rows = [[] for _ in texts]
        else:
            rows = self._image_rows(images, texts)
            if texts is None:
                texts = [""] * len(rows)
            elif isinstance(text, str) and len(rows) > 1:
                texts = texts * len(rows)
        if len(rows) != len(texts):
            raise ValueError(
                f"{len(rows)} rows of images but {len(texts)} texts. A flat list means one image per row; nest it "
                "([[first, second]]) to give a row several."
            )
        marked = []
        for row, (row_images, sample) in enumerate(zip(rows, texts, strict=True)):
            marks = sample.count(self.image_token)
            if marks not in (0, len(row_images)):
                raise ValueError(
                    f"Row {row} has {marks} {self.image_token} in its text but {len(row_images)} images: pass one "
                    "image per mark, or leave the marks out to put the images in front."
                )
            if marks == 0:
                sample = self.image_token * len(row_images) + sample
            elif not row_images:
                raise ValueError(f"Row {row} has {self.image_token} in its text but no image.")
            marked.append(sample)
        flat = [image for row_images in rows for image in row_images]
        return flat or None, marked

    def _image_rows(self, images: Any, texts: list[str] | None) -> list[list]:
        if not isinstance(images, (list, tuple)):
            images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
        if any(isinstance(image, (list, tuple)) for image in images):
            return [list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row] for row in images]
        if texts is not None and None not in images:
            counts = [sample.count(self.image_token) for sample in texts]
            if sum(counts) == len(images):  # the marks say which image belongs to which row
                remaining = iter(images)
                return [[next(remaining) for _ in range(count)] for count in counts]
        return [[] if image is None else [image] for image in images]


def _labels(input_ids: Any, token_type_ids: Any) -> Any:
    """The tokens of the suffix (type 1), and −100 at prompt, image and padding (type 0), in the type of the input."""
    if isinstance(input_ids, list):
        return [
            [token if kind else IGNORE_INDEX for token, kind in zip(*row, strict=True)]
            for row in zip(input_ids, token_type_ids, strict=True)
        ]
    if isinstance(input_ids, torch.Tensor):
        return input_ids.masked_fill(token_type_ids == 0, IGNORE_INDEX)
    return (token_type_ids != 0) * input_ids + (token_type_ids == 0) * IGNORE_INDEX


ImagePromptProcessor.register_for_auto_class()
