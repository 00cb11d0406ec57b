"""imageprompt beside what people pick instead, captioning Flickr8k from random weights on the same budget.

    python scripts/compare_captioners.py ../shared/data --output docs/results/flickr8k/peers.json
    python scripts/compare_captioners.py ../shared/data --captioners linear,mlp,mlp+cross_attention,… --seeds 1 \
        --image-size 128 --split validation --output docs/results/flickr8k/connectors.json

The first trains

- ours: imageprompt as in `OURS` below,
- ved: transformers' `VisionEncoderDecoderModel` with a ViT and a GPT-2 with cross-attention,
- llava: transformers' `LlavaForConditionalGeneration`, a CLIP-style ViT, all of its tokens through a 2-layer MLP,

each with as many parameters, on the same images, captions, augmentation and tokenizer (a BPE made of the training
captions), for the same CPU time on one thread. That is wall-clock time on a free core, and other work on the machine
does not change it. The learning rate follows the time: it rises, and falls to zero when the budget is spent. Whatever
is chosen is chosen on the validation split; the test split is scored once. The second compares ours with itself, with
other connectors, in the text or beside it. A result that is in the output file is not computed again.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    set_seed,
)

from imageprompt import ImagePromptCollator, ImagePromptProcessor, compose
from imageprompt.data.augmenting import augmentation
from imageprompt.data.rows import Rows, read_rows
from imageprompt.data.sources import Source
from imageprompt.evaluation import caption_scores
from imageprompt.provenance import provenance
from imageprompt.training.tokenizing import train_tokenizer

TEXT = {"n_layer": 2, "n_embd": 192, "n_head": 4, "n_positions": 160}
VIT = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024, "patch_size": 8}
OURS = {"vision": "resnet10t", "model_args": {"stem_width": 16}, "connector": "mlp"}
TEXTS_PER_IMAGE = 5  # of ours: the peers have no way to share an image
VOCABULARY = 4096
# Of 3e-4, 1e-3 and 2e-3, the best of each on the validation split (docs/results/flickr8k/pilot.json).
LEARNING_RATES = {"ours": 1e-3, "ved": 3e-4, "llava": 3e-4}
BATCH_SIZE, WARMUP, WEIGHT_DECAY, CLIP = 64, 0.05, 0.05, 1.0
DECODING = {"num_beams": 3, "max_new_tokens": 30}


@dataclass
class Captioner:
    """A model with what it takes to train it and to let it caption."""

    model: torch.nn.Module
    processor: ImagePromptProcessor

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Inputs with labels: (rows, positions)."""
        return dict(ImagePromptCollator(self.processor)(rows))

    def generate(self, images: list[Any]) -> list[str]:
        """One caption for each image."""
        inputs = self.processor(images=images, return_tensors="pt")
        ids = self.model.generate(**inputs, **DECODING)[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(ids, skip_special_tokens=True)


class EncoderDecoder(Captioner):
    """The library's encoder-decoder takes pixels and labels only, and starts captions itself."""

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        texts = [row["suffix"] + tokenizer.eos_token for row in rows]
        encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        return {"pixel_values": self._pixels([row["image"] for row in rows]), "labels": labels}

    def generate(self, images: list[Any]) -> list[str]:
        ids = self.model.generate(self._pixels(images), **DECODING)
        return self.processor.batch_decode(ids, skip_special_tokens=True)

    def _pixels(self, images: list[Any]) -> torch.Tensor:
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]


def build(name: str, tokenizer: PreTrainedTokenizerBase, image_size: int) -> Captioner:
    """One of the captioners, from random weights. All share tokenizer and preprocessing."""
    settings = dict(OURS)
    if name not in ("ours", "ved", "llava"):
        connector, *fusion = name.split("+")
        settings |= {"connector": connector, "fusion": fusion[0] if fusion else "prefix"}
    model, processor = compose(
        **settings,
        text=GPT2Config(**TEXT, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None),
        tokenizer=tokenizer,
        pretrained=False,
        preprocessing={"input_size": (3, image_size, image_size), "crop_pct": 1.0},
    )
    if name not in ("ved", "llava"):
        return Captioner(model, processor)
    special = {f"{kind}_token_id": processor.tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    text = GPT2Config(**TEXT, vocab_size=model.config.vocab_size, **special)
    if name == "ved":
        vision = ViTConfig(image_size=image_size, **VIT)
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
        config.decoder_start_token_id, config.pad_token_id = special["bos_token_id"], special["pad_token_id"]
        return EncoderDecoder(VisionEncoderDecoderModel(config), processor)
    patches = (image_size // VIT["patch_size"]) ** 2
    text.tie_word_embeddings = False
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=image_size, **VIT),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=patches,
        vision_feature_layer=-1,  # the layer before the last, its default, is for pretrained CLIP
    )
    peer = LlavaForConditionalGeneration(config)
    # The library would tie them by Llama's names, which GPT-2 does not have; untied, they would count twice.
    peer.lm_head.weight = peer.model.language_model.wte.weight
    peer.generation_config.update(**special, suppress_tokens=[processor.image_token_id])
    return Captioner(peer, ImagePromptProcessor(processor.image_processor, processor.tokenizer, patches))


def train(captioner: Captioner, rows: Rows, minutes: float, learning_rate: float) -> dict[str, float]:
    """Train until the CPU time is spent; data loading counts."""
    model = captioner.model.train().to(memory_format=torch.channels_last)
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    loader = DataLoader(rows, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=captioner.batch)
    budget, started, wall = 60 * minutes, time.process_time(), time.perf_counter()
    steps = 0
    with tqdm(total=round(budget), unit="s", desc="training") as bar:
        while True:
            for batch in loader:
                spent = time.process_time() - started
                if spent >= budget:
                    return {
                        "steps": steps,
                        "passes": steps / len(loader),
                        "cpu_seconds": spent,
                        "wall_seconds": time.perf_counter() - wall,
                    }
                bar.update(min(round(spent), bar.total) - bar.n)
                share = spent / budget
                factor = share / WARMUP if share < WARMUP else (1 + math.cos(math.pi * share)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * factor
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                steps += 1


@torch.inference_mode()
def caption(captioner: Captioner, rows: Rows) -> list[str]:
    """Captions of all rows, in order."""
    captioner.model.eval()
    captions: list[str] = []
    for start in tqdm(range(0, len(rows), 50), desc="captioning"):
        images = [rows[index]["image"] for index in range(start, min(start + 50, len(rows)))]
        captions += [text.strip() for text in captioner.generate(images)]
    return captions


def run(name: str, data: Path, split: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one captioner and score its captions of a split."""
    set_seed(settings["seed"])
    source = Source(str(data / "flickr8k"), suffix_column="captions")
    together = 1 if name in ("ved", "llava") else TEXTS_PER_IMAGE
    augment = augmentation((settings["image_size"],) * 2)
    training = read_rows(source, "train", augment=augment, texts_per_image=together)
    captions = [caption for index in range(len(training)) for caption in training.texts(index)[1]]
    captioner = build(name, train_tokenizer(captions, VOCABULARY), settings["image_size"])
    spent = train(captioner, training, settings["minutes"], settings["learning_rate"])
    rows = read_rows(source, split, draw=False)
    captions = caption(captioner, rows)
    references = {index: rows.texts(index)[1] for index in range(len(rows))}
    return {
        "scores": caption_scores(dict(enumerate(captions)), references),
        "distinct_captions": len(set(captions)),
        "parameters": sum(p.numel() for p in captioner.model.parameters()),
        **spent,
    }


def main(
    data: Annotated[Path, typer.Argument(help="Folder that holds flickr8k.")],
    output: Annotated[Path, typer.Option(help="JSON file; what is in it is not computed again.")],
    minutes: Annotated[float, typer.Option(help="CPU time for training each model.")] = 20,
    seeds: Annotated[int, typer.Option(help="Runs of each model, with the seeds 0, 1, …")] = 3,
    captioners: Annotated[str, typer.Option(help="Which, with commas between.")] = "ours,ved,llava",
    learning_rates: Annotated[str | None, typer.Option(help="Try these instead, with commas between.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels a side.")] = 64,
    split: Annotated[str, typer.Option(help="Split to score: validation to choose by, test at the end.")] = "test",
) -> None:
    """Train, score, and write the results, one by one."""
    torch.set_num_threads(1)
    result = json.loads(output.read_text()) if output.exists() else {"runs": []}
    for seed in range(seeds):
        for name in captioners.split(","):
            rates = (
                map(float, learning_rates.split(","))
                if learning_rates
                else [LEARNING_RATES.get(name, LEARNING_RATES["ours"])]
            )
            for rate in rates:
                settings = {"captioner": name, "seed": seed, "minutes": minutes, "learning_rate": rate}
                settings |= {"image_size": image_size, "split": split}
                if any(settings == {key: entry[key] for key in settings} for entry in result["runs"]):
                    continue
                found = run(name, data, split, settings)
                result["runs"].append(settings | found)
                result |= {"decoding": DECODING, "batch_size": BATCH_SIZE, **provenance()}
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(result, indent=2) + "\n")
                print(json.dumps(settings | found["scores"] | {"steps": found["steps"]}))


if __name__ == "__main__":
    typer.run(main)
