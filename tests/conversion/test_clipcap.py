"""ClipCap's checkpoints, in tiny: the converted model is the reference, in logits and captions."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from clipcap_reference import CLIP, MLP, ClipCap, ModifiedResNet, TransformerMapper, VisionTransformer, beams, greedy
from conftest import max_difference, picture, tiny_gpt2
from PIL import Image
from timm.models import save_for_hf
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection, GPT2LMHeadModel
from typer.testing import CliRunner

import imageprompt.conversion.clipcap as clipcap_module
from imageprompt import ImagePromptConfig, ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.cli import app
from imageprompt.connectors import build_connector
from imageprompt.conversion.clip import PREPROCESSING, clip_tower, openai_transform
from imageprompt.conversion.clipcap import TOWERS, _read_mapper, clipcap_beam_search, convert_clipcap
from imageprompt.conversion.conversion import Conversion
from imageprompt.image_processing import ImagePromptImageProcessor
from imageprompt.vision import hub_id, resolve_backbone

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-checkpoint.md"
WIDTH, SIZE, NEW_TOKENS = 32, 64, 10


def blots(seed, size):
    """Four bright colours that run into each other: pictures that differ more than noise does."""
    colours = 255 * np.random.default_rng(seed).integers(0, 2, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


PICTURES = [blots(seed, size) for seed, size in enumerate([(70, 90), (200, 64), (64, 64), (333, 120)])]

# Encoders in the layout of ViT-B/32 and RN50x4, and the timm keywords that make a tower as small.
ENCODERS = {
    "ViT-B/32": (
        lambda: VisionTransformer(SIZE, 32, 128, 2, 512),
        "vit_base_patch32_clip_quickgelu_224",
        {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": SIZE},
    ),
    "RN50x4": (
        lambda: ModifiedResNet(SIZE, (4, 6, 10, 6), 16, 640),
        "resnet50x4_clip",
        {"width_factor": 0.25, "img_size": SIZE},
    ),
}


@dataclass
class Published:
    """Files as they are published, and what is in them."""

    clip: CLIP
    clipcap: ClipCap
    normalize: bool
    options: dict  # of `convert_clipcap`
    checkpoint: Path

    def prefix(self, *pictures):
        pixels = torch.stack([openai_transform(SIZE)(each) for each in pictures])
        embedding = self.clip(pixels)
        if self.normalize:
            embedding = embedding / embedding.norm(2, -1, keepdim=True)
        return self.clipcap.prefix(embedding)


def publish(
    folder, tokenizer, encoder="ViT-B/32", mapper=None, length=10, normalize=False, script=False, with_gpt=True, dot=1.5
):
    """Random weights of the exact layouts. `script`: CLIP as a TorchScript archive in half precision, as OpenAI's."""
    make, architecture, model_args = ENCODERS[encoder]
    clip = CLIP(make()).train()
    for module in clip.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of the pictures, without which they would all look alike
    with torch.no_grad():
        clip(torch.stack([openai_transform(SIZE)(each) for each in PICTURES]))
    for module in clip.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.clamp_(min=0.3)  # dividing by less would blow up rounding
    clip.eval()
    size = 512 if encoder == "ViT-B/32" else 640
    clipcap = ClipCap(mapper or MLP(size, WIDTH, length), length, tiny_gpt2(vocab_size=len(tokenizer))).eval()
    with torch.no_grad():  # weights as large as those of a model that has learnt: it says different things, and ends
        for parameter in clipcap.gpt.transformer.parameters():
            if parameter.ndim == 2:
                parameter *= 10
        clipcap.gpt.transformer.wte.weight[stop_of(tokenizer)] *= dot

    folder.mkdir(exist_ok=True)
    if script:
        clip.half()
        torch.jit.save(torch.jit.trace(clip, torch.zeros(1, 3, SIZE, SIZE).half()), folder / "clip.pt")
        clip.float()
    else:
        torch.save(clip.state_dict(), folder / "clip.pt")
    tensors = clipcap.state_dict()
    tensors["gpt.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)  # as older versions saved
    tensors["gpt.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save({name: tensors[name] for name in tensors if with_gpt or "gpt" not in name}, folder / "clipcap.pt")
    (folder / "tower").mkdir()
    cfg = {"input_size": [3, SIZE, SIZE], "fixed_input_size": True}
    described = {"architecture": architecture, "model_args": model_args, "pretrained_cfg": cfg}
    (folder / "tower" / "config.json").write_text(json.dumps(described))
    gpt = clipcap.gpt if not with_gpt else GPT2LMHeadModel(clipcap.gpt.config)
    gpt.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    options = {"vision": folder / "tower", "clip": folder / "clip.pt", "text": folder / "gpt2"}
    options |= {"normalize": True} if normalize else {}
    return Published(clip, clipcap, normalize, options, folder / "clipcap.pt")


def stop_of(tokenizer):
    return tokenizer.encode(".")[0]


VARIANTS = {
    "MLP, prefix 10, ViT-B/32": {},
    "MLP, prefix 40, ViT-B/32, no GPT-2 in the file": {"length": 40, "with_gpt": False},
    "transformer, prefix 40 of 10, ViT-B/32 from TorchScript, normalised": {
        "mapper": lambda: TransformerMapper(512, WIDTH, 40, 10, 8),
        "length": 40,
        "normalize": True,
        "script": True,
    },
    "transformer, prefix 40 of 40, RN50x4, normalised": {
        "encoder": "RN50x4",
        "mapper": lambda: TransformerMapper(640, WIDTH, 40, 40, 8),
        "length": 40,
        "normalize": True,
    },
    "MLP, prefix 10, RN50x4": {"encoder": "RN50x4", "mapper": lambda: MLP(640, WIDTH, 10)},
}
SLOW = "MLP, prefix 10, RN50x4"


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == SLOW)) for name in VARIANTS]
)
def variant(request, tmp_path_factory, tokenizer) -> tuple[Published, Conversion]:
    torch.manual_seed(0)
    settings = VARIANTS[request.param]
    settings = settings | {"mapper": settings["mapper"]()} if "mapper" in settings else settings
    published = publish(tmp_path_factory.mktemp("clipcap"), tokenizer, **settings)
    return published, convert_clipcap(published.checkpoint, **published.options)


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer) -> Published:
    torch.manual_seed(0)
    return publish(tmp_path_factory.mktemp("published"), tokenizer, dot=3)


@torch.no_grad()
def test_logits_are_those_of_the_reference(variant):
    published, converted = variant
    ids = torch.randint(0, converted.model.config.image_token_id, (1, 12)).expand(len(PICTURES), -1)
    inputs = converted.processor(images=PICTURES, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == published.clipcap.length
    logits = converted.model(torch.cat([inputs["input_ids"], ids], 1), pixel_values=inputs["pixel_values"]).logits
    expected = published.clipcap.logits(published.prefix(*PICTURES), ids)
    assert expected.std() > 1
    assert max_difference(expected[0], expected[1]) > 1e-3  # the pictures matter
    assert max_difference(logits[..., : expected.shape[-1]], expected) <= 1e-5
    assert converted.differences["float64"].absolute < 1e-10
    assert converted.differences["float32"].absolute <= 1e-5


def new_tokens(converted, picture, **kwargs):
    """What `generate` adds, up to the first end."""
    inputs = converted.processor(images=picture, return_tensors="pt")
    row = converted.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **kwargs)[0, inputs["input_ids"].shape[1] :]
    return up_to(row.tolist(), stop_of(converted.processor.tokenizer))


def up_to(tokens, *ends):
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), None)]


@torch.no_grad()
def test_captions_are_those_of_the_reference(variant):
    published, converted = variant
    tokenizer = converted.processor.tokenizer
    stop = stop_of(tokenizer)
    for each in PICTURES:
        caption = greedy(published.clipcap, published.prefix(each), stop, NEW_TOKENS)
        assert new_tokens(converted, each, eos_token_id=stop) == caption
        assert new_tokens(converted, each) == up_to(caption, tokenizer.eos_token_id)
    for each in PICTURES[:2]:
        prefix = published.prefix(each)
        own = new_tokens(converted, each, num_beams=5, custom_generate=clipcap_beam_search, eos_token_id=stop)
        assert own == beams(published.clipcap, prefix, stop, NEW_TOKENS)[0][1]
        expected = published.clipcap.gpt.generate(
            inputs_embeds=prefix, num_beams=5, max_new_tokens=NEW_TOKENS, eos_token_id=stop, pad_token_id=0
        )
        assert new_tokens(converted, each, num_beams=5, eos_token_id=stop) == up_to(expected[0].tolist(), stop)


def test_captions_differ_and_some_end_among_the_beams(published):
    """Otherwise the comparisons of captions would compare little."""
    converted = convert_clipcap(published.checkpoint, **published.options)
    stop = stop_of(converted.processor.tokenizer)
    ended, best = 0, []
    for each in PICTURES:
        reference = beams(published.clipcap, published.prefix(each), stop, NEW_TOKENS)
        inputs = converted.processor(images=each, return_tensors="pt")
        sequences = converted.model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            num_beams=5,
            num_return_sequences=5,
            eos_token_id=stop,
            custom_generate=clipcap_beam_search,
        )
        rows = [up_to(row, stop) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        assert rows == [ids for _, ids in reference]
        ended += sum(ids[-1] == stop for _, ids in reference)
        best.append(reference[0][1])
    assert 0 < ended < 5 * len(PICTURES)
    assert best[0] != best[-1]
    with pytest.raises(ValueError, match="one row at a time"):
        inputs = converted.processor(images=PICTURES[:2], return_tensors="pt")
        converted.model.generate(**inputs, num_beams=5, custom_generate=clipcap_beam_search)


def test_beams_are_clipcaps_however_likely_the_placeholder_is(published):
    """The word that is new here, and never said, takes no share of the probability of the others."""
    converted = convert_clipcap(published.checkpoint, **published.options)
    stop = stop_of(converted.processor.tokenizer)
    words = converted.model.get_input_embeddings().weight.data
    words[converted.model.config.image_token_id] = 1.5 * words[stop]
    for each in [*PICTURES, *(blots(seed, (70, 90)) for seed in range(10, 16))]:
        reference = beams(published.clipcap, published.prefix(each), stop, NEW_TOKENS)
        inputs = converted.processor(images=each, return_tensors="pt")
        settings = {"num_beams": 5, "num_return_sequences": 5, "custom_generate": clipcap_beam_search}
        ids = converted.model.generate(**inputs, **settings, max_new_tokens=NEW_TOKENS, eos_token_id=stop)
        rows = [up_to(row, stop) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        assert rows == [ids for _, ids in reference]


TEXT_PART = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip_of_transformers(folder, **settings):
    """A CLIP as large as the tiny ViT-B/32, with its text part, as transformers saves it."""
    torch.manual_seed(3)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIZE, "patch_size": 32, "projection_dim": 512} | settings
    text = TEXT_PART | {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "projection_dim": 512}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_clip_may_come_from_a_folder_of_transformers(published, tmp_path):
    clip_of_transformers(tmp_path / "clip")
    converted = convert_clipcap(published.checkpoint, **published.options | {"clip": tmp_path / "clip"})
    assert converted.differences["float64"].absolute < 1e-10
    encoder = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    embeddings = encoder(torch.stack([openai_transform(SIZE)(each) for each in PICTURES])).image_embeds
    ids = torch.randint(0, converted.model.config.image_token_id, (len(PICTURES), 12))
    inputs = converted.processor(images=PICTURES, return_tensors="pt")
    logits = converted.model(torch.cat([inputs["input_ids"], ids], 1), pixel_values=inputs["pixel_values"]).logits
    expected = published.clipcap.logits(published.clipcap.prefix(embeddings), ids)
    assert max_difference(logits[..., : expected.shape[-1]], expected) <= 1e-5
    assert max_difference(embeddings[0], embeddings[1]) > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, r"CLIP in .* and of CLIP as OpenAI defines it differ.*quick_gelu, and heads of 64"),
        ({"num_attention_heads": 4}, "CLIP as OpenAI defines it differ"),
        ({"hidden_size": 64, "num_attention_heads": 1}, "The CLIP file does not fit|its patches and positions are"),
    ],
    ids=["activation", "heads", "width"],
)
def test_a_clip_that_is_not_openais_is_refused(published, tmp_path, settings, message):
    clip_of_transformers(tmp_path / "clip", **settings)
    with pytest.raises(ValueError, match=message):
        convert_clipcap(published.checkpoint, **published.options | {"clip": tmp_path / "clip"})


def test_what_it_was_made_of_is_remembered(published, tmp_path, hub):
    """Parts on the Hub, each at its revision, and what the command says of them."""
    assert convert_clipcap(published.checkpoint, **published.options).model.config.base_models is None
    assert hub_id(resolve_backbone(TOWERS[512])) == "timm/vit_base_patch32_clip_224.openai"
    clip_of_transformers(tmp_path / "clip")
    revisions = {}
    for name, folder in (("ada/clip", tmp_path / "clip"), ("ada/gpt2", published.options["text"])):
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})
        revisions[name] = hub.repos[name].refs["main"]
        hub.add(name, {"README.md": b"nothing else is left"})
    command = ["convert", "clipcap", published.checkpoint, tmp_path / "out", "--vision", published.options["vision"]]
    command += ["--clip", "ada/clip", "--clip-revision", revisions["ada/clip"]]
    command += ["--text", "ada/gpt2", "--text-revision", revisions["ada/gpt2"]]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.exception
    config = ImagePromptConfig.from_pretrained(tmp_path / "out")
    assert config.base_models == {"vision": "ada/clip", "text": "ada/gpt2"}
    assert "CLIP is vit_base_patch32_clip_quickgelu_224 with the weights of ada/clip.\n" in result.output
    said = "The length of its embedding of 512 numbers is left as it is, and mapped to 10 tokens by clipcap_mlp."
    assert f"\n{said}\n" in result.output
    assert re.search(r"Logits differ from ClipCap's by up to \S+e-1\d in float64 .* in float32", result.output)


def test_a_file_that_is_there_is_not_overwritten(published, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["convert", "clipcap", str(published.checkpoint), str(tmp_path)])
    assert isinstance(result.exception, ValueError) and "not an empty folder" in str(result.exception)


def test_timms_own_weights_give_the_same(published, tmp_path):
    """A tower in timm's layout with its classifier, as timm's Hub repositories are."""
    folder = published.options["vision"]
    backbone = resolve_backbone(folder, preprocessing=PREPROCESSING)
    tower = clip_tower(backbone, {name: x for name, x in published.clip.state_dict().items() if "visual" in name})
    save_for_hf(tower, tmp_path / "timm", model_args=ENCODERS["ViT-B/32"][2])
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    described["pretrained_cfg"] |= {"input_size": [3, SIZE, SIZE]}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(described))
    options = {**published.options, "vision": tmp_path / "timm", "clip": None}
    converted = convert_clipcap(published.checkpoint, **options)
    assert converted.differences["float64"].absolute < 1e-10
    assert converted.assumed[0].endswith(f"with the weights of local-dir:{tmp_path / 'timm'}.")
    caption = greedy(published.clipcap, published.prefix(PICTURES[0]), stop_of(converted.processor.tokenizer), 10)
    assert new_tokens(converted, PICTURES[0], eos_token_id=stop_of(converted.processor.tokenizer)) == caption


@pytest.mark.parametrize("name", TOWERS.values())
def test_towers_of_real_size_take_the_published_layouts(name):
    """Names and shapes of files as large as the published ones, without their weights."""
    size = {name: size for size, name in TOWERS.items()}[name]
    backbone = resolve_backbone(name, preprocessing=PREPROCESSING)
    cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert cfg.num_classes == size
    assert (list(cfg.mean), list(cfg.std)) == (backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])
    assert backbone.pretrained_cfg["input_size"] == ([3, 224, 224] if size == 512 else [3, 288, 288])
    assert backbone.pretrained_cfg["crop_pct"] == 1.0
    with torch.device("meta"):
        if size == 512:
            encoder = VisionTransformer(224, 32, 768, 12, 512)
        else:
            encoder = ModifiedResNet(288, (4, 6, 10, 6), 80, 640)
        tower = clip_tower(backbone, CLIP(encoder).state_dict())
        assert ("QuickGELU" in str(tower)) == (size == 512)
        for mapper in (MLP(size, 768, 10), TransformerMapper(size, 768, 40, 40, 8)):
            read = _read_mapper("file", mapper.state_dict(), 768)
            config = ImagePromptConfig.from_backbones(
                name,
                connector=read.connector,
                connector_args=read.connector_args,
                num_image_tokens=read.prefix_length,
            )
            missing, surplus = build_connector(config).load_state_dict(read.weights, strict=False)
            assert (missing, surplus) == (["projection.weight", "projection.bias"], [])


@pytest.mark.parametrize("size", [(300, 500), (768, 400), (224, 224), (100, 90)])
@pytest.mark.parametrize("edge", [224, 288])
def test_pixels_are_clips(size, edge):
    photo = picture(0, size)
    settings = {"input_size": [3, edge, edge], **PREPROCESSING}
    pixels = ImagePromptImageProcessor.from_pretrained_cfg(settings)(photo, return_tensors="pt")["pixel_values"][0]
    # By PIL alone: the shorter edge to `edge`, the middle of the longer one, CLIP's mean and std.
    height, width = size
    short = min(size)
    resized = photo.resize((int(edge * width / short), int(edge * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((side - edge) / 2) for side in resized.size)
    cut = pil_to_tensor(resized.crop((left, top, left + edge, top + edge))).double() / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = (cut - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert max_difference(pixels, expected) < 1e-6
    assert torch.equal(pixels, openai_transform(edge)(photo))


def run(published, output, *more):
    given = {name: value for name, value in published.options.items() if name != "normalize"}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return CliRunner().invoke(app, ["convert", "clipcap", str(published.checkpoint), str(output), *options, *more])


def test_the_command_writes_a_model_and_what_it_verified(published, tmp_path):
    result = run(published, tmp_path / "model")
    assert result.exit_code == 0, result.output
    shown = re.search(r"from ClipCap's by up to (\S+) in float64 .* and (\S+) in float32", result.output)
    assert float(shown[1]) < 1e-10
    assert float(shown[2]) <= 1e-5
    model = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = ImagePromptProcessor.from_pretrained(tmp_path / "model")
    processor.check_model(model)
    converted = Conversion(model, processor, {})
    stop = stop_of(processor.tokenizer)
    for each in PICTURES:
        expected = greedy(published.clipcap, published.prefix(each), stop, NEW_TOKENS)
        assert new_tokens(converted, each) == up_to(expected, processor.tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == [stop, processor.tokenizer.eos_token_id]
    assert model.generation_config.max_new_tokens == 67
    assert model.config.trainable == {"vision": False, "connector": True, "text": True}
    again = run(published, tmp_path / "model")
    assert "nothing is overwritten" in str(again.exception)


def test_a_mismatch_stops_it(published, tmp_path, monkeypatch):
    map_to_prefix, slope = clipcap_module.map_to_prefix, torch.linspace(0, 1e-3, WIDTH)
    monkeypatch.setattr(clipcap_module, "map_to_prefix", lambda *args: map_to_prefix(*args) + slope)
    result = run(published, tmp_path / "model")
    assert isinstance(result.exception, ValueError)
    assert "The logits of the converted model and of ClipCap's definition differ by up to" in str(result.exception)
    assert not (tmp_path / "model").exists()


def changed(published, folder, **tensors):
    """The file with some tensors changed, or, where there is none, left out."""
    loaded = torch.load(published.checkpoint, weights_only=True)
    loaded |= tensors
    torch.save({name: tensor for name, tensor in loaded.items() if tensor is not None}, folder / "changed.pt")
    return folder / "changed.pt"


MAPPER = {f"clip_project.model.{layer}.{kind}": None for layer in (0, 2) for kind in ("weight", "bias")}
LINEAR = {"clip_project.weight": torch.zeros(320, 512), "clip_project.bias": torch.zeros(320)}
TRANSFORMER = {f"clip_project.{name}": x for name, x in TransformerMapper(512, WIDTH, 5, 5, 1).state_dict().items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (MAPPER, "no ClipCap checkpoint: it has no `clip_project`, but gpt.transformer.wte.weight"),
        (MAPPER | LINEAR, "neither ClipCap's MLP mapper nor its transformer: `clip_project` has bias, weight"),
        ({"clip_project.model.2.bias": None}, "lacks `clip_project.model.2.bias`"),
        ({"clip_project.model.4.weight": torch.zeros(2)}, "has `clip_project.model.4.weight`, for which"),
        ({"clip_project.model.2.weight": torch.zeros(100, 160)}, "does not fit GPT-2's width of 32: .* 100 outputs"),
        ({"clip_project.model.0.weight": torch.zeros(160, 640)}, "maps embeddings of 640 numbers, but .* gives 512"),
        ({"gpt.transformer.wte.weight": torch.zeros(9, 32), "gpt.lm_head.weight": None}, "holds another GPT-2 than"),
        ({"adapter.down.weight": torch.zeros(4, 4)}, "holds `adapter.down.weight`, which is neither of ClipCap's"),
        ({"gpt.lm_head.weight": torch.zeros(400, 32)}, "whose head is not its word embeddings"),
        (MAPPER | TRANSFORMER, "does not say whether its embeddings were normalised. Pass `normalize`"),
        (MAPPER | TRANSFORMER | {"clip_project.prefix_const": torch.zeros(5, 64)}, "its constants 64 columns"),
    ],
    ids=str.split("not-clipcap linear lacks surplus width tower other-gpt2 adapter head normalize constants"),
)
def test_what_does_not_fit_is_named(published, tmp_path, tensors, message):
    file = changed(published, tmp_path, **tensors)
    with pytest.raises(ValueError, match=message):
        convert_clipcap(file, **published.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": "vit_base_patch32_clip_224"}, "OpenAI trained it with QuickGELU, which this"),
        ({"vision": "vit_base_patch32_clip_224.openai", "clip": None}, "were trained with QuickGELU"),
        ({"vision": "resnet50x4_clip"}, "does not fit resnet50x4_clip: it holds a vision transformer"),
        ({"vision": "vit_base_patch16_clip_quickgelu_224"}, r"its patches and positions are \[\(128, 3, 32, 32\)"),
        ({"clip": "clipcap.pt"}, "clipcap.pt is no CLIP file in OpenAI's layout"),
        ({"clip": "nowhere.pt"}, "There is no file .*nowhere.pt"),
    ],
    ids=str,
)
def test_a_wrong_tower_is_named(published, options, message):
    options = options | ({"clip": published.checkpoint.parent / options["clip"]} if options.get("clip") else {})
    with pytest.raises(ValueError, match=message):
        convert_clipcap(published.checkpoint, **published.options | options)


def test_an_embedding_of_another_size_needs_a_tower(published, tmp_path):
    file = changed(published, tmp_path, **{"clip_project.model.0.weight": torch.zeros(160, 768)})
    with pytest.raises(ValueError, match="embeddings of 768 numbers; ClipCap's own encoders give 512 or 640"):
        convert_clipcap(file, text=published.options["text"])


def section() -> str:
    (text,) = re.findall(r"^## ClipCap\n.*?(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return text


def test_the_page_runs(published, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    other = publish(tmp_path / "other", tokenizer, mapper=TransformerMapper(512, WIDTH, 10, 10, 8), normalize=True)
    sources = {"coco_weights.pt": published, "transformer_weights.pt": other}
    picture(0).save("photo.jpg")
    commands = [
        shlex.split(line)
        for block in re.findall(r"^```sh\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    assert {command[3] for command in commands} == sources.keys()
    for command in commands:
        assert command[:3] == ["imageprompt", "convert", "clipcap"]
        source = sources[command[3]]
        Path(command[3]).write_bytes(source.checkpoint.read_bytes())
        Path("ViT-B-32.pt").write_bytes(source.options["clip"].read_bytes())
        tiny = ["--vision", str(source.options["vision"]), "--text", str(source.options["text"])]
        tiny += [] if "--clip" in command else ["--clip", str(source.options["clip"])]
        result = CliRunner().invoke(app, [*command[1:], *tiny])
        assert result.exit_code == 0, (command, result.exception)
        assert ("is made 1, and" if "--normalize" in command else "is left as it is, and") in result.output
    for code in re.findall(r"^```python\n(.*?)^```", section(), re.MULTILINE | re.DOTALL):
        exec(compile(code, PAGE.name, "exec"), namespace := {})
    assert isinstance(namespace["captions"], list)
    assert all(isinstance(caption, str) for caption in namespace["captions"])
    assert np.size(namespace["captions"]) == 2
