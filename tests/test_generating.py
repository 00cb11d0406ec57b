"""Batched answers equal those one by one, without the prompt."""

import pytest
from conftest import picture, tiny

from imageprompt.generating import find_images, generate_texts, stream_texts


@pytest.fixture(scope="module")
def parts(tokenizer):
    return tiny(tokenizer)


def test_batches_answer_as_single_images_do(parts):
    images = [picture(seed) for seed in range(5)]
    prompts = ["A photo", "What is it? It", "A", "Two cats on a", "dog"]
    together = generate_texts(*parts, images, prompts, batch_size=2, max_new_tokens=6)
    alone = [
        generate_texts(*parts, [image], [text], max_new_tokens=6)[0]
        for image, text in zip(images, prompts, strict=True)
    ]
    assert together == alone


def test_answers_leave_out_the_prompt(parts):
    model, processor = parts
    inputs = processor(images=picture(), text="A photo of", return_tensors="pt")
    whole = processor.batch_decode(model.generate(**inputs, max_new_tokens=6), skip_special_tokens=True)[0]
    answer = generate_texts(model, processor, [picture()], "A photo of", max_new_tokens=6)[0]
    assert answer == whole.removeprefix("A photo of").strip()


def test_images_may_come_from_a_generator(parts):
    answers = generate_texts(*parts, (picture(seed) for seed in range(3)), "A", batch_size=2, max_new_tokens=3)
    assert answers == generate_texts(*parts, [picture(seed) for seed in range(3)], "A", max_new_tokens=3)


def test_prompts_must_match_images(parts):
    for texts_of in (generate_texts, lambda *args: list(stream_texts(*args))):
        with pytest.raises(ValueError, match="2 prompts for 1 images"):
            texts_of(*parts, [picture()], ["A", "B"])


def test_prompts_of_like_length_are_answered_together(parts, tmp_path):
    model, processor = parts
    files = [str(tmp_path / f"{seed}.png") for seed in range(4)]
    for seed, file in enumerate(files):
        picture(seed).save(file)
    prompts = ["Two cats on a red sofa.", "A", "What is it? It is the number", "It"]
    streamed = list(stream_texts(model, processor, files, prompts, batch_size=2, max_new_tokens=4))
    assert {number for number, _ in streamed[:2]} == {1, 3}
    expected = generate_texts(model, processor, files, prompts, max_new_tokens=4)
    assert [text for _, text in sorted(streamed)] == expected


def test_folders_are_listed_by_name_and_wrong_paths_named(tmp_path):
    for name in ("b.png", "a.jpg", "notes.txt"):
        picture().save(tmp_path / name) if name != "notes.txt" else (tmp_path / name).write_text("x")
    assert find_images([str(tmp_path)]) == [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]
    with pytest.raises(ValueError, match=r"no image nowhere\.png"):
        find_images(["nowhere.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        find_images([str(tmp_path / "empty")])
