"""imageprompt beside what people pick instead, captioning Flickr8k from random weights on the same budget.

    python scripts/compare_captioners.py ../shared/data --output docs/results/flickr8k/peers.json

It trains and scores

- ours: imageprompt,
- ved: transformers' `VisionEncoderDecoderModel` with a ViT and a GPT-2 with cross-attention,
- llava: transformers' `LlavaForConditionalGeneration`, a CLIP-style ViT, all of its tokens through a 2-layer MLP,

each with as many parameters, on the same images, captions, augmentation and tokenizer (a BPE made of the training
captions), for the same CPU time on one thread. That is wall-clock time on a free core, and other work on the machine
does not change it. The learning rate follows the time: it rises, and falls to zero when the budget is spent.

What is in `SETTINGS` was chosen on the validation split, by trying lists of changes (`--changes`); the test split is
scored once. A result that is in the output file, with the same settings, is not computed again: to measure anew, name
another file.
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
VOCABULARY = 4096
CLIP = 1.0  # of the gradient's norm
DECODING = {"num_beams": 3, "max_new_tokens": 30}

# What changes may change: of all captioners, then of each.
COMMON: dict[str, Any] = {
    "image_size": 48,
    "warmup": 0.05,
    "weight_decay": 0.05,
    "augment": {},
    "text": {},
}
VIT = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {
        "batch_size": 16,
        "learning_rate": 1.5e-3,
        "texts_per_image": 3,
        "vision": "resnet10t",
        "model_args": {"stem_width": 16},
        "feature_layer": None,
        "connector": "mlp",
        "num_image_tokens": None,
        "fusion": "prefix",
    },
    "ved": {"batch_size": 16, "learning_rate": 1e-3, "patch_size": 16, "vit": VIT},
    "llava": {"batch_size": 16, "learning_rate": 1e-3, "patch_size": 16, "vit": VIT},
}
_FOR_COMPOSE = ("vision", "model_args", "feature_layer", "connector", "num_image_tokens", "fusion")


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


def build(name: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Captioner:
    """One of the captioners, from random weights. All share tokenizer and preprocessing."""
    ours = settings if name == "ours" else SETTINGS["ours"]  # for its processor
    image_size = settings["image_size"]
    text = GPT2Config(**TEXT | settings["text"], vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None)
    model, processor = compose(
        **{key: ours[key] for key in _FOR_COMPOSE},
        text=text,
        tokenizer=tokenizer,
        pretrained=False,
        preprocessing={"input_size": (3, image_size, image_size), "crop_pct": 1.0},
    )
    if name == "ours":
        return Captioner(model, processor)
    special = {f"{kind}_token_id": processor.tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    text = GPT2Config(**TEXT | settings["text"], vocab_size=model.config.vocab_size, **special)
    vit = settings["vit"] | {"patch_size": settings["patch_size"], "image_size": image_size}
    if name == "ved":
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**vit), text)
        config.decoder_start_token_id, config.pad_token_id = special["bos_token_id"], special["pad_token_id"]
        return EncoderDecoder(VisionEncoderDecoderModel(config), processor)
    patches = (image_size // settings["patch_size"]) ** 2
    text.tie_word_embeddings = False
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vit),
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


def train(captioner: Captioner, rows: Rows, minutes: float, settings: dict[str, Any]) -> dict[str, float]:
    """Train until the CPU time is spent; data loading counts."""
    model = captioner.model.train().to(memory_format=torch.channels_last)
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], fused=True)
    loader = DataLoader(rows, settings["batch_size"], shuffle=True, drop_last=True, collate_fn=captioner.batch)
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
                warmup = settings["warmup"]
                factor = share / warmup if share < warmup else (1 + math.cos(math.pi * share)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = settings["learning_rate"] * factor
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                steps += 1


@torch.inference_mode()
def test(captioner: Captioner, rows: Rows) -> dict[str, Any]:
    """Scores of the captions of all rows, and the loss of each row's first caption (mean over tokens, in nats)."""
    captioner.model.eval()
    captions: list[str] = []
    nats, tokens = 0.0, 0
    for start in tqdm(range(0, len(rows), 50), desc="captioning"):
        part = [rows[index] for index in range(start, min(start + 50, len(rows)))]
        captions += [text.strip() for text in captioner.generate([row["image"] for row in part])]
        batch = captioner.batch(part)
        count = int((batch["labels"] != -100).sum())
        nats += float(captioner.model(**batch).loss) * count
        tokens += count
    references = {index: rows.texts(index)[1] for index in range(len(rows))}
    return {
        "scores": caption_scores(dict(enumerate(captions)), references),
        "loss": nats / tokens,
        "distinct_captions": len(set(captions)),
    }


def settle(captioner: str, changes: dict[str, Any]) -> dict[str, Any]:
    """All settings of a captioner.

    Raises:
        ValueError: if there is nothing of a change's name to change.
    """
    settings = COMMON | SETTINGS[captioner]
    if unknown := sorted(changes.keys() - settings.keys()):
        raise ValueError(f"{captioner} has no {', '.join(unknown)} to change; it has {', '.join(settings)}.")
    return settings | changes


def run(plan: dict[str, Any], data: Path) -> dict[str, Any]:
    """Train one captioner as planned and test it on a split."""
    settings = plan["settings"]
    set_seed(plan["seed"])
    source = Source(str(data / "flickr8k"), suffix_column="captions")
    augment = augmentation((settings["image_size"],) * 2, settings["augment"])
    training = read_rows(source, "train", augment=augment, texts_per_image=settings.get("texts_per_image", 1))
    captions = [caption for index in range(len(training)) for caption in training.texts(index)[1]]
    captioner = build(plan["captioner"], settings, train_tokenizer(captions, VOCABULARY))
    spent = train(captioner, training, plan["minutes"], settings)
    found = test(captioner, read_rows(source, plan["split"], draw=False))
    return found | {"parameters": sum(p.numel() for p in captioner.model.parameters())} | spent


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for each captioner as it was changed, with means over seeds, and the lowest and highest. Changes
    that all have are not named."""

    def figures(values: list[float], form: str) -> str:
        spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):{form}}{spread}"

    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        own = {key: value for key, value in entry["changes"].items() if not _all_have(runs, key, value)}
        changes = ", ".join(f"{key}: {json.dumps(value)}" for key, value in own.items())
        rows.setdefault(f"{entry['captioner']}{changes and f' `{changes}`'}", []).append(entry)
    lines = [
        "| captioner | million parameters | passes | loss | BLEU-4 | CIDEr |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, entries in rows.items():
        cells = [f"{entries[0]['parameters'] / 1e6:.1f}", figures([entry["passes"] for entry in entries], ".1f")]
        cells.append(figures([entry["loss"] for entry in entries], ".3f"))
        cells += [figures([entry["scores"][score] for entry in entries], ".3f") for score in ("BLEU-4", "CIDEr")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _all_have(runs: list[dict[str, Any]], key: str, value: Any) -> bool:
    return all(key in entry["changes"] and entry["changes"][key] == value for entry in runs)


def main(
    data: Annotated[Path, typer.Argument(help="Folder that holds flickr8k.")],
    output: Annotated[Path, typer.Option(help="JSON file; what is in it is not computed again.")],
    minutes: Annotated[float, typer.Option(help="CPU time for training each model.")] = 6,
    seeds: Annotated[int, typer.Option(help="Runs of each model, with the seeds 0, 1, …")] = 3,
    captioners: Annotated[str, typer.Option(help="Which, with commas between.")] = "ours,ved,llava",
    changes: Annotated[Path | None, typer.Option(help="JSON list of changes of `SETTINGS`, each tried alone.")] = None,
    split: Annotated[str, typer.Option(help="Split to score: validation to choose by, test at the end.")] = "test",
) -> None:
    """Train, score, and write the results, one by one; then print them all."""
    torch.set_num_threads(1)
    result = json.loads(output.read_text()) if output.exists() else {"runs": []}
    for seed in range(seeds):
        for name in captioners.split(","):
            for change in json.loads(changes.read_text()) if changes else [{}]:
                plan = {"captioner": name, "changes": change, "seed": seed, "minutes": minutes, "split": split}
                plan |= {"settings": settle(name, change), "text": TEXT, "decoding": DECODING}
                if any(plan == {key: entry[key] for key in plan} for entry in result["runs"]):
                    continue
                found = run(plan, data)
                result["runs"].append(plan | found | provenance())
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["runs"]))


if __name__ == "__main__":
    typer.run(main)
