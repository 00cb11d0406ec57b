"""Captions of a folder: all of them, whatever stops the run or is broken, and none that another model wrote."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import count_tower_calls, lively, picture, tiny
from typer.testing import CliRunner

from imageprompt import captioning
from imageprompt.captioning import caption_images
from imageprompt.cli import app
from imageprompt.generating import find_images, generate_texts


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """(model, processor, their folder)."""
    torch.manual_seed(0)
    folder, parts = tmp_path_factory.mktemp("model"), lively(tokenizer)
    for part in parts:
        part.save_pretrained(folder)
    return *parts, str(folder)


@pytest.fixture
def photos(tmp_path):
    """Names of five images, two of them in a folder in the folder."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for seed in range(5):
        picture(seed).save(tmp_path / "photos" / ("more" if seed > 2 else ".") / f"{seed}.png")
    return find_images([str(tmp_path / "photos")], recursive=True)


def records(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def captions(file):
    return {record["image"]: record["caption"] for record in records(file) if "caption" in record}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_captions_are_those_of_generate(saved, photos, tmp_path, num_workers):
    model, processor, folder = saved
    done = caption_images(
        folder, photos, tmp_path / "new" / "c.jsonl", "A photo of", batch_size=2, num_workers=num_workers, num_beams=2
    )
    assert done == (5, 0)
    expected = generate_texts(model, processor, photos, "A photo of", num_beams=2, max_new_tokens=30)
    assert captions(tmp_path / "new" / "c.jsonl") == dict(zip(photos, expected, strict=True))
    assert len(set(expected)) > 1


def test_a_stopped_run_goes_on_and_a_finished_one_is_finished(saved, photos, tmp_path, monkeypatch):
    output = tmp_path / "c.jsonl"
    caption_images(saved[2], photos, output, batch_size=1)
    whole = output.read_text()
    output.write_text(whole[: whole.index("\n", whole.index("\n") + 1) + 30])  # two lines, and a part of the third
    loaded, calls = captioning.ImagePromptForConditionalGeneration.from_pretrained, []

    def counted(*args, **kwargs):
        model = loaded(*args, **kwargs)
        calls.append(count_tower_calls(model))
        return model

    monkeypatch.setattr(captioning.ImagePromptForConditionalGeneration, "from_pretrained", counted)
    assert caption_images(saved[2], photos, output, batch_size=2) == (5, 0)
    assert output.read_text() == whole and sum(calls[0]) == 3
    assert caption_images(saved[2], photos, output, batch_size=1) == (5, 0)
    assert output.read_text() == whole and sum(calls[1]) == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_has_its_error_and_another_chance(saved, photos, tmp_path, num_workers):
    good = (tmp_path / "photos" / "1.png").read_bytes()
    (tmp_path / "photos" / "1.png").write_bytes(good[:300])
    output = tmp_path / "c.jsonl"
    assert caption_images(saved[2], photos, output, batch_size=3, num_workers=num_workers) == (4, 1)
    (broken,) = [record for record in records(output) if "error" in record]
    assert broken["image"] == photos[1] and "1.png" in broken["error"]
    (tmp_path / "photos" / "1.png").write_bytes(good)
    assert caption_images(saved[2], photos, output, batch_size=3) == (5, 0)
    assert sorted(captions(output)) == sorted(photos) and len(records(output)) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_may_have_other_bytes_than_utf8(saved, photos, tmp_path):
    other = os.fsdecode(os.fsencode(tmp_path / "photos") + b"/caf\xe9.png")
    shutil.copy(photos[0], other)
    output = tmp_path / "c.jsonl"
    assert caption_images(saved[2], [other], output) == (1, 0)
    assert caption_images(saved[2], [other, photos[0]], output) == (2, 0)
    assert set(captions(output)) == {other, photos[0]}


def test_captions_of_another_model_or_prompt_are_refused(saved, photos, tmp_path, tokenizer):
    output = tmp_path / "c.jsonl"
    caption_images(saved[2], photos[:1], output)
    before = output.read_text()
    with pytest.raises(ValueError, match=r"c\.jsonl was written otherwise, with prompt '' instead of 'A dog'\. Name"):
        caption_images(saved[2], photos, output, "A dog")
    for part in tiny(tokenizer):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was written otherwise, with .*model\.weights_sha256"):
        caption_images(str(tmp_path / "other"), photos, output)
    assert output.read_text() == before
    for line in ("5", "{"):
        output.write_text(f"{before}{line}\n")
        with pytest.raises(ValueError, match=r"c\.jsonl has a line that is no JSON object"):
            caption_images(saved[2], photos, output)
    (tmp_path / "c.jsonl.about.json").unlink()
    with pytest.raises(ValueError, match=r"c\.jsonl is there already and no captions of imageprompt's"):
        caption_images(saved[2], photos, output)


def test_the_command_says_what_it_did(saved, photos, tmp_path):
    output = tmp_path / "c.jsonl"
    command = ["caption", saved[2], str(tmp_path / "photos"), "--output", str(output), "--workers", "0"]
    result = CliRunner().invoke(app, [*command, "--dtype", "bfloat16", "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.exception
    assert f"5 captions in {output}." in result.stdout and len(records(output)) == 5
    (tmp_path / "photos" / "0.png").write_bytes(b"no image")
    output.unlink()
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", "3"])
    assert result.exit_code == 1 and "1 images could not be read" in result.stdout
