"""Who is timed, and at which sizes: imageprompt, what people pick instead, and the floor below both.

A contestant is a model with random weights and the inputs of every work. What it does is a method of the work's name,
which prepares all and returns what is timed.
"""

import atexit
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from benchmark_preprocessing import load_photos
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.activations import NewGELUActivation

from imageprompt import ImagePromptCollator, ImagePromptConfig, ImagePromptForConditionalGeneration, compose
from imageprompt.cpu import multiplies_bf16, prepack_weights
from imageprompt.data.augmenting import augmentation
from imageprompt.data.feature_cache import cache_features
from imageprompt.data.packing import pack
from imageprompt.data.rows import Rows
from imageprompt.data.sources import Source
from imageprompt.generating import stream_texts
from imageprompt.training.tokenizing import train_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtypes_of_this_machine() -> list[str]:
    """In which it has instructions to multiply; without them a training step takes minutes."""
    return list(DTYPES) if torch.cuda.is_available() or multiplies_bf16() else ["fp32"]


@dataclass(frozen=True)
class Sizes:
    """What all contestants have in common."""

    backbone: str = "vit_small_patch16_224"
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 384
    vision_layers: int = 12
    vision_heads: int = 6
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocabulary: int = 50258  # GPT-2's and the placeholder
    batch: int = 8
    images: int = 1  # in each row
    image_tokens: int | None = None  # of each image; None leaves it to the contestant
    text_tokens: int = 24
    new_tokens: int = 32
    questions: int = 16
    files: int = 64

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def gpt2(self, **settings: Any) -> GPT2Config:
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        sizes = {"n_embd": self.text_width, "n_layer": self.text_layers, "n_head": self.text_heads}
        return GPT2Config(**sizes, vocab_size=self.vocabulary, **ends, **settings)

    def vit(self) -> dict[str, int]:
        return {
            "hidden_size": self.vision_width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "intermediate_size": 4 * self.vision_width,
            "patch_size": self.patch_size,
            "image_size": self.image_size,
        }


REFERENCE = Sizes()
# ViT-L/16 and GPT-2 medium.
LARGE = Sizes(
    backbone="vit_large_patch16_224",
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    text_width=1024,
    text_layers=24,
    text_heads=16,
    batch=64,
)
QUICK = Sizes(
    backbone="vit_tiny_patch16_224",
    image_size=64,
    vision_width=192,
    vision_heads=3,
    text_width=32,
    text_layers=2,
    text_heads=2,
    vocabulary=400,
    batch=2,
    text_tokens=6,
    new_tokens=4,
    questions=4,
    files=3,
)


class Contestant(ABC):
    """A model of the given sizes, with the inputs of every work. What a work does is a method of its name."""

    def __init__(self, sizes: Sizes, dtype: str, device: str):
        self.sizes, self.dtype, self.device = sizes, DTYPES[dtype], device
        torch.manual_seed(0)
        self.model = self.build().to(device)
        self.text = torch.randint(1, sizes.vocabulary - 1, (sizes.batch, sizes.text_tokens), device=device)
        self.pixels = torch.randn(sizes.batch * sizes.images, 3, sizes.image_size, sizes.image_size, device=device)

    @abstractmethod
    def build(self) -> torch.nn.Module: ...

    @property
    def image_tokens(self) -> int:
        """Positions that an image takes in the text."""
        return self.sizes.image_tokens or self.sizes.patches

    def inputs(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes for these texts, (rows, tokens), each behind its images."""
        images = self.sizes.images
        placeholders = text.new_full((len(text), images * self.image_tokens), self.sizes.vocabulary - 1)
        ids = torch.cat([placeholders, text], dim=1)
        pixels = self.pixels[: len(text) * images]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def to_answer(self) -> torch.nn.Module:
        """The model as it is used once it has learnt, with it and the pixels in the dtype."""
        self.pixels = self.pixels.to(self.dtype)
        return self.model.eval().to(self.dtype)

    def labelled(self) -> dict[str, torch.Tensor]:
        """A training batch, in which the texts are learnt."""
        inputs = self.inputs(self.text)
        labels = inputs["input_ids"].clone()
        labels[:, : -self.sizes.text_tokens] = -100
        return inputs | {"labels": labels}

    def train(self) -> Callable[[], Any]:
        """A training step: as the Trainer does it, with fp32 weights, under autocast for bf16."""
        return self._training_on(self.labelled())

    def _training_on(self, batch: Any) -> Callable[[], None]:
        model = self.model.train()
        return self._training(lambda: model(**batch).loss)

    def _training(self, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def step() -> None:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                found = loss()
            found.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def cold_start(self) -> Callable[[], Any]:
        """A new Python process that imports the class and loads a saved model."""
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder)
        self.model.to(self.dtype).save_pretrained(folder)
        package, name = type(self.model).__module__.split(".")[0], type(self.model).__name__
        code = f"from {package} import {name}; {name}.from_pretrained({folder!r})"
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    def generate(self) -> Callable[[], Any]:
        """Captions of a batch of images, of just so many tokens."""
        model, inputs, count = self.to_answer(), self.inputs(self.text[:, :1]), self.sizes.new_tokens
        return lambda: model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)


class Ours(Contestant):
    """imageprompt, with a two-layer MLP as connector."""

    features: torch.Tensor | None = None  # of the images, once they are encoded

    def build(self):
        config = ImagePromptConfig.from_backbones(
            self.sizes.backbone,
            self.sizes.gpt2(),
            preprocessing={"input_size": (3, self.sizes.image_size, self.sizes.image_size)},
            image_token_id=self.sizes.vocabulary - 1,
            num_image_tokens=self.image_tokens,
        )
        return ImagePromptForConditionalGeneration(config)

    def _questions(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        self.to_answer()
        words = torch.randint(1, self.sizes.vocabulary - 1, (self.sizes.questions, 8), device=self.device)
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        return {"input_ids": words, "attention_mask": torch.ones_like(words)}, settings

    def questions_one_by_one(self) -> Callable[[], torch.Tensor]:
        """Every question with its image, as each comes."""
        questions, settings = self._questions()

        def ask() -> torch.Tensor:
            prompts = [self.inputs(words) for words in questions["input_ids"].split(1)]
            return torch.cat([self.model.generate(**prompt, **settings) for prompt in prompts])[:, self.image_tokens :]

        return ask

    def questions_together(self) -> Callable[[], torch.Tensor]:
        """All questions in one batch, each with its image."""
        questions, settings = self._questions()
        self.pixels = self.pixels[:1].expand(self.sizes.questions, -1, -1, -1)
        return lambda: self.model.generate(**self.inputs(questions["input_ids"]), **settings)[:, self.image_tokens :]

    def questions_behind_a_prefix(self) -> Callable[[], torch.Tensor]:
        """The image once, then every question as it comes."""
        questions, settings = self._questions()

        def ask() -> torch.Tensor:
            prefix = self._prefix()
            parts = [{"input_ids": words} for words in questions["input_ids"].split(1)]
            return torch.cat([self.model.generate(**part, prefix=prefix, **settings) for part in parts])

        return ask

    def questions_together_behind_a_prefix(self) -> Callable[[], torch.Tensor]:
        """The image once, then all questions in one batch."""
        questions, settings = self._questions()
        return lambda: self.model.generate(**questions, prefix=self._prefix(), **settings)

    def _prefix(self):
        return self.model.encode_prefix(**self.inputs(self.text[:1, :0]))

    def train_all_logits(self) -> Callable[[], Any]:
        """As `train`, with logits of every position, of which the loss then takes those of the text."""
        model, batch = self.model.train(), self.labelled()
        labels = batch.pop("labels")

        def loss() -> torch.Tensor:
            logits = model(**batch, use_cache=False).logits[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)

        return self._training(loss)

    def train_gelu_in_eight(self) -> Callable[[], Any]:
        """As `train`, with GPT-2's GELU in the library's eight operations."""
        for block in self.model.model.language_model.h:
            block.mlp.act = NewGELUActivation()
        return self.train()

    def decode(self) -> Callable[[], Any]:
        """The step for one more token of each row."""
        return self._decode_with(DynamicCache(config=self.model.config.text_config))

    def decode_prepacked(self) -> Callable[[], Any]:
        """As `decode`, with prepacked weights."""
        return self._prepacked().decode()

    def generate_prepacked(self) -> Callable[[], Any]:
        """As `generate`, with prepacked weights."""
        return self._prepacked().generate()

    def questions_together_prepacked(self) -> Callable[[], torch.Tensor]:
        return self._prepacked().questions_together()

    def questions_together_behind_a_prefix_prepacked(self) -> Callable[[], torch.Tensor]:
        return self._prepacked().questions_together_behind_a_prefix()

    def questions_one_by_one_prepacked(self) -> Callable[[], torch.Tensor]:
        return self._prepacked().questions_one_by_one()

    def questions_behind_a_prefix_prepacked(self) -> Callable[[], torch.Tensor]:
        return self._prepacked().questions_behind_a_prefix()

    def _prepacked(self):
        prepack_weights(self.to_answer())
        return self

    def decode_static_prepacked(self) -> Callable[[], Any]:
        """As `decode_static`, with prepacked weights."""
        return self._prepacked().decode_static()

    def decode_static(self) -> Callable[[], Any]:
        """As `decode`, with a cache whose size is fixed beforehand."""
        most = self.image_tokens + self.sizes.text_tokens + self.sizes.new_tokens
        return self._decode_with(StaticCache(config=self.model.config.text_config, max_cache_len=most))

    def _decode_with(self, cache: DynamicCache | StaticCache) -> Callable[[], Any]:
        return _decoding(self.model, cache, self._fill(cache)["attention_mask"])

    def _fill(self, cache: DynamicCache | StaticCache) -> dict[str, torch.Tensor]:
        """Let the model read all rows, whose inputs are returned."""
        model, inputs = self.to_answer(), self.inputs(self.text)
        with torch.inference_mode():
            model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return inputs


class OursPooled(Ours):
    """As `Ours`, with the patches averaged to a quarter: what the README composes."""

    @property
    def image_tokens(self):
        return self.sizes.image_tokens or self.sizes.patches // 4

    def train_compiled(self) -> Callable[[], Any]:
        """As `train`, with `torch_compile` of the Trainer's options."""
        model, batch = torch.compile(self.model.train()), self.labelled()
        return self._training(lambda: model(**batch).loss)

    def train_padded(self) -> Callable[[], Any]:
        """As `train`, with texts of a quarter of the length, of all of it, and of all lengths between."""
        return self._training_on(self.unlike_lengths())

    def train_packed(self) -> Callable[[], Any]:
        """As `train_padded`, with `--pack_length 512`."""
        return self._training_on(pack(self.unlike_lengths(), 512))

    def train_grouped(self) -> Callable[[], Any]:
        """A batch that has as many tokens as that of `train_padded`, in texts of one length."""
        length = round(5 / 8 * self.sizes.text_tokens)
        self.text, self.sizes = self.text[:, :length], replace(self.sizes, text_tokens=length)
        return self.train()

    def unlike_lengths(self) -> BatchFeature:
        """A training batch, padded on the right."""
        batch = self.labelled()
        most = self.sizes.text_tokens
        lengths = torch.linspace(most / 4, most, self.sizes.batch, device=self.device).round()
        padding = torch.arange(most, device=self.device) >= lengths[:, None]
        batch["attention_mask"][:, -most:][padding] = 0
        batch["labels"][:, -most:][padding] = -100
        return BatchFeature(batch)

    def generate_static(self) -> Callable[[], Any]:
        """As `generate`, with a cache whose size is fixed beforehand."""
        self.model.generation_config.cache_implementation = "static"
        return self.generate()

    def generate_compiled(self) -> Callable[[], Any]:
        """As `generate_static`, with a compiled forward pass."""
        self.model.forward = torch.compile(self.model.forward)
        return self.generate_static()

    def load_photos(self) -> Callable[[], Any]:
        """A training batch made from files, by one process: decoding, augmentation, tokenising."""
        augment = augmentation((self.sizes.image_size,) * 2, {})
        processor, photos = self.captioner()[1], self.photos(self.sizes.batch)
        collate = ImagePromptCollator(processor)
        return lambda: collate([{"image": augment(Image.open(photo)), "suffix": "a photo"} for photo in photos])

    def load_features(self) -> Callable[[], Any]:
        """A training batch made from a feature cache, by one process."""
        (model, processor), photos = self.captioner(), self.photos(self.sizes.batch)
        model.to(self.device).set_trainable(vision=False)
        table = datasets.Dataset.from_dict({"image": photos, "suffix": ["a photo"] * len(photos)})
        rows = Rows(table, Source("photos"))
        cache_features(Path(photos[0]).parent / "features", model, processor, rows)
        collate = ImagePromptCollator(processor)
        return lambda: collate([rows[index] for index in range(len(rows))])

    def caption_files(self) -> Callable[[], Any]:
        """Captions of photos on the disk, read by one process while another answers."""
        (model, processor), photos = self.captioner(), self.photos(self.sizes.files)
        prepack_weights(model.to(self.device, self.dtype), strict=False)
        count = self.sizes.new_tokens
        settings = {"batch_size": self.sizes.batch, "num_workers": 1, "max_new_tokens": count, "min_new_tokens": count}
        return lambda: list(stream_texts(model, processor, photos, **settings))

    def train_frozen(self) -> Callable[[], Any]:
        """As `train`, with a tower that does not learn."""
        self.model.set_trainable(vision=False)
        return self.train()

    def train_connector(self) -> Callable[[], Any]:
        """As `train`, with a connector that learns alone."""
        self.model.set_trainable(vision=False, text=False)
        return self.train()

    def train_frozen_from_features(self) -> Callable[[], Any]:
        """As `train_frozen`, with features, which are in memory, in the place of images."""
        self._encode_once()
        return self.train_frozen()

    def train_connector_from_features(self) -> Callable[[], Any]:
        """As `train_connector`, with features, which are in memory, in the place of images."""
        self._encode_once()
        return self.train_connector()

    def captioner(self) -> tuple[Any, Any]:
        """A model of the same sizes, in the place of the first, and its processor, whose tokenizer has few words."""
        tokenizer = train_tokenizer(["a photo of something"] * 10, 300)
        preprocessing = {"input_size": (3, self.sizes.image_size, self.sizes.image_size)}
        self.model, processor = compose(
            self.sizes.backbone,
            self.sizes.gpt2(),
            tokenizer=tokenizer,
            pretrained=False,
            preprocessing=preprocessing,
            num_image_tokens=self.image_tokens,
        )
        return self.model, processor

    def photos(self, count: int) -> list[str]:
        """Paths of as many JPEG files, of 500x375 pixels."""
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        pictures, paths = load_photos(None), [str(folder / f"{number}.jpg") for number in range(count)]
        for number, path in enumerate(paths):
            pictures[number % len(pictures)].save(path, quality=90)
        return paths

    def _encode_once(self) -> None:
        with torch.inference_mode():
            features = self.model.get_image_features(self.pixels).last_hidden_state
        self.features = features.clone()

    def inputs(self, text):
        inputs = super().inputs(text)
        if self.features is not None:
            del inputs["pixel_values"]
            inputs["image_features"] = self.features
        return inputs


class OursLongText(OursPooled):
    """As `OursPooled`, with texts of five times as many tokens."""

    def __init__(self, sizes: Sizes, dtype: str, device: str):
        super().__init__(replace(sizes, text_tokens=5 * sizes.text_tokens), dtype, device)


class OursSmallText(OursPooled):
    """As `OursPooled`, with a large tower (ViT-L/16) and a small language model."""

    def __init__(self, sizes: Sizes, dtype: str, device: str):
        if sizes.backbone != QUICK.backbone:
            text = {"text_width": 384, "text_layers": 6, "text_heads": 6}
            sizes = replace(LARGE, batch=sizes.batch, **text)
        super().__init__(sizes, dtype, device)


class Llava(Contestant):
    """transformers' LLaVA: a CLIP-style ViT, every patch through a two-layer MLP, an untied head."""

    def build(self):
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**self.sizes.vit()),
            text_config=self.sizes.gpt2(tie_word_embeddings=False),
            image_token_index=self.sizes.vocabulary - 1,
            image_seq_length=self.sizes.patches,
            vision_feature_layer=-1,
        )
        return LlavaForConditionalGeneration(config)


class EncoderDecoder(Contestant):
    """transformers' VisionEncoderDecoder: a ViT, and a GPT-2 with cross-attention to all of its tokens."""

    def build(self):
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            ViTConfig(**self.sizes.vit()), self.sizes.gpt2()
        )
        config.decoder_start_token_id = config.pad_token_id = 0
        return VisionEncoderDecoderModel(config)

    def inputs(self, text):
        return {"pixel_values": self.pixels[: len(text)]}

    def labelled(self):
        return self.inputs(self.text) | {"labels": self.text}

    def train_frozen(self) -> Callable[[], Any]:
        """As `train`, with an encoder that does not learn."""
        self.model.encoder.requires_grad_(False)
        return self.train()


class Loop(Contestant):
    """ClipCap's way: image by image, the whole row anew for every token, without a cache."""

    prefix_length = 10

    def build(self):
        import timm

        class Captioner(torch.nn.Module):
            def __init__(self, sizes: Sizes, prefix_length: int):
                super().__init__()
                self.vision = timm.create_model(sizes.backbone, img_size=sizes.image_size, num_classes=0)
                width = prefix_length * sizes.text_width
                self.mapper = torch.nn.Sequential(
                    torch.nn.Linear(sizes.vision_width, width // 2), torch.nn.Tanh(), torch.nn.Linear(width // 2, width)
                )
                self.text = GPT2LMHeadModel(sizes.gpt2())

        return Captioner(self.sizes, self.prefix_length)

    def generate(self):
        model = self.to_answer()

        @torch.no_grad()
        def caption() -> None:
            for pixels in self.pixels.split(1):
                row = model.mapper(model.vision(pixels)).view(1, self.prefix_length, -1)
                for _ in range(self.sizes.new_tokens):
                    token = model.text(inputs_embeds=row, use_cache=False).logits[:, -1].argmax(-1)
                    row = torch.cat([row, model.text.transformer.wte(token)[:, None]], dim=1)

        return caption


class Gpt2(Contestant):
    """transformers' GPT-2 alone."""

    def build(self):
        return GPT2LMHeadModel(self.sizes.gpt2())

    def decode(self):
        model = self.to_answer()
        length = self.sizes.patches + self.sizes.text_tokens  # as many positions as `Ours` has
        ids = self.text[:, :1].expand(-1, length)
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return _decoding(model, cache, torch.ones_like(ids))


class Bandwidth(Ours):
    """The floor of memory: what a step reads is read, and nothing is computed of it but sums."""

    def decode(self):
        cache = DynamicCache(config=self.model.config.text_config)
        self._fill(cache)
        read = [*self.model.model.language_model.parameters()]  # the head's weight is that of the token embeddings
        for layer in cache.layers:
            read += [layer.keys, layer.values]

        @torch.inference_mode()
        def step() -> None:
            for tensor in read:
                tensor.sum()

        return step


class GemmsPooled(OursPooled):
    """As `Gemms`, with the patches averaged to a quarter."""

    def train(self):
        return _products(super().train(), self.model)


class Gemms(Ours):
    """The usual floor: a work's matrix products alone, one behind the other, with the model's own weights."""

    def train(self):
        return _products(super().train(), self.model)

    def decode(self):
        return _products(super().decode(), self.model)


def _products(work: Callable[[], Any], model: torch.nn.Module) -> Callable[[], None]:
    """The matrix products of a work. One copy stands for all operands of its shape that are not weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copies: dict[Any, torch.Tensor] = {}
    calls: list[tuple[Any, list[Any]]] = []

    def operand(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in weights:
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = value.clone()
        return copies[key]

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            with self:  # a linear layer is not taken apart yet in inference mode
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                calls.append((func, [operand(value) for value in args]))
            return func(*args, **(kwargs or {}))

    with Recorder():
        work()

    @torch.inference_mode()
    def step() -> None:
        for product, operands in calls:
            product(*operands)

    return step


def _decoding(model: torch.nn.Module, cache: Any, mask: torch.Tensor) -> Callable[[], None]:
    """Steps behind a cache, which forgets each of them again."""
    length = int(cache.get_seq_length())
    mask = F.pad(mask, (0, 1), value=1)
    token = torch.ones(len(mask), 1, dtype=torch.long, device=mask.device)
    position = torch.full_like(token, length)

    @torch.inference_mode()
    def step() -> None:
        model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        if isinstance(cache, StaticCache):  # has no `crop`: the next step is written over this one
            for layer in cache.layers:
                layer.cumulative_length.sub_(1)
        else:
            cache.crop(-1)

    return step


KINDS = (
    *(Ours, OursPooled, OursLongText, OursSmallText),
    *(Llava, EncoderDecoder, Loop, Gpt2),
    *(Bandwidth, Gemms, GemmsPooled),
)
CONTESTANTS = {kind.__name__: kind for kind in KINDS}
