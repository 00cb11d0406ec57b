"""Vision encoders of transformers on their twins in timm: the same pixels and features, or a refusal.

Reference: transformers' own image processors and model classes, on checkpoints that they wrote themselves.
"""

import json
import os
import re
import shutil

import pytest
import timm
import torch
from conftest import max_difference, picture, tiny_gpt2
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    BeitConfig,
    BeitModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTImageProcessor,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GPT2LMHeadModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from imageprompt import (
    ImagePromptForConditionalGeneration,
    ImagePromptImageProcessor,
    ImagePromptProcessor,
    compose,
)
from imageprompt.conversion import backbones
from imageprompt.conversion.backbones import load_weights, read_backbone
from imageprompt.conversion.pixels import read_preprocessing
from imageprompt.diagnosis import diagnose

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = SIZES | {"intermediate_size": 48}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1}
EDGES = {"height": 32, "width": 32}
CROP = {"size": {"shortest_edge": 40}, "crop_size": EDGES}
TWO_PARTS = {"vision_config": WIDE, "text_config": TEXT}


def dinov2(model_class, config_class, **more):
    """Positions for 48 pixels, as DINOv2 has them for 518, at 32."""
    return lambda: (model_class(config_class(**SIZES | {"image_size": 48} | more)), BitImageProcessor(**CROP))


# What the checkpoint holds, and the class that its vision part is.
CHECKPOINTS = {
    "vit": (lambda: (ViTModel(ViTConfig(**WIDE)), ViTImageProcessor(size=EDGES)), ViTModel),
    "vit classifier": (
        lambda: (ViTForImageClassification(ViTConfig(**WIDE, hidden_act="gelu_new")), ViTImageProcessor(size=EDGES)),
        ViTModel,
    ),
    "deit": (
        lambda: (
            DeiTModel(DeiTConfig(**WIDE, qkv_bias=False)),
            DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size=EDGES),
        ),
        DeiTModel,
    ),
    "clip vision": (lambda: (CLIPVisionModel(CLIPVisionConfig(**WIDE)), CLIPImageProcessor(**CROP)), CLIPVisionModel),
    "clip": (
        lambda: (CLIPModel(CLIPConfig(**TWO_PARTS)), CLIPImageProcessor(**CROP | {"size": {"shortest_edge": 32}})),
        CLIPVisionModel,
    ),
    "clip with gelu": (  # as LAION's
        lambda: (CLIPVisionModel(CLIPVisionConfig(**WIDE, hidden_act="gelu")), CLIPImageProcessor(**CROP)),
        CLIPVisionModel,
    ),
    "siglip": (lambda: (SiglipModel(SiglipConfig(**TWO_PARTS)), SiglipImageProcessor(size=EDGES)), SiglipVisionModel),
    "siglip without head": (
        lambda: (
            SiglipVisionModel(SiglipVisionConfig(**WIDE, vision_use_head=False)),
            SiglipImageProcessor(size=EDGES),
        ),
        SiglipVisionModel,
    ),
    "dinov2": (dinov2(Dinov2Model, Dinov2Config), Dinov2Model),
    "dinov2 gated": (dinov2(Dinov2Model, Dinov2Config, use_swiglu_ffn=True), Dinov2Model),
    "dinov2 registers": (dinov2(Dinov2WithRegistersModel, Dinov2WithRegistersConfig), Dinov2WithRegistersModel),
}


def write(folder, name: str):
    torch.manual_seed(0)
    model, image_processor = CHECKPOINTS[name][0]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture
def vit_folder(tmp_path):
    return write(tmp_path / "vit", "vit")


def composed(folder, tokenizer, **settings):
    return compose(folder, tiny_gpt2(), tokenizer=tokenizer, connector="pool", **settings)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_pixels_and_features_are_those_of_transformers(name, tokenizer, tmp_path):
    folder, kind = write(tmp_path / "source", name), CHECKPOINTS[name][1]
    for part in composed(folder, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    model = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "saved")
    processor = ImagePromptProcessor.from_pretrained(tmp_path / "saved")

    photo = picture(size=(60, 91))  # an odd number of pixels is cut off
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")(photo, return_tensors="pt")["pixel_values"]
    assert max_difference(pixels, theirs) <= 1e-5
    peer = kind.from_pretrained(folder).eval()
    outputs = peer(theirs, output_hidden_states=True)
    expected = outputs.last_hidden_state
    if kind is CLIPVisionModel:  # transformers normalises the class token alone
        expected = peer.post_layernorm(expected)
    prefix = model.config.num_prefix_tokens
    assert prefix == expected.shape[1] - 16
    features = model.get_image_features(pixels).last_hidden_state
    assert features.std() > 0.01
    assert max_difference(features, expected[:, prefix:]) <= 1e-5
    timm_model = model.model.vision_tower.timm_model
    early = timm_model.forward_intermediates(pixels, indices=[0], intermediates_only=True)[0]
    assert max_difference(early.flatten(2).mT, outputs.hidden_states[1][:, prefix:]) <= 1e-5
    if kind not in (ViTModel, DeiTModel) and name != "siglip without head":
        summary = timm_model.forward_head(timm_model.forward_features(pixels), pre_logits=True)
        assert max_difference(summary, outputs.pooler_output) <= 1e-5


def test_what_was_verified_can_be_read(clip_folder):
    backbone = read_backbone(clip_folder)
    assert (backbone.architecture, backbone.layer_norm_eps) == ("vit_base_patch16_clip_224", 1e-5)
    assert backbone.model_args["act_layer"] == "quick_gelu"
    differences = load_weights(backbone).differences
    assert differences["float64"].absolute < 1e-10 and 0 <= differences["float32"].relative <= 1e-5


def test_compose_shows_the_difference_that_it_found(clip_folder, tokenizer, monkeypatch):
    shown = []
    monkeypatch.setattr(backbones.logger, "warning", shown.append)
    composed(clip_folder, tokenizer)
    (line,) = shown
    assert re.search(r"timm's features differ from CLIPVisionModel's by \S+e-1\d in float64 .* in float32", line), line


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (683, 1024), (333, 500), (225, 224), (224, 227), (228, 224)])
def test_an_odd_number_of_pixels_is_cut_off_as_in_transformers(size, tmp_path):
    """timm and torchvision round to even there, and would cut one pixel further to one side."""
    CLIPImageProcessor().save_pretrained(tmp_path)
    cfg = read_preprocessing(tmp_path)
    assert (cfg["crop_mode"], cfg["input_size"]) == ("center_floor", [3, 224, 224])
    photo = picture(0, size)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(photo, return_tensors="pt")["pixel_values"]
    processor = ImagePromptImageProcessor.from_pretrained_cfg(cfg)
    processor.save_pretrained(tmp_path / "saved")
    for ours in (processor, ImagePromptImageProcessor.from_pretrained(tmp_path / "saved")):
        assert max_difference(ours(photo, return_tensors="pt")["pixel_values"], theirs) <= 1e-5


def test_a_hub_id_from_the_cache(clip_folder, tokenizer, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--clip" / "snapshots" / ("0" * 40)
    shutil.copytree(clip_folder, snapshot)
    (tmp_path / "models--someone--clip" / "refs").mkdir()
    (tmp_path / "models--someone--clip" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, _ = composed("someone/clip", tokenizer)
    assert model.config.base_models == {"vision": "someone/clip"}
    expected, _ = composed(clip_folder, tokenizer)
    weight = "blocks.1.mlp.fc1.weight"
    assert torch.equal(*(m.model.vision_tower.timm_model.get_parameter(weight) for m in (model, expected)))


def test_another_size_fits_the_positions_as_timm_does(clip_folder, tokenizer):
    model, processor = composed(clip_folder, tokenizer, preprocessing={"input_size": (3, 48, 64)})
    reference = load_weights(read_backbone(clip_folder)).timm_model
    reference.set_input_size(img_size=(48, 64))
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 64) and model.config.feature_grid == [6, 8]
    with torch.no_grad():
        expected = reference.forward_features(pixels)[:, 1:]
        assert max_difference(model.get_image_features(pixels).last_hidden_state, expected) <= 1e-6


def test_random_weights_and_keywords(clip_folder, tokenizer):
    model, _ = composed(clip_folder, tokenizer, pretrained=False, model_args={"drop_path_rate": 0.1})
    assert model.config.vision_config.model_args["drop_path_rate"] == 0.1
    trained = load_weights(read_backbone(clip_folder)).timm_model
    assert not torch.equal(model.model.vision_tower.timm_model.cls_token, trained.cls_token)


def test_the_doctor_knows_them(clip_folder):
    report = diagnose(clip_folder, '{"n_layer": 1, "n_head": 2, "n_embd": 32}')
    assert report.ok and report.budget.feature_grid == [4, 4]


def test_training_goes_on_from_these_weights(vit_folder, tokenizer):
    model, processor = composed(vit_folder, tokenizer)
    batch = processor(images=picture(), suffix="A dog!", return_tensors="pt")
    model.train()(**batch).loss.backward()
    assert model.model.vision_tower.timm_model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


# --- weights in other files


def as_pickle(folder, weights):
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def test_weights_in_a_pickle_are_read_as_tensors_alone(vit_folder, tokenizer):
    expected, _ = composed(vit_folder, tokenizer)
    as_pickle(vit_folder, load_file(vit_folder / "model.safetensors"))
    model, _ = composed(vit_folder, tokenizer)
    weight = "blocks.1.attn.qkv.weight"
    assert torch.equal(*(m.model.vision_tower.timm_model.get_parameter(weight) for m in (model, expected)))


class Harmful:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(vit_folder, tokenizer, tmp_path):
    as_pickle(vit_folder, load_file(vit_folder / "model.safetensors") | {"extra": Harmful(tmp_path / "harm")})
    with pytest.raises(ValueError, match="Cannot load the weights"):
        composed(vit_folder, tokenizer)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("part", ["timm", "gpt2"])
def test_other_parts_in_harmful_pickles_are_refused_and_not_run(part, tokenizer, tmp_path):
    timm.models.save_for_hf(timm.create_model("resnet10t"), tmp_path / "timm", safe_serialization=False)
    GPT2LMHeadModel(tiny_gpt2()).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    if part == "gpt2":
        (tmp_path / "gpt2" / "model.safetensors").unlink()
    harmful = {"transformer.wte.weight": torch.zeros(400, 32), "extra": Harmful(tmp_path / "harm")}
    torch.save(harmful, tmp_path / part / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Cannot load"):
        compose(tmp_path / "timm", tmp_path / "gpt2", num_image_tokens=4)
    assert not (tmp_path / "harm").exists()


def test_missing_weights_are_named(vit_folder, tokenizer):
    weights = load_file(vit_folder / "model.safetensors")
    del weights["encoder.layer.1.attention.attention.key.bias"]
    save_file(weights, vit_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a ViTModel, such as layers\.1\.attention\.k_proj\.bias"):
        composed(vit_folder, tokenizer)


def test_a_truncated_file_is_refused(vit_folder, tokenizer):
    content = (vit_folder / "model.safetensors").read_bytes()
    (vit_folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="Cannot load the weights"):
        composed(vit_folder, tokenizer)


def test_no_weights_at_all(vit_folder, tokenizer):
    (vit_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Cannot load the weights.*no file named"):
        composed(vit_folder, tokenizer)


# --- what is refused


def change(folder, file: str, **settings):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_features_that_differ_stop_the_import(vit_folder, tokenizer, monkeypatch):
    monkeypatch.setattr(backbones, "set_layer_norm_eps", lambda model, eps: None)
    change(vit_folder, "config.json", layer_norm_eps=0.1)
    with pytest.raises(ValueError, match=r"Features of timm's .* and of ViTModel differ by up to \S+ in float64"):
        composed(vit_folder, tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "mish"}, "no activation 'mish'; it has gelu"),
        ({"patch_size": [8, 4]}, r"`patch_size=.*only encoders of square ones"),
        ({"image_size": 64}, r"makes 32x32 pixels, its encoder takes 64x64\. Mend `size`"),
        ({"num_channels": 1}, "the preprocessing gives 3 channels, the encoder takes 1"),
        ({"hidden_size": 48}, "Cannot load the weights"),
        ({"model_type": "swin"}, r"no twin in timm for transformers' 'swin'; there is one for vit, deit"),
        ({"model_type": "gpt2"}, "no twin in timm for transformers' 'gpt2'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_encoders_without_a_twin_are_refused(vit_folder, tokenizer, settings, message):
    change(vit_folder, "config.json", **settings)
    with pytest.raises(ValueError, match=message):
        composed(vit_folder, tokenizer)


def test_beit_has_no_twin(tokenizer, tmp_path):
    BeitModel(BeitConfig(**WIDE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'beit'"):
        composed(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "does not resize"),
        ({"do_rescale": False}, "does not divide the pixels by 255"),
        ({"rescale_factor": 1 / 127.5}, "does not divide the pixels by 255"),
        ({"size": {"shortest_edge": 32}}, "gives images of several sizes"),
        (
            {"size": {"shortest_edge": 16}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
            | {"image_processor_type": "CLIPImageProcessor"},
            "`crop_size` .* is larger than its `size`",
        ),
        ({"image_std": [0.0, 0.5, 0.5]}, "`image_std` is positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pixels_that_cannot_be_made_are_refused(vit_folder, tokenizer, settings, message):
    change(vit_folder, "preprocessor_config.json", **settings)
    with pytest.raises(ValueError, match=message):
        composed(vit_folder, tokenizer)


def test_a_folder_that_says_nothing_of_its_pixels(vit_folder, tokenizer):
    (vit_folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="says nothing of its pixels"):
        composed(vit_folder, tokenizer)


def test_the_oldest_preprocessor_files_are_read(vit_folder):
    """As of 2021: an edge in one number, and a name that the library no longer has."""
    old = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2}
    old |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}
    (vit_folder / "preprocessor_config.json").write_text(json.dumps(old))
    cfg = read_backbone(vit_folder).pretrained_cfg
    assert (cfg["input_size"], cfg["crop_mode"], cfg["crop_pct"]) == ([3, 32, 32], "squash", 1.0)
    assert (cfg["interpolation"], cfg["mean"]) == ("bilinear", [0.5] * 3)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [({"mean": [0, 0, 0]}, "were trained with mean"), ({"input_size": (1, 32, 32)}, "take 3 channels")],
)
def test_pixels_that_the_weights_do_not_know_are_refused(vit_folder, tokenizer, preprocessing, message):
    with pytest.raises(ValueError, match=message):
        composed(vit_folder, tokenizer, preprocessing=preprocessing)
