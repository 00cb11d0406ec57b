"""LoRA: what learns is named or refused, and the merged model does what the adapted one did."""

import copy
import shutil

import pytest
import torch
from conftest import max_difference, picture, tiny, tiny_gpt2
from peft import PeftModel
from trainers import eight_rows, trainer_of

from imageprompt import ImagePromptCollator, compose
from imageprompt.training.lora import add_lora, merge_lora

C_ATTN = {"r": 4, "target_modules": ["c_attn"]}


def batch_of(processor):
    return ImagePromptCollator(processor)([{"image": picture(3), "text": "A photo", "suffix": " of a dog!"}])


def logits(model, processor):
    with torch.no_grad():
        return model.eval()(**batch_of(processor)).logits


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("layout", "tied", "settings"),
    [
        ("NCHW", True, C_ATTN),
        ("NLC", True, {"target_modules": "all-linear"}),
        ("NLC", True, {"target_modules": ["qkv", "c_fc"], "modules_to_save": [], "use_dora": True}),
        ("NCHW", True, C_ATTN | {"modules_to_save": ["vision_tower", "connector"]}),
        ("NCHW", True, C_ATTN | {"modules_to_save": ["lm_head"]}),
        ("NCHW", True, C_ATTN | {"modules_to_save": ["wte", "connector"], "bias": "all"}),
        ("NCHW", False, {"target_modules": ["c_attn", "wte", "lm_head"]}),
    ],
    ids=["c_attn", "all-linear", "dora", "tower as a whole", "head unties", "embeddings untie", "untied"],
)
def test_merged_reloaded_and_adapted_models_give_the_same_logits(tokenizer, tmp_path, layout, tied, settings):
    model, processor = tiny(tokenizer, layout, tiny_gpt2(initializer_range=0.2, tie_word_embeddings=tied))
    base = copy.deepcopy(model)
    trainable = dict(model.config.trainable)
    adapted = add_lora(model, settings)
    trainer = trainer_of(tokenizer, tmp_path, model=(adapted, processor), learning_rate=1e-2, max_steps=3)
    trainer.train()
    expected = logits(adapted, processor)
    assert max_difference(expected, logits(base, processor)) > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert max_difference(logits(again, processor), expected) <= 1e-5

    merged = merge_lora(adapted, processor, trainable)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged")
    for model in (merged, reloaded):
        assert type(model) is type(base) and not any("lora" in name for name in model.state_dict())
        assert max_difference(logits(model, processor), expected) <= 1e-4
        assert model.config.trainable == trainable
        assert learning(model) >= {name for name in learning(base) if name != "lm_head.weight"}


def test_what_learns_is_what_is_named(tokenizer):
    model, processor = tiny(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = add_lora(model, C_ATTN)
    assert learning(adapted) == {
        f"base_model.model.model.{name}"
        for layer in range(2)
        for side in "AB"
        for name in [f"language_model.h.{layer}.attn.c_attn.lora_{side}.default.weight"]
    } | {
        f"base_model.model.model.connector.modules_to_save.default.{n}.{w}"
        for n in ("linear_1", "linear_2")
        for w in ("weight", "bias")
    }
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted.train()(**batch_of(processor)).loss.backward()
    optimizer.step()
    merged = merge_lora(adapted, processor, {"vision": True, "connector": False, "text": True})
    assert merged.config.trainable["connector"] is False and not any("connector" in name for name in learning(merged))
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    # Batch norm's statistics and the embedding of `<image>` among the rest stay as they were.
    assert {name.split(".")[1] for name in moved} == {"connector", "language_model"}
    assert all("connector" in name or "c_attn" in name for name in moved)


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({"target_modules": r".*layer1\.0\.conv1"}, False),
        (C_ATTN | {"modules_to_save": ["vision_tower"]}, True),
    ],
    ids=["adapters", "tower as a whole"],
)
def test_adapters_in_a_tower_leave_its_statistics_and_a_whole_tower_learns_them(tokenizer, settings, moves):
    model, processor = tiny(tokenizer)
    adapted = add_lora(model, settings)
    before = {name: value.clone() for name, value in adapted.state_dict().items() if "running" in name}
    adapted.train()(**batch_of(processor)).loss.backward()
    moved = [name for name, value in before.items() if not torch.equal(value, adapted.state_dict()[name])]
    assert bool(moved) == moves and all("modules_to_save" in name for name in moved)
    assert any(p.grad is not None for name, p in adapted.named_parameters() if "vision_tower" in name)


@pytest.mark.parametrize("saved", [[], ["vision_tower"]], ids=["adapters", "tower as a whole"])
def test_pain_07_every_parameter_that_learns_gets_a_gradient(tokenizer, saved):
    model_args = {"depth": 1, "embed_dim": 48, "num_heads": 2}  # and an attention pool that is not used
    settings = {"preprocessing": {"input_size": (3, 64, 64)}, "model_args": model_args, "num_image_tokens": 4}
    model, processor = compose(
        "vit_base_patch16_siglip_224", tiny_gpt2(), tokenizer=tokenizer, pretrained=False, **settings
    )
    adapted = add_lora(model, {"target_modules": "all-linear", "modules_to_save": saved})
    adapted.train()(**batch_of(processor)).loss.backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any("vision_tower" in name for name in learning(adapted))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj"]},
            "target_modules has 'q_proj', which no layer is called. There are c_attn, c_fc, c_proj, conv1",
        ),
        (
            {"target_modules": ["c_attn", "q_proj"]},
            "target_modules has 'q_proj', which no layer is called. There are .*c_attn",
        ),
        (
            C_ATTN | {"modules_to_save": ["projector"]},
            "modules_to_save has 'projector', .*There are .*connector.*lm_head",
        ),
        (C_ATTN | {"modules_to_save": ["connector", "head.fc"]}, "modules_to_save has 'head.fc'"),
        ({"r": 4}, "--lora needs target_modules: all-linear, or names of layers: .*c_attn"),
        ({"target_module": ["c_attn"]}, "LoraConfig has no setting 'target_module'. Did you mean 'target_modules'"),
        ({"target_modules": ["c_attn", "lm_head"]}, "lm_head shares its weights"),
        ({"target_modules": ["wte"], "ensure_weight_tying": True}, "wte shares its weights"),
        ({"target_modules": ["attn"]}, "(?s)--lora: Target module .*This model's layers are"),
    ],
)
def test_pain_19_names_that_match_nothing_and_tied_layers_are_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny(tokenizer)[0], settings)


def test_a_merge_that_gives_other_logits_is_refused(tokenizer, monkeypatch):
    model, processor = tiny(tokenizer)
    adapted = add_lora(model, C_ATTN)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    monkeypatch.setattr(adapted, "merge_and_unload", lambda: adapted.unload())  # loses the adapter
    with pytest.raises(ValueError, match="the adapter gives other logits"):
        merge_lora(adapted, processor, {})


def test_a_resumed_run_with_adapters_ends_where_an_unbroken_one_does(tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    settings |= {"load_best_model_at_end": True, "learning_rate": 1e-2, "connector_learning_rate": 1e-1}
    base = tiny(tokenizer, text_config=tiny_gpt2(initializer_range=0.2))

    def run(folder):
        model = add_lora(copy.deepcopy(base[0]), C_ATTN)
        return trainer_of(tokenizer, folder, eight_rows(), (model, base[1]), **settings)

    unbroken = run(tmp_path / "unbroken")
    unbroken.train()
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    resumed = run(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    groups = {(group["part"], group["lr"] > 0) for group in unbroken.optimizer.param_groups}
    assert {part for part, _ in groups} == {"connector", "text"}
    assert max_difference(logits(unbroken.model, base[1]), logits(resumed.model, base[1])) <= 1e-5
    # The best is the checkpoint that says so, whichever it is.
    best = PeftModel.from_pretrained(copy.deepcopy(base[0]), unbroken.state.best_model_checkpoint)
    assert max_difference(logits(best, base[1]), logits(unbroken.model, base[1])) <= 1e-5
