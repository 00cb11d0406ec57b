"""imageprompt beside what people pick instead, and beside the machine's limit: time and memory of the same work.

    python scripts/benchmark.py --output docs/speed/benchmark.json

The contestants are in `CONTESTANTS`, what they do in `WORKS`. All have random weights of the same sizes (ViT-S/16 at
224 pixels with GPT-2's 124 million parameters), the same batch and the same dtype. Each runs in a process of its own,
so that its peak memory is its own, and the processes take turns, one repeat each, so that what else the machine does
falls on all alike: what counts is the ratio of the medians. A picture of the ratios is drawn beside the file.

For a GPU, larger ones, and how much of its arithmetic is used (of the peak that its maker states, 989 TFLOP/s for an
H100 in bf16):

    python scripts/benchmark.py --large --dtypes bf16 --peak-tflops 989 --output docs/speed/gpu.json

`--quick` takes tiny models, to see that all runs; no time is looked at.
"""

import atexit
import json
import math
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from imageprompt import ImagePromptConfig, ImagePromptForConditionalGeneration
from imageprompt.provenance import provenance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    text_tokens: int = 24
    new_tokens: int = 32
    questions: int = 16

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
)


class Contestant(ABC):
    """A model of the given sizes, with the inputs of every work. What a work does is a method of its name."""

    def __init__(self, sizes: Sizes, dtype: str, device: str):
        self.sizes, self.dtype, self.device = sizes, DTYPES[dtype], device
        torch.manual_seed(0)
        self.model = self.build().to(device)
        self.text = torch.randint(1, sizes.vocabulary - 1, (sizes.batch, sizes.text_tokens), device=device)
        self.pixels = torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size, device=device)

    @abstractmethod
    def build(self) -> torch.nn.Module: ...

    @property
    def image_tokens(self) -> int:
        """Positions that an image takes in the text."""
        return self.sizes.patches

    def inputs(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes for these texts, (rows, tokens), each behind an image."""
        images = text.new_full((len(text), self.image_tokens), self.sizes.vocabulary - 1)
        ids = torch.cat([images, text], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels[: len(text)]}

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
        model, batch = self.model.train(), self.labelled()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def step() -> None:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                loss = model(**batch).loss
            loss.backward()
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

    def decode(self) -> Callable[[], Any]:
        """The step for one more token of each row."""
        model, inputs = self.to_answer(), self.inputs(self.text)
        with torch.inference_mode():
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        return _decoding(model, cache, inputs["attention_mask"])


class OursPooled(Ours):
    """As `Ours`, with the patches averaged to a quarter: what the README composes."""

    @property
    def image_tokens(self):
        return self.sizes.patches // 4

    def train_frozen(self) -> Callable[[], Any]:
        """As `train`, with a tower that does not learn."""
        self.model.set_trainable(vision=False)
        return self.train()

    def train_connector(self) -> Callable[[], Any]:
        """As `train`, with a connector that learns alone."""
        self.model.set_trainable(vision=False, text=False)
        return self.train()

    def train_frozen_from_features(self) -> Callable[[], Any]:
        """As `train_frozen`, from the second epoch on with `--feature_cache`."""
        self._encode_once()
        return self.train_frozen()

    def train_connector_from_features(self) -> Callable[[], Any]:
        """As `train_connector`, from the second epoch on with `--feature_cache`."""
        self._encode_once()
        return self.train_connector()

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


class Gemms(Contestant):
    """The floor of a decoding step: its matrix products alone, with weights of the model's own layout."""

    def build(self):
        return GPT2LMHeadModel(self.sizes.gpt2())

    def decode(self):
        model = self.to_answer()
        rows, wide = (
            torch.randn(self.sizes.batch, width, device=self.device, dtype=self.dtype)
            for width in (self.sizes.text_width, 4 * self.sizes.text_width)
        )

        @torch.inference_mode()
        def step() -> None:
            for block in model.transformer.h:
                for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc):
                    torch.addmm(layer.bias, rows, layer.weight)
                torch.addmm(block.mlp.c_proj.bias, wide, block.mlp.c_proj.weight)
            F.linear(rows, model.lm_head.weight)

        return step


def _decoding(model: torch.nn.Module, cache: Any, mask: torch.Tensor) -> Callable[[], None]:
    """Steps behind a cache, which is cut to its length again after each."""
    length = cache.get_seq_length()
    mask = F.pad(mask, (0, 1), value=1)
    token = torch.ones(len(mask), 1, dtype=torch.long, device=mask.device)
    position = torch.full_like(token, length)

    @torch.inference_mode()
    def step() -> None:
        model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


KINDS = (Ours, OursPooled, OursSmallText, Llava, EncoderDecoder, Loop, Gpt2, Gemms)
CONTESTANTS = {kind.__name__: kind for kind in KINDS}
# Who does what; the first is what the others are compared with.
WORKS: dict[str, list[tuple[str, str]]] = {
    "train, all image tokens": [("Ours", "train"), ("Llava", "train")],
    "train, a quarter of the tokens": [("OursPooled", "train"), ("EncoderDecoder", "train")],
    "train, a frozen tower": [
        ("OursPooled", "train_frozen"),
        ("EncoderDecoder", "train_frozen"),
        ("OursPooled", "train_frozen_from_features"),
    ],
    "train, the connector alone": [
        ("OursPooled", "train_connector"),
        ("OursPooled", "train_connector_from_features"),
    ],
    "train, a frozen tower larger than the text": [
        ("OursSmallText", "train_frozen"),
        ("OursSmallText", "train_frozen_from_features"),
    ],
    "generate": [(name, "generate") for name in ("OursPooled", "Ours", "Llava", "EncoderDecoder", "Loop")],
    "decode a token": [("Ours", "decode"), ("Gpt2", "decode"), ("Gemms", "decode")],
    "questions about one image": [
        ("Ours", "questions_together_behind_a_prefix"),
        ("Ours", "questions_behind_a_prefix"),
        ("Ours", "questions_one_by_one"),
    ],
    "cold start": [("Ours", "cold_start"), ("Llava", "cold_start"), ("EncoderDecoder", "cold_start")],
}


def _serve(pipe: Any, name: str, method: str, sizes: Sizes, dtype: str, device: str, threads: int) -> None:
    """A contestant's process: one repeat for every message, answered with its seconds and the peak memory so far."""
    torch.set_num_threads(threads)
    work = getattr(CONTESTANTS[name](sizes, dtype, device), method)()
    with FlopCounterMode(display=False) as counter:
        work()  # not timed: allocations and kernels' first calls
    pipe.send(counter.get_total_flops())
    work()  # without the counter
    while pipe.recv():
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak()
        pipe.send((seconds, peak))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(work: str, sizes: Sizes, dtype: str, device: str, repeats: int, threads: int) -> list[dict[str, Any]]:
    """All contestants of a work, in turns: (median, lowest and highest) seconds, peak bytes of the process, and the
    floating-point operations of its matrix products, convolutions and attention."""
    context = multiprocessing.get_context("spawn")
    contests = []
    for name, method in WORKS[work]:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, name, method, sizes, dtype, device, threads), daemon=True
        )
        process.start()
        theirs.close()
        flops = ours.recv()  # an EOFError if it could not be built
        contests.append((name, method, flops, ours, process))
    seconds: list[list[float]] = [[] for _ in contests]
    peaks = [0] * len(contests)
    for _ in tqdm(range(repeats), desc=f"{work}, {dtype}"):
        for number, (*_, pipe, _process) in enumerate(contests):
            pipe.send(True)
            taken, peaks[number] = pipe.recv()
            seconds[number].append(taken)
    for *_, pipe, process in contests:
        pipe.send(False)
        process.join()
    first = statistics.median(seconds[0])
    return [
        {
            "work": work,
            "contestant": name,
            "method": method,
            "dtype": dtype,
            "seconds": {"median": statistics.median(taken), "lowest": min(taken), "highest": max(taken)},
            "times_the_first": statistics.median(taken) / first,
            "peak_bytes": peak,
            "peak_times_the_first": peak / peaks[0],
            "flops": flops,
        }
        for (name, method, flops, *_), taken, peak in zip(contests, seconds, peaks, strict=True)
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contestant of each work."""
    lines = [
        "| work | dtype | contestant | seconds (lowest to highest) | times the first | peak GB | TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in results:
        seconds = entry["seconds"]
        lines.append(
            f"| {entry['work']} | {entry['dtype']} | {entry['contestant']}: {entry['method']} "
            f"| {seconds['median']:.3g} ({seconds['lowest']:.3g} to {seconds['highest']:.3g}) "
            f"| {entry['times_the_first']:.2f} | {entry['peak_bytes'] / 1e9:.1f} "
            f"| {entry['flops'] / seconds['median'] / 1e12:.3g} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A picture of how many times the first contestant's seconds each takes, a panel for each work."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((entry["work"], entry["dtype"]) for entry in results))
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 1 + 1.6 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        entries = [entry for entry in results if (entry["work"], entry["dtype"]) == panel][::-1]
        names = [f"{entry['contestant']}: {entry['method']}" for entry in entries]
        bars = axes.barh(names, [entry["times_the_first"] for entry in entries])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(1, color="grey", linewidth=0.5)
        axes.set_title(", ".join(panel), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=120)


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results; a picture is beside it.")] = None,
    works: Annotated[str, typer.Option(help="Which, with commas between: parts of their names.")] = "",
    dtypes: Annotated[str, typer.Option(help="Which, with commas between.")] = "fp32,bf16",
    repeats: Annotated[int, typer.Option(help="Of each work and contestant.")] = 7,
    large: Annotated[bool, typer.Option("--large", help="ViT-L/16 and GPT-2 medium, for a GPU.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: to see that all runs, not how fast.")] = False,
    peak_tflops: Annotated[float | None, typer.Option(help="Of the device, to say how much of it is used.")] = None,
) -> None:
    """Time all, write the results after each work, and print them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, threads = QUICK if quick else LARGE if large else REFERENCE, torch.get_num_threads()
    chosen = [work for work in WORKS if not works or any(part and part in work for part in works.split(","))]
    result: dict[str, Any] = {"sizes": asdict(sizes), "threads": threads, "repeats": repeats, "runs": []}
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for work in chosen:
        for dtype in dtypes.split(","):
            runs = compare(work, sizes, dtype, device, repeats, threads)
            for entry in runs if peak_tflops is not None else []:
                entry["model_flops_utilization"] = entry["flops"] / entry["seconds"]["median"] / 1e12 / peak_tflops
            result["runs"] += runs
            result |= provenance()
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(result, indent=2) + "\n")
    if output is not None:
        draw(result["runs"], output.with_suffix(".png"))
    print(table(result["runs"]))


if __name__ == "__main__":
    typer.run(main)
