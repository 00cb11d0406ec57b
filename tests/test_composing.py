"""compose: the parts' own weights arrive, nothing else changes, and what does not fit together is refused."""

import copy
import json
import shutil

import huggingface_hub.constants
import pytest
import timm
import torch
from conftest import max_difference, picture, tiny, tiny_gpt2
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

from imageprompt import compose
from imageprompt.composing import load_tokenizer

STATISTICS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A "pretrained" backbone in timm's Hub layout, with preprocessing of its own."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbone")
    model = timm.create_model("resnet10t", num_classes=5)
    for module in model.modules():  # statistics that a random model does not have
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 0.9, **STATISTICS}
    cfg |= {"classifier": "fc", "first_conv": "conv1.0"}
    config = {"architecture": "resnet10t", "num_classes": 5, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def gpt2_folder(tokenizer, tmp_path_factory):
    """A "pretrained" GPT-2 whose vocabulary has no room for a placeholder, and its tokenizer."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("gpt2")
    config = tiny_gpt2(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(timm_folder, gpt2_folder):
    return compose(timm_folder, gpt2_folder, num_image_tokens=4)


# --- pretrained parts


def test_pain_02_the_backbones_weights_arrive(pretrained, timm_folder):
    model, processor = pretrained
    reference = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
    features = reference.forward_features(pixels)
    assert torch.equal(model.model.vision_tower.timm_model.forward_features(pixels), features)
    expected = features.flatten(2).transpose(1, 2)
    assert torch.equal(model.get_image_features(pixels, return_dict=True).last_hidden_state, expected)


def test_pain_17_the_preprocessing_of_the_weights_is_used(pretrained, timm_folder):
    model, processor = pretrained
    reference = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(reference), is_training=False)
    expected = transform(picture())[None]
    assert torch.equal(processor(images=picture(), return_tensors="pt")["pixel_values"], expected)
    recorded = model.config.vision_config.pretrained_cfg
    assert {name: recorded[name] for name in STATISTICS} == STATISTICS
    assert (recorded["crop_pct"], recorded["interpolation"]) == (0.9, "bilinear")


def test_the_language_model_speaks_as_before(pretrained, gpt2_folder):
    model, processor = pretrained
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    inputs = processor(text="What is it? It is", return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.shape[-1] == gpt2.config.vocab_size + 1  # the placeholder's row
    assert max_difference(logits[..., :-1], gpt2(**inputs).logits) <= 1e-6
    for num_beams in (1, 4):
        expected = gpt2.generate(**inputs, max_new_tokens=12, num_beams=num_beams)
        assert model.generate(**inputs, max_new_tokens=12, num_beams=num_beams).tolist() == expected.tolist()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_placeholder_takes_no_words_probability(gpt2_folder, tokenizer, tmp_path, tied):
    """All logits of OpenAI's GPT-2 are far below 0: a random row, whose logit is about 0, would be certain."""
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_folder, tie_word_embeddings=tied)
    gpt2.lm_head.weight.copy_(gpt2.transformer.wte.weight + 1.0)
    gpt2.transformer.ln_f.bias -= 1.0
    gpt2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = compose("resnet10t", tmp_path, pretrained="text", num_image_tokens=4)
    inputs = processor(text=["What is it?"], suffix=[" It is the number seven."], return_tensors="pt")
    assert gpt2(inputs["input_ids"]).logits.max() < -10
    expected = gpt2(inputs["input_ids"], labels=inputs["labels"]).loss * (inputs["labels"] != -100).sum()
    share = 1 / gpt2.config.vocab_size  # of one word
    words = (inputs["labels"] != -100).sum()
    assert 0 <= -model.score(**inputs) - expected <= words * share


def test_the_language_models_ties_and_tokens_are_kept(pretrained, tokenizer):
    model, processor = pretrained
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.image_token_id == processor.image_token_id == len(tokenizer)
    text = "A photo of a dog!"
    assert processor.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_random_weights_for_one_part_only(timm_folder, tokenizer):
    model, _ = compose(timm_folder, tiny_gpt2(), tokenizer=tokenizer, num_image_tokens=4)
    reference = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, num_classes=0)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.model.vision_tower.timm_model.state_dict()[name], value)


def test_pretrained_false_loads_no_weights(timm_folder, gpt2_folder):
    set_seed(0)
    model, _ = compose(timm_folder, gpt2_folder, num_image_tokens=4, pretrained=False)
    reference = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    assert not torch.equal(model.model.vision_tower.timm_model.conv1[0].weight, reference.conv1[0].weight)
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    assert not torch.equal(model.model.language_model.wpe.weight, gpt2.transformer.wpe.weight)


@pytest.mark.parametrize(("part", "loaded"), [("vision", (True, False)), ("text", (False, True))])
def test_the_weights_of_one_part_alone(timm_folder, gpt2_folder, part, loaded):
    set_seed(0)
    model, _ = compose(timm_folder, gpt2_folder, num_image_tokens=4, pretrained=part)
    backbone = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    assert loaded == (
        torch.equal(model.model.vision_tower.timm_model.conv1[0].weight, backbone.conv1[0].weight),
        torch.equal(model.model.language_model.h[0].mlp.c_fc.weight, gpt2.transformer.h[0].mlp.c_fc.weight),
    )
    with pytest.raises(ValueError, match="`pretrained` is True, False, 'vision' or 'text', got 'connector'"):
        compose(timm_folder, gpt2_folder, pretrained="connector")


def test_backbone_keywords_reach_timm_and_the_checkpoint(timm_folder, tokenizer, tmp_path):
    model, _ = compose(timm_folder, tiny_gpt2(), tokenizer=tokenizer, model_args={"drop_path_rate": 0.1})
    assert model.config.vision_config.model_args == {"drop_path_rate": 0.1}
    rates = {getattr(module, "drop_prob", 0) for module in model.model.vision_tower.modules()}
    assert max(rates) == pytest.approx(0.1)


def test_a_composed_model_is_saved_without_its_sources(timm_folder, gpt2_folder, tmp_path):
    sources = [shutil.copytree(folder, tmp_path / folder.name) for folder in (timm_folder, gpt2_folder)]
    model, processor = compose(*sources, num_image_tokens=4)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    for source in sources:
        shutil.rmtree(source)
    reloaded = type(model).from_pretrained(saved)
    inputs = type(processor).from_pretrained(saved)(images=picture(), text="A", return_tensors="pt")
    assert max_difference(reloaded(**inputs).logits, model(**inputs).logits) <= 1e-6
    written = {path.name: path.read_text() for path in saved.glob("*.json")}
    assert [name for name, text in written.items() if str(tmp_path.parent) in text] == []  # no path of this machine


# --- no side effects


def test_pain_02_bare_timm_names(tokenizer):
    for name in ("resnet10t", "timm/resnet10t", "resnet10t.c3_in1k"):
        model, _ = tiny(tokenizer)
        again, _ = compose(
            name,
            tiny_gpt2(),
            tokenizer=tokenizer,
            pretrained=False,
            preprocessing={"input_size": (3, 64, 64)},
            num_image_tokens=4,
        )
        assert again.state_dict().keys() == model.state_dict().keys()
        assert not again.training


def test_a_seed_decides_the_weights_and_compose_sets_none(tokenizer):
    def weights(seed):
        set_seed(seed)
        return tiny(tokenizer)[0].state_dict()

    first, same, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_callers_tokenizer_and_configuration_stay_as_they_are(tokenizer):
    config = tiny_gpt2(vocab_size=len(tokenizer))
    before, length, side = copy.deepcopy(config.to_dict()), len(tokenizer), tokenizer.padding_side
    tiny(tokenizer, text_config=config)
    assert config.to_dict() == before
    assert (len(tokenizer), tokenizer.padding_side, tokenizer.pad_token) == (length, side, None)
    assert "<image>" not in tokenizer.get_vocab()


def test_compose_prints_nothing(tokenizer, timm_folder, gpt2_folder, capfd, caplog):
    config = tiny_gpt2(bos_token_id=0, eos_token_id=0)
    capfd.readouterr()
    caplog.clear()
    tiny(tokenizer, text_config=config)
    assert tuple(capfd.readouterr()) == ("", "")
    compose(timm_folder, gpt2_folder, num_image_tokens=4)
    written = capfd.readouterr()
    lines = [line for line in written.err.replace("\r", "\n").splitlines() if line and "Loading weights" not in line]
    assert (lines, written.out, caplog.records) == ([], "", [])


def test_pain_17_overridden_preprocessing_is_recorded_on_both_sides(tokenizer):
    overrides = {"input_size": (3, 48, 80), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    model, processor = tiny(tokenizer, preprocessing=overrides | STATISTICS, num_image_tokens=2)
    for recorded in (model.config.vision_config.pretrained_cfg, processor.image_processor.pretrained_cfg):
        assert recorded == {
            name: list(v) if isinstance(v, tuple) else v for name, v in (overrides | STATISTICS).items()
        }
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 80)
    assert model(**processor(images=picture(), return_tensors="pt")).logits.shape[1] == 2


# --- what is refused


def test_pain_17_foreign_statistics_for_pretrained_weights_are_refused(timm_folder, tokenizer):
    with pytest.raises(ValueError, match="trained with mean"):
        compose(timm_folder, tiny_gpt2(), tokenizer=tokenizer, preprocessing={"mean": (0.0, 0.0, 0.0)})
    compose(timm_folder, tiny_gpt2(), tokenizer=tokenizer, preprocessing={"mean": STATISTICS["mean"]})


@pytest.mark.parametrize(
    ("name", "close"),
    [("resnt18", "resnet18"), ("timm/vit_smal_patch16_224.augreg_in21k", "vit_small_patch16_224")],
)
def test_unknown_backbones_are_refused_with_close_names(tokenizer, name, close, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=close):
        compose(name, tiny_gpt2(), tokenizer=tokenizer, pretrained=False)


def test_an_unknown_tag_is_refused_with_those_there_are(tokenizer):
    with pytest.raises(ValueError, match="c3_in1k"):
        compose("resnet10t.imagenet", tiny_gpt2(), tokenizer=tokenizer, pretrained=False)


def test_a_backbone_without_pretrained_weights_is_refused(tokenizer):
    name = next(name for name in timm.list_models("resnet*") if not timm.is_model_pretrained(name))
    with pytest.raises(ValueError, match="pretrained=False"):
        compose(name, tiny_gpt2(), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("vision", "text"),
    [("someone/some-backbone", None), ("resnet10t", None), (None, "openai-community/gpt2")],
    ids=["Hub backbone", "timm weights", "Hub language model"],
)
def test_what_must_be_downloaded_is_refused_offline(
    timm_folder, gpt2_folder, tmp_path, monkeypatch, vision, text, tokenizer
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"(?is){text or vision}.*(connect|traffic|offline)"):
        compose(vision or timm_folder, text or gpt2_folder)


def test_a_configuration_brings_no_tokenizer():
    with pytest.raises(ValueError, match="pass `tokenizer=`"):
        compose("resnet10t", GPT2Config(), pretrained=False)


def test_a_folder_without_a_tokenizer_is_refused(timm_folder, tmp_path):
    GPT2LMHeadModel(tiny_gpt2()).save_pretrained(tmp_path)  # of which the library makes a tokenizer without words
    assert AutoTokenizer.from_pretrained(tmp_path)("A photo").input_ids == []
    with pytest.raises(ValueError, match=f"There is no tokenizer in {tmp_path}: put its files there"):
        compose(timm_folder, tmp_path)
    with pytest.raises(ValueError, match=f"There is no tokenizer in {tmp_path}"):
        compose(timm_folder, tiny_gpt2(), tokenizer=tmp_path)
    with pytest.raises(ValueError, match=f"There is no tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_end_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        tiny(endless)


def test_a_folder_that_is_no_backbone_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        compose(tmp_path, tiny_gpt2(), tokenizer=tokenizer)


def test_unknown_fields_are_refused(tokenizer):
    with pytest.raises(ValueError, match="num_image_tokens"):
        tiny(tokenizer, num_image_token=4)


@pytest.mark.parametrize("model_type", ["phi", "gptj"])
def test_a_language_model_that_needs_its_heads_bias_is_refused(tokenizer, tmp_path, model_type):
    sizes = {"phi": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}}
    sizes["gptj"] = {"n_embd": 32, "n_head": 2, "n_layer": 2, "rotary_dim": 8}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 400}
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes[model_type], **tokens))
    torch.nn.init.normal_(language_model.lm_head.bias)
    language_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = {"preprocessing": {"input_size": (3, 64, 64)}, "pretrained": True}
    with pytest.raises(ValueError, match=r"more than a plain head.*GPT-2 kind"):
        compose(random_backbone(tmp_path / "backbone"), tmp_path, **backbone)


def random_backbone(folder):
    """The smallest backbone with weights to load."""
    folder.mkdir()
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "classifier": "fc"}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "num_classes": 0, "pretrained_cfg": cfg})
    )
    return folder


def test_the_language_models_way_of_generating_is_kept(timm_folder, gpt2_folder, tmp_path):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    original = GPT2LMHeadModel.from_pretrained(folder)
    original.generation_config.repetition_penalty = 5.0
    original.generation_config.eos_token_id = [0, 7]
    original.generation_config.suppress_tokens = [3]
    original.save_pretrained(folder)
    written = json.loads((folder / "generation_config.json").read_text())
    written |= {"temperature": 0.6, "top_p": 0.9, "max_length": 8}  # as some published ones have them
    (folder / "generation_config.json").write_text(json.dumps(written))
    model, processor = compose(timm_folder, folder, num_image_tokens=4)
    model.save_pretrained(tmp_path / "saved")
    ids = processor(text="A photo of a dog", return_tensors="pt")
    expected = original.generate(**ids, max_new_tokens=12)
    assert torch.equal(model.generate(**ids, max_new_tokens=12), expected)
    assert model.generation_config.eos_token_id == [0, 7]
    assert model.generation_config.suppress_tokens == [3, model.config.image_token_id]


def test_generation_also_ends_where_the_tokenizer_learns_to_end(timm_folder, gpt2_folder, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "!"
    model, processor = compose(timm_folder, gpt2_folder, tokenizer=other, num_image_tokens=4)
    end = processor.tokenizer.eos_token_id
    assert end == tokenizer.convert_tokens_to_ids("!")
    assert model.generation_config.eos_token_id == [0, end]


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.openai", "timm/vit_base_patch32_clip_224.openai"])
def test_pain_17_weights_trained_with_another_activation_are_refused(tokenizer, name):
    with pytest.raises(ValueError, match=r"trained with QuickGELU.*quickgelu"):
        compose(name, tiny_gpt2(), tokenizer=tokenizer)


def test_pretrained_weights_may_take_grey_images(timm_folder, tokenizer):
    grey = {"input_size": (1, 64, 64)}
    model, processor = compose(timm_folder, tiny_gpt2(), tokenizer=tokenizer, preprocessing=grey, num_image_tokens=4)
    reference = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, in_chans=1).eval()
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
    assert pixels.shape[1] == 1
    tower = model.model.vision_tower.timm_model
    assert torch.equal(tower.forward_features(pixels), reference.forward_features(pixels))
