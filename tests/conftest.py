"""What the tests share: a tokenizer trained on the spot, tiny random parts, and pictures made of noise."""

import gc
import json
import os
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as DatasetImage
from hub_server import HubServer
from PIL import Image, ImageDraw
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, set_seed

from imageprompt import compose
from imageprompt.training.tokenizing import train_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that share cores with other work wait for each other; tiny models gain nothing from them.
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
torch.set_num_threads(1)
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# One backbone per feature layout, small enough for a test: (timm name, timm keywords, input size).
BACKBONES = {
    "NCHW": ("resnet10t", {}, (3, 64, 64)),
    "NLC": ("vit_tiny_patch16_224", {"depth": 2}, (3, 64, 64)),
    "NHWC": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 6)},
        (3, 64, 64),
    ),
}

# Plain colours: a random backbone tells them apart better than two pictures of noise.
RED, GREEN, BLUE, WHITE = (Image.new("RGB", (70, 90), colour) for colour in ("red", "green", "blue", "white"))

# What travels with a checkpoint.
CODE = {
    f"{name}.py"
    for name in (
        "activations",
        "checkpoints",
        "configuration",
        "connectors",
        "decoding",
        "fusion",
        "image_processing",
        "linear",
        "modeling",
        "prefix",
        "processing",
        "vision",
    )
}


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Every training collects garbage, which need not look through all that is imported: half a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub of our own, to which the client in this process speaks, logged in as ada."""
    constants, home = huggingface_hub.constants, tmp_path / "hub home"
    server = HubServer()
    home.mkdir()
    with server.running():
        # What HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_XET and HF_HOME set where the library is imported anew.
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before it asks again
        monkeypatch.setenv("HF_TOKEN", "hf_ada")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield server


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real data beside the repository, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of GPT-2's kind with 400 tokens."""
    corpus = ["A photo of a dog!", "Two cats on a red sofa.", "What is it? It is the number seven.", "User: Assistant:"]
    return train_tokenizer(corpus, vocab_size=400)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    """(data set folder with eight images and their captions in train and validation, tokenizer folder)."""
    root = tmp_path_factory.mktemp("data")
    rows = {"image": [picture(seed) for seed in range(8)], "captions": [["A dog!", "Two cats."]] * 8}
    data = Dataset.from_dict(rows).cast_column("image", DatasetImage())
    (root / "data").mkdir()
    for split in ("train", "validation"):
        data.to_parquet(root / "data" / f"{split}.parquet")
    tokenizer.save_pretrained(root / "tokenizer")
    return root / "data", root / "tokenizer"


def tiny_gpt2(**overrides) -> GPT2Config:
    """Two narrow layers without dropout, so that training mode and eval mode agree."""
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256, "vocab_size": 400}
    settings |= {"bos_token_id": 0, "eos_token_id": 0}
    settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**settings | overrides)


def tiny(tokenizer, layout: str = "NCHW", text_config: GPT2Config | None = None, **settings):
    """(model, processor) around the small backbone of that layout, from random weights."""
    name, model_args, input_size = BACKBONES[layout]
    settings = {"preprocessing": {"input_size": input_size}, "model_args": model_args, "num_image_tokens": 4} | settings
    return compose(name, text_config or tiny_gpt2(), tokenizer=tokenizer, pretrained=False, **settings)


def picture(seed: int = 0, size: tuple[int, int] = (70, 90), mode: str = "RGB") -> Image.Image:
    """Noise of (height, width), the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def max_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first.float() - second.float()).abs().max().item()


def batch_inputs(processor, rows, **kwargs):
    """Rows of (images, text) as one padded batch."""
    images, texts = [images for images, _ in rows], [text for _, text in rows]
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


def row_inputs(processor, row):
    """A row of (images, text) alone, without padding."""
    images, text = row
    return processor(images=[images] if images else None, text=[text], return_tensors="pt")


# --- generation: the plainest loop there is, to compare with

NEW_TOKENS = 6


@torch.no_grad()
def reference_greedy(model, inputs, logits_of=None, new_tokens=NEW_TOKENS):
    """New tokens of one row, without cache, batch or `generate`; `logits_of` a row are by default the model's own."""
    logits_of = logits_of or (lambda row: model(**row, use_cache=False).logits)
    ids, new = inputs["input_ids"], []
    images = {name: inputs[name] for name in ("pixel_values",) if name in inputs}
    while len(new) < new_tokens:
        logits = logits_of({"input_ids": ids, **images})[0, -1]
        logits[model.config.image_token_id] = float("-inf")
        new.append(logits.argmax().item())
        if new[-1] == model.generation_config.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return new


def lively(tokenizer, layout="NCHW", **settings):
    """(model, processor) whose logits vary enough that a wrong image or position changes the words."""
    model, processor = tiny(tokenizer, layout, text_config=tiny_gpt2(initializer_range=0.2), **settings)
    for parameter in model.model.connector.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    return model, processor


def count_tower_calls(model) -> list[int]:
    """A list that grows by the number of images of every call of the vision tower."""
    calls = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    return calls


def new_tokens(model, inputs, **kwargs):
    """What `generate` adds to each sequence, without the padding that follows an end."""
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
    output, eos = output[:, inputs["input_ids"].shape[1] :].tolist(), model.generation_config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in output]


def gpt2_of(model) -> GPT2LMHeadModel:
    """The library's GPT-2 with this model's weights."""
    gpt2 = GPT2LMHeadModel(model.config.text_config).eval()
    gpt2.transformer.load_state_dict(model.model.language_model.state_dict())
    gpt2.tie_weights()
    return gpt2


# --- a user's folder: pictures that can be learnt, with tables beside them

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (230, 210, 60)}
SHAPES = {"square": "rectangle", "circle": "ellipse"}


def make_photos(folder: Path, count: int = 20) -> Path:
    """A folder of drawn shapes with captions.csv, questions.json and classes.csv, in no order."""
    folder.mkdir(parents=True)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    random = np.random.default_rng(0)
    captions, questions, classes = ["file,caption"], [], ["file,shape"]
    for number in range(count):
        colour, shape = kinds[number % len(kinds)]
        image = Image.new("RGB", (64, 64), (240, 240, 240))
        left, top = (int(edge) for edge in random.integers(4, 24, 2))
        getattr(ImageDraw.Draw(image), SHAPES[shape])((left, top, left + 34, top + 34), fill=COLOURS[colour])
        file = f"{number:02}.png"
        image.save(folder / file)
        captions.append(f"{file},A {colour} {shape}.")
        classes.append(f"{file},{shape}")
        questions.append({"file": file, "question": "What colour is it?", "answer": colour})
        questions.append({"file": file, "question": "What shape is it?", "answer": shape})
    (folder / "captions.csv").write_text("\n".join(captions) + "\n")
    (folder / "classes.csv").write_text("\n".join(classes) + "\n")
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder
