"""The processor: images and text in, model inputs out.

The library's `ProcessorMixin.__call__` does the work. What is added here: where image tokens go when the text does not
say, flat and nested image lists, rows without images, and `suffix` (PaliGemma's word for the text to learn), from
which `labels` are made.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import PROCESSOR_NAME

from .checkpoints import FORMAT_VERSION, check_format
from .configuration import IGNORE_INDEX
from .image_processing import ImagePromptImageProcessor

# One line per turn, in plain words: GPT-2 has no control tokens for roles. An answer ends with EOS. It begins with one
# space, also when it is sent back as it was generated.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ image_token }}
{%- elif part.type == 'text' -%}{{ part.text }}
{%- else -%}{{ raise_exception("contents are 'text' and 'image', got '" + part.type + "'") }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ render(message.content) + '\\n' }}
{%- elif message.role == 'user' -%}{{ 'User: ' + render(message.content) + '\\n' }}
{%- elif message.role == 'assistant' -%}
{{- 'Assistant:' -}}
{%- generation -%}{{ ' ' + render(message.content).lstrip() + eos_token }}{%- endgeneration -%}
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
        num_image_tokens (`int`): placeholders per image, the configuration's `image_seq_length`.
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
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(
                "The tokenizer has no vocabulary besides its special tokens: the files that hold it, such as "
                "tokenizer.json, are missing from its folder."
            )
        if not isinstance(num_image_tokens, int) or num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` is the model's `config.image_seq_length`, got {num_image_tokens}.")
        self.num_image_tokens = num_image_tokens
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the library's, for settings that this version reads.

        Raises:
            FileNotFoundError: naming a file that is missing from a local folder.
            ValueError: if a newer version of this package wrote them.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        for name in (PROCESSOR_NAME, TOKENIZER_CONFIG_FILE):
            if folder.is_dir() and not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: a model may have been saved without its processor, which "
                    "`processor.save_pretrained` puts beside it."
                )
        settings, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        known = {"auto_map", "format_version", "processor_class", *inspect.signature(cls).parameters}
        check_format(PROCESSOR_NAME, settings.pop("format_version", None), settings.keys() - known)
        return settings, kwargs

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, with the format in which they are written."""
        return super().to_dict() | {"format_version": FORMAT_VERSION}

    def __call__(
        self, images: Any = None, text: Any = None, suffix: str | list[str] | None = None, **kwargs
    ) -> BatchFeature:
        """Prepare rows of text and images.

        Args:
            images: one image; a flat list, one per row (`None` for a row without) or as the marks in the texts share
                them out; or a nested list, any number per row. What an image may be: see [`ImagePromptImageProcessor`].
            text: one text or a list of rows. `<image>` marks where an image goes; a row without a mark gets its
                images in front. One text for several rows of images is repeated. `None` means just the images.
            suffix: the text to learn after each row's prompt, literally appended and closed with EOS. Adds `labels`
                and pads on the right; without it, rows are padded on the left, ready for `generate`.
            kwargs: of the tokenizer and the image processor: `padding`, `return_tensors`, `max_length`, … Truncation
                trims the suffix where there is one, else the text; never an image.

        Returns:
            `input_ids` and `attention_mask`, (rows, positions); `pixel_values`, (images, channels, height, width),
            row by row, when there are images; `labels`, (rows, positions), with −100 at prompt, image and padding
            positions, when there is a suffix.

        Raises:
            ValueError: if images and marks do not match row by row, an image cannot be read, truncation would cut an
                image, or a row is longer than the language model's positions.
        """
        text_kwargs = kwargs.pop("text_kwargs", None) or {}
        if twice := kwargs.keys() & text_kwargs.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: given twice, in `text_kwargs` and beside it.")
        kwargs = {"padding_side": "left" if suffix is None else "right", **text_kwargs, **kwargs}
        if kwargs.get("truncation") is None:
            kwargs["truncation"] = False  # for the tokenizer, `max_length` alone would mean to cut anything
        if suffix is not None:
            kwargs |= self._suffix_kwargs(suffix, kwargs)
        outputs = super().__call__(images=images, text=text, **kwargs)
        self._check_lengths(outputs["input_ids"], outputs.get("attention_mask"), kwargs.get("max_length"))
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
        if kwargs.get("text_pair") is not None:
            self._check_prompts(text, len(kwargs["text_pair"]), kwargs)
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
            "num_image_tokens": (self.num_image_tokens, config.image_seq_length),
            "image_token_id": (self.image_token_id, config.image_token_id),
            **{
                key: (value, expected[key])
                for key, value in self.image_processor.pretrained_cfg.items()
                if not (config.dynamic_image_size and key == "input_size")
            },
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

    def _suffix_kwargs(self, suffix: str | list[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The tokenizer's keywords for prompts followed by suffixes, which it marks with `token_type_ids`."""
        suffix = [suffix] if isinstance(suffix, str) else list(suffix)
        for row, answer in enumerate(suffix):
            if not isinstance(answer, str):
                raise ValueError(f"`suffix` of row {row} is {answer!r}, not a text.")
            if self.image_token in answer:
                raise ValueError(f"`suffix` of row {row} holds {self.image_token}; images belong in `text`.")
        special = {"add_special_tokens": kwargs.get("add_special_tokens", True)}
        if self.tokenizer("a", "a", **special).input_ids != self._ids("a", **special) + self._ids("a"):
            raise ValueError(
                "This tokenizer adds special tokens around a suffix, which would be learnt: pass "
                "`add_special_tokens=False`, and write into `text` those that the language model expects."
            )
        text_pair = [answer + self.tokenizer.eos_token for answer in suffix]
        keep_all = kwargs["truncation"] in (False, "do_not_truncate")
        # Only the answer may be cut: without its prompt it would teach something else.
        truncation = False if keep_all else "only_second"
        return {"text_pair": text_pair, "truncation": truncation, "return_token_type_ids": True}

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids

    def _check_prompts(self, prompts: list[str], num_suffixes: int, kwargs: dict[str, Any]) -> None:
        if num_suffixes != len(prompts):
            raise ValueError(f"{len(prompts)} rows but {num_suffixes} suffixes: pass one suffix per row.")
        limit = kwargs.get("max_length") or self.tokenizer.model_max_length
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(
                    f"Row {row} has nothing before its suffix, whose first token could not be learnt: give it a text "
                    f"(for example {self.tokenizer.bos_token or self.tokenizer.eos_token!r}) or an image."
                )
            if kwargs["truncation"]:
                ids = self._ids(prompt, kwargs.get("add_special_tokens", True))
                length = len(ids) + ids.count(self.image_token_id) * (self.num_image_tokens - 1)
                if length >= limit:
                    raise ValueError(
                        f"Row {row} has {length} tokens before its suffix ({self.num_image_tokens} for each image): "
                        f"{limit} leave none to learn. Raise `max_length`, shorten its text, or pass fewer images."
                    )

    def _check_lengths(self, input_ids, attention_mask, max_length: int | None) -> None:
        limits = {"positions of the language model": self.tokenizer.model_max_length}
        if max_length is not None:
            limits["tokens of `max_length`"] = max_length
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
        if text is not None and not isinstance(text, Sequence):
            raise ValueError(f"`text` is a string or a list of strings, not {type(text).__name__}.")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        for row, sample in enumerate(texts or []):
            if not isinstance(sample, str):
                raise ValueError(f"`text` of row {row} is a {type(sample).__name__}, not a string.")
        if images is None:
            rows: list[list] = [[] for _ in texts]
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
        if not marked:
            raise ValueError("There is no row: `images` and `text` are empty.")
        flat = [image for row_images in rows for image in row_images]
        return flat or None, marked

    def _image_rows(self, images: Any, texts: list[str] | None) -> list[list]:
        images = list(images) if holds_images(images) else [images]
        if any(map(holds_images, images)):
            return [list(row) if holds_images(row) else [] if row is None else [row] for row in images]
        if texts is not None and all(image is not None for image in images):
            counts = [sample.count(self.image_token) for sample in texts]
            if sum(counts) == len(images):  # the marks say which image belongs to which row
                remaining = iter(images)
                return [[next(remaining) for _ in range(count)] for count in counts]
        return [[] if image is None else [image] for image in images]


def holds_images(images: Any) -> bool:
    """Whether this is a list (or a data set's column, or a batch in one array) of images, and not an image."""
    is_list = isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray))
    return is_list or getattr(images, "ndim", 0) == 4


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
