"""VisionEncoderDecoder checkpoints, imported: the same logits, the same captions, and both kept by saving.

Reference: transformers' VisionEncoderDecoderModel on checkpoints that it wrote itself, read with its own image
processor.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import max_difference, picture, tiny_gpt2
from transformers import (
    AutoImageProcessor,
    BertConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    GenerationConfig,
    SwinConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)
from typer.testing import CliRunner

from imageprompt import ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.cli import app
from imageprompt.conversion import vision_encoder_decoder
from imageprompt.conversion.vision_encoder_decoder import convert_vision_encoder_decoder
from imageprompt.training.tokenizing import train_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = SIZES | {"intermediate_size": 48}
# The encoder, GPT-2's width, and words of GPT-2 beyond the tokenizer's.
CHECKPOINTS = {
    "vit": (ViTConfig(**WIDE), 32, 0),
    "vit, projected": (ViTConfig(**WIDE), 24, 0),
    "vit, more words": (ViTConfig(**WIDE), 32, 3),
    "deit": (DeiTConfig(**WIDE), 24, 0),
    "clip": (CLIPVisionConfig(**WIDE), 32, 0),
    "dinov2": (Dinov2Config(**SIZES), 32, 0),
}


def write(folder, tokenizer, name: str = "vit", decoder=None, encoder=None, **generation):
    """A checkpoint as the vit-gpt2 captioners on the Hub are: one token starts, ends and pads."""
    torch.manual_seed(0)
    known, width, more_words = CHECKPOINTS[name]
    gpt2 = tiny_gpt2(n_embd=width, vocab_size=len(tokenizer) + more_words)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder or known, decoder or gpt2)
    config.decoder_start_token_id = config.pad_token_id = 0
    model = VisionEncoderDecoderModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    settings = {"max_length": 12, "num_beams": 3, "no_repeat_ngram_size": 2} | generation
    tokens = dict.fromkeys(("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model.generation_config = GenerationConfig(**tokens | settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(tokenizer, tmp_path_factory):
    """(transformers' model, the imported one from its folder, its processor, the source's folder)"""
    folder = write(tmp_path_factory.mktemp("ved") / "source", tokenizer)
    output = folder.parent / "output"
    result = CliRunner().invoke(app, ["convert", "vision-encoder-decoder", str(folder), str(output)])
    assert result.exit_code == 0, result.output
    found = r"Logits differ from transformers' VisionEncoderDecoderModel's by up to \S+e-1\d in float64 .* in float32"
    assert re.search(found, result.output), result.output
    model = ImagePromptForConditionalGeneration.from_pretrained(output)
    processor = ImagePromptProcessor.from_pretrained(output)
    return VisionEncoderDecoderModel.from_pretrained(folder).eval(), model, processor, folder


def their_pixels(folder, images):
    return AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, tokenizer, tmp_path):
    folder = write(tmp_path, tokenizer, name)
    peer = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    converted = convert_vision_encoder_decoder(folder)
    assert converted.differences["float64"].absolute < 1e-10
    assert 0 <= converted.differences["float32"].relative <= 1e-5
    model, processor, photo = converted.model, converted.processor, picture()
    inputs = processor(images=photo, text="A photo of a dog!", return_tensors="pt")
    placeholder = model.config.image_token_id
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == placeholder, 0)
    expected = peer(pixel_values=their_pixels(folder, photo), decoder_input_ids=ids).logits
    logits = model(**inputs).logits[..., : expected.shape[-1]]
    words = torch.arange(expected.shape[-1]) != placeholder
    assert expected.std() > 0.1
    assert max_difference(logits[..., words], expected[..., words]) <= 1e-5
    # The image is read: another one gives other logits.
    other = peer(pixel_values=their_pixels(folder, picture(7)), decoder_input_ids=ids).logits
    assert max_difference(other, expected) > 0.01


@pytest.mark.parametrize("settings", [{}, {"num_beams": 1}, {"num_beams": 5, "max_new_tokens": 9}], ids=str)
def test_captions_are_those_of_transformers(imported, settings):
    peer, model, processor, folder = imported
    photos = [picture(seed) for seed in range(4)]
    expected = peer.generate(their_pixels(folder, photos), **settings)
    ids = model.generate(**processor(images=photos, return_tensors="pt"), **settings)
    assert ids[:, 1:].tolist() == expected[:, 1:].tolist()
    assert processor.batch_decode(ids, skip_special_tokens=True) == processor.batch_decode(
        expected, skip_special_tokens=True
    )
    assert len(set(map(tuple, expected.tolist()))) > 1


def test_a_caption_that_ends_early_ends_here_too(imported):
    peer, model, processor, folder = imported
    photos = [picture(seed) for seed in range(4)]
    first = peer.generate(their_pixels(folder, photos), num_beams=1)[:, 3]
    end = {"num_beams": 1, "eos_token_id": first[0].item(), "pad_token_id": 1}
    expected = peer.generate(their_pixels(folder, photos), **end)
    assert (expected == 1).any()
    ids = model.generate(**processor(images=photos, return_tensors="pt"), **end)
    assert ids[:, 1:].tolist() == expected[:, 1:].tolist()


@torch.no_grad()
def test_a_caption_is_as_likely_as_there(imported):
    """But for the placeholder's share, which is less than that of one word in the vocabulary."""
    peer, model, processor, folder = imported
    inputs = processor(images=picture(), suffix="A dog!", return_tensors="pt")
    labels = inputs["labels"][:, 1:]
    expected = peer(pixel_values=their_pixels(folder, picture()), labels=labels).loss
    assert 0 <= model(**inputs).loss - expected < 1 / peer.config.decoder.vocab_size


def test_the_hub_id_of_the_checkpoint_is_remembered(imported, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--captioner"
    shutil.copytree(imported[-1], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = convert_vision_encoder_decoder("someone/captioner").model.config
    assert config.base_models == {"vision": "someone/captioner", "text": "someone/captioner"}
    assert imported[1].config.base_models is None


def test_a_small_fault_under_large_logits_stops_the_import(imported, monkeypatch):
    """As a part of the largest it is what float32 rounds; in float64 it is seen."""
    load = vision_encoder_decoder.load_pretrained

    def load_large(*args, **settings):
        peer = load(*args, **settings)
        peer.decoder.transformer.ln_f.weight.data *= 1000
        return peer

    def copy_faultily(model, peer, start):
        copy_words(model, peer, start)
        model.lm_head.weight.data[5, 0] += 1e-5

    copy_words = vision_encoder_decoder._copy_words
    monkeypatch.setattr(vision_encoder_decoder, "load_pretrained", load_large)
    convert_vision_encoder_decoder(imported[-1])
    monkeypatch.setattr(vision_encoder_decoder, "_copy_words", copy_faultily)
    with pytest.raises(ValueError, match=r"differ by up to \S+ in float64 \(the largest is") as refused:
        convert_vision_encoder_decoder(imported[-1])
    absolute, largest = map(float, re.findall(r"up to (\S+) .* largest is (\S+)\)", str(refused.value))[0])
    assert absolute < 1e-5 * largest


def test_a_revision_of_the_hub(imported, hub, tmp_path):
    source = imported[-1]
    hub.add("ada/captioner", {path.name: path.read_bytes() for path in source.iterdir()})
    first = hub.repos["ada/captioner"].refs["main"]
    hub.add("ada/captioner", {"README.md": b"nothing else is left"})
    arguments = ["convert", "vision-encoder-decoder", "ada/captioner"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "old"), "--revision", first])
    assert result.exit_code == 0, result.exception
    model = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "old")
    assert torch.equal(model.lm_head.weight, imported[1].lm_head.weight)
    assert model.config.base_models == {"vision": "ada/captioner", "text": "ada/captioner"}
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "new")])
    assert isinstance(result.exception, ValueError) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["./no/such/folder", "someone/not-in-the-cache"])
def test_what_is_not_there_is_not_taken_for_another_model(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"(?s)Cannot load '{source}': .*Offline, pass a local folder") as refused:
        convert_vision_encoder_decoder(source)
    assert "not a vision-encoder-decoder" not in str(refused.value)


def test_lengths_count_the_same_tokens(imported):
    _, model, _, _ = imported
    assert model.generation_config.max_new_tokens == 11 and model.generation_config.max_length is None
    assert model.generation_config.num_beams == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)}, "'bert'"),
        ({"encoder": SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[2])}, "no twin in timm.*'swin'"),
        ({"repetition_penalty": 1.5}, r"`repetition_penalty=1\.5`.*captions would differ"),
        ({"decoder_start_token_id": None, "bos_token_id": None}, "starts its captions with None"),
    ],
    ids=["decoder", "encoder", "penalty", "start"],
)
def test_what_cannot_be_imported_is_refused(tokenizer, tmp_path, changes, message):
    folder = write(tmp_path / "source", tokenizer, **changes)
    result = CliRunner().invoke(app, ["convert", "vision-encoder-decoder", str(folder), str(tmp_path / "output")])
    with pytest.raises(ValueError, match=message):
        raise result.exception
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "holds no config.json of transformers"),
        ("preprocessor_config.json", "says nothing of its pixels"),
        ("tokenizer.json", "There is no tokenizer in"),
        ("model.safetensors", "Cannot load the weights"),
    ],
)
def test_a_missing_file_is_named(tokenizer, tmp_path, file, message):
    (write(tmp_path, tokenizer) / file).unlink()
    with pytest.raises(ValueError, match=message):
        convert_vision_encoder_decoder(tmp_path)


def test_a_tokenizer_with_fewer_words_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("imageprompt.conversion.vision_encoder_decoder.PADDED_ROWS", 16)
    train_tokenizer(["two cats"], 265).save_pretrained(write(tmp_path, tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer of .* lacks [0-9]+ of the 313 words"):
        convert_vision_encoder_decoder(tmp_path)


def test_other_kinds_of_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ValueError, match=r"a 'blip' model, not a vision-encoder-decoder"):
        convert_vision_encoder_decoder(tmp_path)


def test_a_folder_with_something_in_it_is_not_written_over(imported, tmp_path):
    folder = imported[-1]
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["convert", "vision-encoder-decoder", str(folder), str(tmp_path)])
    assert isinstance(result.exception, ValueError) and "not an empty folder" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"_copy_projection": lambda model, peer: None}, r"The logits of the imported model .* differ by up to"),
        ({"_compare_logits": lambda *_: {}, "_copy_projection": lambda model, peer: None}, "says"),
    ],
    ids=["logits", "captions"],
)
def test_a_difference_stops_the_import(imported, broken, message, monkeypatch):
    for name, function in broken.items():
        monkeypatch.setattr(vision_encoder_decoder, name, function)
    with pytest.raises(ValueError, match=f"{message}.*nothing was written"):
        convert_vision_encoder_decoder(imported[-1])
