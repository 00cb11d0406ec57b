"""The `imageprompt` command."""

import runpy
from pathlib import Path

import pytest
from conftest import make_photos, picture, tiny, tiny_gpt2
from typer.testing import CliRunner

from imageprompt import ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.cli import app, main
from imageprompt.generating import generate_texts


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for part in tiny(tokenizer):
        part.save_pretrained(folder / "model")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    return folder


def test_generate_prints_a_line_for_each_image(saved):
    result = CliRunner().invoke(
        app, ["generate", str(saved / "model"), str(saved), "--max-new-tokens", "3", "--batch-size", "2"]
    )
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    assert [name for name, _ in lines] == [str(saved / f"{seed}.png") for seed in range(3)]


def test_generate_follows_the_models_own_settings_unless_told_otherwise(saved, tmp_path):
    model = ImagePromptForConditionalGeneration.from_pretrained(saved / "model")
    processor = ImagePromptProcessor.from_pretrained(saved / "model")
    model.generation_config.update(max_new_tokens=7, num_beams=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = str(saved / "0.png")

    def answer(folder, *options):
        result = CliRunner().invoke(app, ["generate", str(folder), image, *options])
        assert result.exit_code == 0, result.exception
        return result.stdout.split(f"{image}\t")[1].strip()

    def expected(**settings):
        (text,) = generate_texts(model, processor, [image], **settings)
        return text

    lengths = {count: expected(max_new_tokens=count, num_beams=3) for count in (4, 7, 30)}
    assert len(set(lengths.values())) == 3
    assert answer(tmp_path) == lengths[7]
    assert answer(tmp_path, "--max-new-tokens", "4") == lengths[4]
    assert answer(tmp_path, "--num-beams", "1") == expected(num_beams=1, max_new_tokens=7)
    # Where the model has no length of its own, answers are not cut at the library's 20.
    assert (
        answer(saved / "model") == expected(num_beams=1, max_new_tokens=30) != expected(num_beams=1, max_new_tokens=20)
    )


def test_help_names_every_command():
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(command in output for command in ("quickstart", "train", "evaluate", "generate", "push", "doctor"))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["--vision", "--connector", "--suffix_column", "--learning_rate"]),
        ("evaluate", ["--model", "--suffix_column", "--num_beams"]),
    ],
)
def test_help_of_a_command_shows_its_options(capsys, command, options):
    with pytest.raises(SystemExit) as end:
        main_with(command, "--help")
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert all(option in output for option in options)


def test_a_mistake_ends_with_its_message(saved, capsys):
    with pytest.raises(SystemExit) as end:
        main_with("generate", str(saved / "model"), "nowhere.png")
    assert end.value.code == 2
    assert "There is no image nowhere.png" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main_with("generate", "/no/such/model", str(saved / "0.png"))
    assert end.value.code == 2
    assert "/no/such/model" in capsys.readouterr().err
    tiny_gpt2().save_pretrained(saved / "gpt2")
    with pytest.raises(SystemExit) as end:
        main_with("generate", str(saved / "gpt2"), str(saved / "0.png"))
    assert end.value.code == 2
    assert "'gpt2' checkpoint, not one of imageprompt" in capsys.readouterr().err


def test_a_mistake_met_by_a_process_that_loads_data_is_one_sentence_too(tokenizer, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 4)
    for file in photos.glob("*.png"):
        file.write_bytes(b"no image")
    for part in tiny(tokenizer):
        part.save_pretrained(tmp_path / "model")
    data = ["--dataset", str(photos / "captions.csv"), "--image_column", "file", "--suffix_column", "caption"]
    data += ["--dataloader_num_workers", "1", "--use_cpu", "--disable_tqdm", "true"]
    data += ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        main_with("train", "--model", str(tmp_path / "model"), *data, "--max_broken_rows", "1")
    assert end.value.code == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
    assert len(shown) == 1 and shown[0].startswith("Error: 2 broken rows of 4; the last: Row "), shown
    assert shown[0].endswith("Mend the data, or raise `--max_broken_rows` (now 1) to go on without them.")


@pytest.mark.parametrize("script", ["train", "pretrain", "generate", "evaluate", "push_to_hub"])
def test_scripts_run_from_a_checkout(script, capsys):
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"scripts/{script}.py", "--help"])
        runpy.run_path(str(Path(__file__).parents[1] / "scripts" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out.replace("--per_device_train_batch", "--batch")
    assert ("--license" if script == "push_to_hub" else "--batch") in shown


def main_with(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["imageprompt", *arguments])
        main()
