"""The processor puts images where they belong, supervises exactly the suffix, and refuses what does not add up."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from conftest import max_difference, picture, tiny
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from imageprompt import ImagePromptImageProcessor, ImagePromptProcessor

TOKENS = 4  # per image


@pytest.fixture(scope="module")
def parts(tokenizer):
    return tiny(tokenizer, num_image_tokens=TOKENS)


@pytest.fixture
def processor(parts) -> ImagePromptProcessor:
    return parts[1]


@pytest.fixture(scope="module")
def images():
    return [picture(seed) for seed in range(4)]


def ids(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False).input_ids


def image_ids(processor, count: int = 1) -> list[int]:
    return [processor.image_token_id] * TOKENS * count


# --- where images go


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("A dog", "", "A dog"),
        ("<image>A dog", "", "A dog"),
        ("A <image> dog", "A ", " dog"),
        ("A dog <image>", "A dog ", ""),
    ],
)
def test_pain_01_an_image_goes_to_its_mark_and_in_front_without_one(text, before, after, processor, images):
    expected = ids(processor, before) + image_ids(processor) + ids(processor, after)
    outputs = processor(images[0], text)
    assert outputs["input_ids"] == [expected]
    assert outputs["attention_mask"] == [[1] * len(expected)]


def test_several_images_keep_their_order(processor, images):
    text = "A <image> and <image>!"
    outputs = processor([images[:2]], [text], return_tensors="pt")
    expected = ids(processor, "A ") + image_ids(processor) + ids(processor, " and ") + image_ids(processor)
    assert outputs["input_ids"].tolist() == [expected + ids(processor, "!")]
    alone = processor.image_processor(images[:2], return_tensors="pt")["pixel_values"]
    assert torch.equal(outputs["pixel_values"], alone)


def arrays(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize(
    ("pick", "text", "counts"),
    [
        (lambda i: i[0], "A dog", [1]),
        (lambda i: i[0], None, [1]),
        (lambda i: i[:2], None, [1, 1]),
        (lambda i: i[:2], ["A", "B"], [1, 1]),
        (lambda i: tuple(i[:2]), ("A", "B"), [1, 1]),
        (lambda i: i[:3], "A dog", [1, 1, 1]),
        (lambda i: [i[0], None, i[1]], ["A", "B", "C"], [1, 0, 1]),
        (lambda i: [[i[0]], [], [i[1]]], ["A", "B", "C"], [1, 0, 1]),
        (lambda i: [[i[0]], None, i[1]], ["A", "B", "C"], [1, 0, 1]),
        (lambda i: [i[:3], [i[3]]], ["A", "B"], [3, 1]),
        (lambda i: [i[:2]], "A <image> or <image>", [2]),
        (lambda i: i[:2], "A <image> or <image>", [2]),
        (lambda i: i[:3], ["A <image> or <image>", "<image> C"], [2, 1]),
        (lambda i: i[:2], ["A <image>", "B"], [1, 1]),
        (lambda i: None, ["A", "B"], [0, 0]),
        (lambda i: [], "A", [0]),
        (lambda i: np.asarray(i[0]), "A", [1]),
        (lambda i: [np.asarray(i[0]), np.asarray(i[1])], ["A", "B"], [1, 1]),
        (lambda i: arrays(i[:2]), ["A", "B"], [1, 1]),
        (lambda i: torch.from_numpy(arrays(i[:2])), ["A", "B"], [1, 1]),
        (lambda i: [arrays(i[:2]), arrays(i[2:])], ["A", "B"], [2, 2]),
    ],
)
def test_pain_06_rows_take_none_one_or_several_images(pick, text, counts, processor, images):
    outputs = processor(pick(images), text, return_tensors="pt", padding=True)
    marks = (outputs["input_ids"] == processor.image_token_id).sum(1)
    assert marks.tolist() == [TOKENS * count for count in counts]
    assert len(outputs.get("pixel_values", [])) == sum(counts)


def test_pain_06_rows_keep_the_result_they_have_alone(processor, images):
    rows = [([images[0]], "A dog"), ([], "Two cats on a red sofa."), (images[1:3], "What is it?")]
    batch = processor([row[0] for row in rows], [row[1] for row in rows], return_tensors="pt", padding=True)
    pixels = iter(batch["pixel_values"])
    for (row_images, text), row, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = processor([row_images], [text], return_tensors="pt")
        assert torch.equal(row[mask.bool()], alone["input_ids"][0])
        for image in alone.get("pixel_values", []):
            assert torch.equal(next(pixels), image)


def kinds_of(image, folder):
    """The same picture in every form that an image may have."""
    path = folder / "picture.png"
    image.save(path)
    data = path.read_bytes()
    array = np.asarray(image).copy()
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    text = base64.b64encode(data).decode()
    encoded = [path, str(path), data, bytearray(data), text, f"data:image/png;base64,{text}"]
    return [image, Image.open(path), array, array / 255, tensor, tensor / 255, *encoded]


@pytest.mark.parametrize("nested", [False, True])
def test_every_kind_of_image_may_stand_in_a_row(nested, processor, images, tmp_path):
    expected = processor(images[0], "A <image> dog", return_tensors="pt")
    kinds = kinds_of(images[0], tmp_path)
    for kind in kinds:
        outputs = processor([[kind]] if nested else kind, "A <image> dog", return_tensors="pt")
        assert all(torch.equal(outputs[key], expected[key]) for key in expected)
    rows = [[kind] for kind in kinds] if nested else kinds
    batch = processor(rows, "A <image> dog", return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"].expand(len(kinds), -1, -1, -1))
    row = processor([kinds], "A dog", return_tensors="pt")  # all in one row
    assert torch.equal(row["pixel_values"], batch["pixel_values"])
    assert (row["input_ids"] == processor.image_token_id).sum() == len(kinds) * TOKENS


def test_columns_of_a_data_set_are_lists(processor, images):
    dataset = pytest.importorskip("datasets").Dataset.from_dict({"image": images[:2], "text": ["A", "B"]})
    from_columns = processor(dataset["image"], dataset["text"], return_tensors="pt")
    assert torch.equal(
        from_columns["pixel_values"], processor(images[:2], ["A", "B"], return_tensors="pt")["pixel_values"]
    )


MISMATCHES = {
    "too few images": (2, ["A <image> <image> <image>", "B"], r"Row 0 has 3 <image> in its text but 1 images"),
    "a mark without an image": (0, ["A <image>"], r"Row 0 has 1 <image> in its text but 0 images"),
    "fewer rows than texts": (1, ["A", "B"], r"1 rows of images but 2 texts.*nest it"),
    "more rows than texts": (3, ["A", "B"], r"3 rows of images but 2 texts"),
    "a number as text": (1, [7], r"`text` of row 0 is a int"),
    "no text": (1, [None], r"`text` of row 0 is a NoneType"),
    "text of a wrong type": (1, 7, r"`text` is a string or a list of strings, not int"),
    "an empty row": (0, ["A", ""], r"Row 1 is empty: give it a text or an image"),
    "nothing": (0, None, r"Pass `images`, `text` or both"),
}


@pytest.mark.parametrize(("count", "text", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_mismatch_is_refused_with_its_row(count, text, message, processor, images):
    with pytest.raises(ValueError, match=message):
        processor(images[:count] or None, text)


def test_swapped_arguments_are_refused(processor, images):
    with pytest.raises(ValueError, match="`text` is a string or a list of strings"):
        processor("A dog", images[0])


def test_nested_rows_are_counted_row_by_row(processor, images):
    with pytest.raises(ValueError, match="Row 1 has 1 <image> in its text but 2 images"):
        processor([[images[0]], images[1:3]], ["A <image>", "B <image>"])


@pytest.mark.parametrize("keyword", ["videos", "audio"])
def test_other_inputs_are_refused(keyword, processor):
    with pytest.raises(ValueError, match="takes images and text"):
        processor(text="A", **{keyword: [1]})


def test_an_unreadable_image_is_named(processor, images):
    with pytest.raises(ValueError, match=r"Image 1: no readable image in 'missing\.png'"):
        processor([images[0], "missing.png"], ["A", "B"])


# --- few-shot

SHOTS = ["It is a dog!\n", "What is it? Two cats.\n", "It is"]


@torch.no_grad()
def by_hand(model, processor, pieces, row_images):
    """Logits of (image, piece) after (image, piece), from embeddings put together here."""
    embeddings = []
    for image, piece in zip(row_images, pieces, strict=True):
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values).pooler_output
        embeddings.append(torch.as_tensor(features[0]))
        embeddings.append(model.get_input_embeddings()(torch.tensor(ids(processor, piece))))
    embeddings = torch.cat(embeddings)[None]
    return model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state)[0]


@torch.no_grad()
def test_a_few_shot_prompt_gives_the_logits_of_hand_built_inputs(parts, images):
    model, processor = parts
    inputs = processor([images[:3]], ["<image>" + "<image>".join(SHOTS)], return_tensors="pt")
    expected = [token for piece in SHOTS for token in image_ids(processor) + ids(processor, piece)]
    assert inputs["input_ids"].tolist() == [expected]
    expected = by_hand(model, processor, SHOTS, images[:3])
    assert max_difference(model(**inputs).logits[0], expected) <= 1e-5
    swapped = by_hand(model, processor, SHOTS, [images[1], images[0], images[2]])
    assert max_difference(swapped, expected) > 1e-3  # or the comparison would say nothing


@torch.no_grad()
def test_pain_03_few_shot_and_zero_shot_rows_in_one_batch_give_what_they_give_alone(parts, images):
    model, processor = parts
    rows = [([images[0]], SHOTS[-1:]), (images[:3], SHOTS), (images[2:], SHOTS[1:])]
    texts = ["<image>" + "<image>".join(pieces) for _, pieces in rows]
    batch = processor([row_images for row_images, _ in rows], texts, padding=True, return_tensors="pt")
    logits = model(**batch).logits
    for row, (row_images, pieces) in enumerate(rows):
        expected = by_hand(model, processor, pieces, row_images)
        assert max_difference(logits[row, -len(expected) :], expected) <= 1e-5


# --- labels


SUFFIXES = [" a dog", "!", "! a !", " <|endoftext|> it", " seven.\n", "<|endoftext|", ""]


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_pain_09_exactly_the_suffix_and_its_eos_are_supervised(return_tensors, processor, images):
    texts = ["What is it?", "", "A", "Two <image> cats", "x!", "y", "z"]
    rows = [[image] for image in images[:4]] + [[], [], []]
    outputs = processor(rows, texts, suffix=SUFFIXES, padding=True, return_tensors=return_tensors)
    assert isinstance(outputs["labels"], {None: list, "np": np.ndarray, "pt": torch.Tensor}[return_tensors])
    for row, (row_images, text, suffix) in enumerate(zip(rows, texts, SUFFIXES, strict=True)):
        prompt = processor([row_images], [text])["input_ids"][0] if row_images or text else []
        learnt = [*ids(processor, suffix), processor.tokenizer.eos_token_id]
        padding = len(outputs["input_ids"][row]) - len(prompt) - len(learnt)
        pad = [processor.tokenizer.pad_token_id] * padding
        assert list(outputs["input_ids"][row]) == prompt + learnt + pad
        assert list(outputs["labels"][row]) == [-100] * len(prompt) + learnt + [-100] * padding
        assert list(outputs["attention_mask"][row]) == [1] * (len(prompt) + len(learnt)) + [0] * padding
    assert "token_type_ids" not in outputs


def test_pain_09_the_first_token_of_the_vocabulary_is_learnt(shared_data, images):
    tokenizer = AutoTokenizer.from_pretrained(
        shared_data / "gpt2_tokenizer", extra_special_tokens={"image_token": "<image>"}
    )
    processor = ImagePromptProcessor(ImagePromptImageProcessor(), tokenizer, num_image_tokens=TOKENS)
    tokenizer.pad_token = tokenizer.eos_token
    outputs = processor(images[:2], ["Hi", "Say it"], suffix=["!", " a photo of two dogs!"], padding=True)
    assert ids(processor, "!") == [0]
    assert [[label for label in row if label != -100] for row in outputs["labels"]] == [
        [0, 50256],
        [257, 4590, 286, 734, 6844, 0, 50256],
    ]
    assert (tokenizer.image_token_id, len(tokenizer)) == (50257, 50258)


def test_one_suffix_for_one_row_may_be_a_string(processor, images):
    outputs = processor(images[0], "A", suffix="!")
    assert outputs["labels"] == processor([images[0]], ["A"], suffix=["!"])["labels"]


def test_the_prompt_is_tokenised_as_without_its_suffix(processor, images):
    # "is" and " it" are merged in one text; the prompt that is learnt must be the prompt that is asked.
    prompt = processor(images[0], "What i")["input_ids"][0]
    assert processor(images[0], "What i", suffix="s it")["input_ids"][0][: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (["a <image>", "b"], "`suffix` of row 0 holds <image>"),
        (["a", None], "`suffix` of row 1 is None, not a text"),
        (["a"], "2 rows but 1 suffixes: pass one suffix per row"),
        ("a", "2 rows but 1 suffixes"),
        (["a", "b", "c"], "2 rows but 3 suffixes"),
    ],
)
def test_a_wrong_suffix_is_refused(suffix, message, processor, images):
    with pytest.raises(ValueError, match=message):
        processor(images[:2], ["A", "B"], suffix=suffix)


def test_a_suffix_after_nothing_is_refused(processor, images):
    with pytest.raises(ValueError, match=r"Row 1 has nothing before its suffix.*<\|endoftext\|>"):
        processor([images[0], None], ["", ""], suffix=["a", "b"])


def test_a_tokenizer_that_adds_tokens_around_a_suffix_is_refused(parts, images, tmp_path):
    parts[1].tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|>:1 $B:1", special_tokens=[("<|endoftext|>", eos)]
    )
    processor = ImagePromptProcessor(parts[1].image_processor, tokenizer, num_image_tokens=TOKENS)
    with pytest.raises(ValueError, match=r"adds special tokens around a suffix.*`add_special_tokens=False`"):
        processor(images[0], "A", suffix="b")
    outputs = processor(images[0], "A", suffix="b", add_special_tokens=False)
    assert outputs["labels"][0][-2:] == [*ids(processor, "b"), eos]
    assert outputs["labels"][0][:-2] == [-100] * (TOKENS + 1)


# --- padding, truncation, limits


@pytest.mark.parametrize("how", ["flat", "nested"])
@pytest.mark.parametrize(
    ("suffix", "side", "first"), [(None, None, 0), (["a", "b"], None, 1), (None, "right", 1), (["a", "b"], "left", 0)]
)
def test_padding_is_left_to_generate_and_right_to_learn_unless_asked(how, suffix, side, first, processor, images):
    settings = {"padding": True, "return_tensors": "pt"} | ({"padding_side": side} if side else {})
    settings = settings if how == "flat" else {"text_kwargs": settings}
    outputs = processor(images[:2], ["A", "Two cats on a sofa"], suffix=suffix, **settings)
    assert outputs["attention_mask"][0, 0] == first
    assert outputs["attention_mask"][0].sum() < outputs["attention_mask"][1].sum()
    if suffix:
        assert (outputs["labels"] != -100).sum(1).tolist() == [2, 2]


def test_padding_does_not_depend_on_the_tokenizers_side(parts, images, tmp_path):
    parts[1].tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="right")
    processor = ImagePromptProcessor(parts[1].image_processor, tokenizer, num_image_tokens=TOKENS)
    assert processor(images[:2], ["A", "Two cats"], padding=True)["attention_mask"][0][0] == 0


@pytest.mark.parametrize("how", ["flat", "nested"])
@pytest.mark.parametrize("truncation", [True, "longest_first", "only_second", "only_first"])
def test_pain_04_truncation_trims_only_the_suffix(how, truncation, processor, images):
    prompt = processor(images[0], "A photo of a dog")["input_ids"][0]
    settings = {"truncation": truncation, "max_length": len(prompt) + 2}
    settings = settings if how == "flat" else {"text_kwargs": settings}
    outputs = processor(images[0], "A photo of a dog", suffix=" Two cats on a red sofa.", **settings)
    kept = ids(processor, " Two cats on a red sofa.")[:2]
    assert outputs["input_ids"] == [prompt + kept]
    assert outputs["labels"] == [[-100] * len(prompt) + kept]


@pytest.mark.parametrize("spare", [-3, 0])
def test_pain_04_truncation_never_cuts_an_image_or_a_prompt(spare, processor, images):
    length = len(processor(images[1], "A photo of a dog")["input_ids"][0])
    with pytest.raises(
        ValueError, match=rf"Row 1 has {length} tokens before its suffix \(4 for each image\): {length + spare} leave"
    ):
        processor(images[:2], ["A", "A photo of a dog"], suffix=["x", "y"], truncation=True, max_length=length + spare)


def test_pain_04_truncation_through_an_image_is_refused(processor, images):
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(images[0], "A dog", truncation=True, max_length=TOKENS - 1)


def test_without_a_suffix_truncation_trims_the_text(processor, images):
    outputs = processor(images[0], "Two cats on a red sofa.", truncation=True, max_length=TOKENS + 2)
    assert outputs["input_ids"] == [image_ids(processor) + ids(processor, "Two cats on a red sofa.")[:2]]


@pytest.mark.parametrize("how", ["flat", "nested"])
@pytest.mark.parametrize("suffix", [None, " Two cats"])
def test_pain_04_a_maximum_length_alone_cuts_nothing_and_refuses_longer_rows(how, suffix, processor, images):
    settings = {"max_length": 7} if how == "flat" else {"text_kwargs": {"max_length": 7}}
    with pytest.raises(ValueError, match=r"Row 0 has \d+ tokens .* more than the 7 tokens of `max_length`"):
        processor(images[0], "A photo of a dog", suffix=suffix, **settings)


def test_padding_to_a_length(processor, images):
    outputs = processor(images[0], "A", suffix="b", padding="max_length", max_length=20, return_tensors="pt")
    assert outputs["labels"].shape == outputs["input_ids"].shape == (1, 20)
    assert (outputs["labels"] != -100).sum() == 2


@pytest.mark.parametrize("padding", [False, True])
def test_pain_05_rows_over_the_positions_are_refused(padding, processor, images):
    long = "A!" * 130
    assert processor.tokenizer.model_max_length == 256
    with pytest.raises(ValueError, match=r"Row 1 has 26\d tokens .* more than the 256 positions of the language model"):
        processor(images[:2], ["A", long], padding=padding)


def test_a_setting_given_twice_is_refused(processor, images):
    with pytest.raises(ValueError, match="padding: given twice, in `text_kwargs` and beside it"):
        processor(images[0], "A", padding=True, text_kwargs={"padding": True})


def test_nested_settings_of_images_are_used(processor, images):
    outputs = processor(images[0], "A", images_kwargs={"size": {"height": 32, "width": 32}}, return_tensors="pt")
    assert outputs["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(TypeError, match="do_normalize"):
        processor(images[0], "A", do_normalize=False)


# --- what other tools ask of a processor


def test_offsets_say_what_was_replaced(processor, images):
    text = "A <image> or <image>!"
    offsets = processor([images[:2]], [text], return_text_replacement_offsets=True)["text_replacement_offsets"][0]
    expanded = text.replace("<image>", "<image>" * TOKENS)
    assert [text[slice(*offset["span"])] for offset in offsets] == ["<image>"] * 2
    assert [expanded[slice(*offset["new_span"])] for offset in offsets] == ["<image>" * TOKENS] * 2


def test_token_types_mark_the_images(processor, images):
    outputs = processor(images[0], "A <image> b", suffix="c", return_mm_token_type_ids=True, return_tensors="pt")
    assert torch.equal(outputs["mm_token_type_ids"] == 1, outputs["input_ids"] == processor.image_token_id)


def test_placeholders_are_counted_without_images(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (300, 400)])
    assert (data.num_image_tokens, data.num_image_patches) == ([TOKENS, TOKENS], [1, 1])


def test_model_inputs_are_named(processor):
    assert set(processor.model_input_names) >= {"input_ids", "attention_mask", "pixel_values"}


# --- chat


def chat(image=None, answer=None, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    content = [{"type": "image", "image": image}] if image is not None else []
    turns.append({"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]})
    return turns + ([{"role": "assistant", "content": answer}] if answer else [])


@pytest.mark.parametrize(
    ("conversation", "settings", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], {}, "User: Hi\n"),
        (chat("x"), {"add_generation_prompt": True}, "User: <image>What is it?\nAssistant:"),
        (chat("x", "A dog!", "Be brief."), {}, "Be brief.\nUser: <image>What is it?\nAssistant: A dog!<|endoftext|>\n"),
        (chat("x", "A d"), {"continue_final_message": True}, "User: <image>What is it?\nAssistant: A d"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "image"}, {"type": "image"}]}],
            {},
            "User: 1 <image><image>\n",
        ),
    ],
)
def test_pain_29_a_chat_template_ships(conversation, settings, expected, processor):
    assert processor.apply_chat_template(conversation, **settings) == expected


def test_a_chat_becomes_the_same_inputs_as_its_text(processor, images):
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    outputs = processor.apply_chat_template(chat(images[0]), **settings)
    expected = processor(images[0], "User: <image>What is it?\nAssistant:", return_tensors="pt")
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)


def test_system_text_may_be_a_text_or_a_list_with_images(processor, images):
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    question = {"role": "user", "content": "What is it?"}
    written = [{"role": "system", "content": "Be brief."}, question]
    listed = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, question]
    assert processor.apply_chat_template(written) == processor.apply_chat_template(listed)
    shown = [{"type": "text", "text": "Look: "}, {"type": "image", "image": images[0]}]
    outputs = processor.apply_chat_template([{"role": "system", "content": shown}, question], **settings)
    expected = processor(images[0], "Look: <image>\nUser: What is it?\n", return_tensors="pt")
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)


def test_a_chat_may_have_several_images_in_several_turns_in_order(processor, images):
    def user(*content):
        parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
        return {"role": "user", "content": parts}

    turns = [
        {"role": "system", "content": "Be brief."},
        user(images[3], "or", images[1], "?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A dog!"}]},
        user("And ", images[0]),
        {"role": "assistant", "content": "Two cats."},
        user(images[2]),
    ]
    text = (
        "Be brief.\nUser: <image>or<image>?\nAssistant: A dog!<|endoftext|>\n"
        "User: And <image>\nAssistant: Two cats.<|endoftext|>\nUser: <image>\nAssistant:"
    )
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == text
    outputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor([[images[3], images[1], images[0], images[2]]], [text], return_tensors="pt")
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)


def test_an_image_of_a_chat_may_be_named_by_any_of_the_librarys_keys(processor, images, tmp_path):
    images[0].save(tmp_path / "picture.png")
    text = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    uri = f"data:image/png;base64,{text}"
    parts = [{"image": images[0]}, {"path": str(tmp_path / "picture.png")}, {"url": uri}, {"base64": text}]
    content = [{"type": "image", **part} for part in parts] + [{"type": "image_url", "image_url": {"url": uri}}]
    outputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(
        outputs["pixel_values"], processor.image_processor(images[:1] * 5, return_tensors="pt")["pixel_values"]
    )


def test_text_of_a_chat_that_holds_a_mark_is_refused_without_its_image(processor, images):
    with pytest.raises(ValueError, match="Row 0 has 2 <image> in its text but 1 images"):
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "<image>?"}],
                }
            ],
            tokenize=True,
            return_dict=True,
        )


def test_a_batch_of_chats_mixes_rows_with_and_without_images(processor, images):
    outputs = processor.apply_chat_template(
        [chat(images[0], system="Be brief."), chat()],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert (outputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [TOKENS, 0]
    assert outputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert len(outputs["pixel_values"]) == 1


def test_the_assistants_mask_covers_the_answer_and_its_eos(processor, images):
    turns = chat(images[0], "A dog!") + chat(images[1], "Two cats.")
    outputs = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    answers = outputs["input_ids"][torch.as_tensor(outputs["assistant_masks"]).bool()]
    eos = processor.tokenizer.eos_token_id
    assert answers.tolist() == [*ids(processor, " A dog!"), eos, *ids(processor, " Two cats."), eos]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, "roles are 'system', 'user' and 'assistant', got 'tool'"),
        ({"role": "user", "content": [{"type": "video"}]}, "contents are 'text' and 'image', got 'video'"),
    ],
)
def test_what_the_chat_template_does_not_know_is_refused(message, error, processor):
    with pytest.raises(Exception, match=error):
        processor.apply_chat_template([message])


def test_the_chat_template_uses_the_tokenizers_image_token(parts, images, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens={"image_token": "<pic>"})
    processor = ImagePromptProcessor(parts[1].image_processor, other, num_image_tokens=TOKENS)
    assert processor.apply_chat_template(chat("x")) == "User: <pic>What is it?\n"
    outputs = processor.apply_chat_template(chat(images[0]), tokenize=True, return_dict=True)
    assert outputs["input_ids"][0].count(other.convert_tokens_to_ids("<pic>")) == TOKENS


# --- saving, and belonging to a model


def test_a_reloaded_processor_gives_equal_outputs(processor, images, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.replace("User: ", "Person: "))
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    assert isinstance(loaded, ImagePromptProcessor)
    assert loaded.apply_chat_template(chat("x", "A dog")) == processor.apply_chat_template(chat("x", "A dog"))
    assert "Person: " in loaded.chat_template
    for settings in ({}, {"suffix": ["a", "b c"]}):
        settings |= {"images": [[images[0]], []], "text": ["A", "Two cats"], "padding": True, "return_tensors": "pt"}
        outputs, expected = loaded(**settings), processor(**settings)
        assert outputs.keys() == expected.keys()
        assert all(torch.equal(outputs[key], expected[key]) for key in expected)
    for name in ("padding_side", "pad_token", "model_max_length", "image_token_id"):
        assert getattr(loaded.tokenizer, name) == getattr(processor.tokenizer, name)
    assert not list(tmp_path.glob("*.bin"))


def test_a_processor_belongs_to_its_model(parts):
    model, processor = parts
    processor.check_model(model)
    processor.check_model(model.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_image_tokens": 2}, "num_image_tokens 2 here, 4 in the model"),
        ({"size": {"height": 32, "width": 64}}, r"input_size \[3, 32, 64\] here, \[3, 64, 64\] in the model"),
        ({"image_mean": [0.5] * 3}, r"mean \[0.5, 0.5, 0.5\] here, \[0.485"),
        ({"image_std": [0.5] * 3}, r"std \[0.5, 0.5, 0.5\] here, \[0.229"),
        ({"crop_pct": 0.5}, "crop_pct 0.5 here"),
        ({"crop_mode": "squash"}, "crop_mode squash here, center in the model"),
        ({"resample": 2}, "interpolation bilinear here, bicubic in the model"),
    ],
)
def test_pain_17_a_foreign_processor_is_refused_with_each_difference(change, message, parts):
    model, processor = parts
    settings = processor.image_processor.to_dict() | change
    other = ImagePromptProcessor(
        ImagePromptImageProcessor.from_dict({k: v for k, v in settings.items() if k != "num_image_tokens"}),
        processor.tokenizer,
        num_image_tokens=change.get("num_image_tokens", TOKENS),
    )
    with pytest.raises(ValueError, match=f"do not belong together: {message}.*same checkpoint"):
        other.check_model(model)


def test_pain_01_a_tokenizer_with_more_words_than_the_model_is_refused(parts, tmp_path):
    model, processor = parts
    processor.save_pretrained(tmp_path)
    other = AutoProcessor.from_pretrained(tmp_path)
    other.tokenizer.add_tokens([f"word{n}" for n in range(model.config.vocab_size)])
    with pytest.raises(
        ValueError, match=rf"{len(other.tokenizer)} tokens here, {model.config.vocab_size} in the model"
    ):
        other.check_model(model)


def test_a_tokenizer_without_an_image_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no `image_token`.*extra_special_tokens"):
        ImagePromptProcessor(ImagePromptImageProcessor(), tokenizer, num_image_tokens=4)


@pytest.mark.parametrize("count", [None, 0, -1, 4.0])
def test_an_impossible_number_of_image_tokens_is_refused(count, processor):
    with pytest.raises(ValueError, match=re.escape(f"got {count}")):
        ImagePromptProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=count)


def test_the_saved_processor_states_the_count_once(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_image_tokens"] == TOKENS
