"""Checkpoints on a full disk, after a killed process, and resumed from: whole or not there."""

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import max_difference, tiny
from safetensors import SafetensorError
from trainers import eight_rows, trainer_of
from transformers import AutoModelForImageTextToText, TrainerCallback

from imageprompt import ImagePromptForConditionalGeneration
from imageprompt.data.augmenting import augmentation
from imageprompt.data.rows import read_rows
from imageprompt.data.sources import Source
from imageprompt.training.checkpoints import find_checkpoint, list_checkpoints, refuse_earlier_run, what_lacks

SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A run with two whole checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    trainer_of(tokenizer, folder, **SAVES).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_the_newest_whole_checkpoint_is_found_by_its_step(run):
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    (run / "checkpoint-1").rename(run / "checkpoint-10")
    (run / "checkpoint-best").mkdir()
    assert find_checkpoint(run, True) == find_checkpoint(run, "true") == run / "checkpoint-10"
    assert find_checkpoint(run, str(run / "checkpoint-2")) == run / "checkpoint-2"


def cut(file: Path) -> None:
    """As a killed process leaves a file: its beginning."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("trainer_state.json", "model.safetensors", "optimizer.pt")
        for damage in (cut, os.remove)
    ]
    + [("scheduler.pt", os.remove), ("rng_state.pth", cut), ("training_args.bin", None)],
)
def test_a_half_written_checkpoint_is_never_resumed_from(run, name, damage, caplog):
    half = run / "checkpoint-2"
    if damage is None:  # nothing is lost with it
        (half / name).unlink()
        assert find_checkpoint(run, True) == half
        return
    damage(half / name)
    assert find_checkpoint(run, True) == run / "checkpoint-1"
    assert "checkpoint-2 is half-written" in caplog.text and name in caplog.text
    with pytest.raises(ValueError, match=rf"cannot be resumed from: {name} is (missing|cut short)"):
        find_checkpoint(run, str(half))


def test_shards_that_are_missing_are_named(run):
    half = run / "checkpoint-2"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    (half / "model.safetensors").rename(half / "model-00001-of-00002.safetensors")
    assert what_lacks(half) == "model-00002-of-00002.safetensors is missing"
    shutil.copy(half / "model-00001-of-00002.safetensors", half / "model-00002-of-00002.safetensors")
    assert what_lacks(half) is None


def test_nothing_to_resume_from_is_said_clearly(run, tokenizer):
    cut(run / "checkpoint-1" / "model.safetensors")
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-2").mkdir()
    message = (
        "No whole checkpoint in .* to resume from: checkpoint-2 is half-written [(]trainer_state.json is missing[)]; "
        "checkpoint-1 is half-written [(]model.safetensors is cut short[)]. Leave out --resume_from_checkpoint"
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(tokenizer, run).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="to resume from: there is none"):
        trainer_of(tokenizer, run / "other").train(resume_from_checkpoint=True)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tokenizer, tmp_path):
    settings = {**SAVES, "max_steps": 5, "vision_learning_rate": 1e-2, "learning_rate": 1e-3}
    settings |= {"train_sampling_strategy": "group_by_length"}
    rows = WithLengths(eight_rows())
    unbroken = trainer_of(tokenizer, tmp_path / "unbroken", rows, **settings)
    torch.manual_seed(0)
    start = {name: value.clone() for name, value in unbroken.model.state_dict().items()}
    unbroken.train()
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "broken" / f"checkpoint-{step}")
    resumed = trainer_of(tokenizer, tmp_path / "broken", rows, **settings)
    resumed.model.load_state_dict(start)
    resumed.train(resume_from_checkpoint=True)
    for name, value in unbroken.model.state_dict().items():
        assert max_difference(value, resumed.model.state_dict()[name]) <= 1e-6, name
    assert [entry.get("loss") for entry in resumed.state.log_history][:5] == pytest.approx(
        [entry.get("loss") for entry in unbroken.state.log_history][:5], rel=1e-5
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_draws_what_an_unbroken_one_does(tokenizer, folders, tmp_path, workers):
    augment = augmentation((32, 32), {"scale": [0.3, 1]})
    rows = read_rows(Source(str(folders[0]), suffix_column="captions"), "train", augment=augment)
    model, processor = tiny(tokenizer)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    # Three steps an epoch; the run breaks off within the second.
    settings = {**SAVES, "max_steps": 7, "per_device_train_batch_size": 3, "dataloader_num_workers": workers}
    trainer_of(tokenizer, tmp_path, rows, (model, processor), **settings).train()
    unbroken = {name: value.clone() for name, value in model.state_dict().items()}
    for step in (5, 6, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    model.load_state_dict(start)
    resumed = trainer_of(tokenizer, tmp_path, rows, (model, processor), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    for name, value in unbroken.items():
        assert torch.equal(value, model.state_dict()[name]), name


class WithLengths(list):
    def lengths(self):
        return [len(row["suffix"]) for row in self]


# --- writing


def full(*arguments, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_safetensors(*arguments, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_for_torch(*arguments, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("transformers.modeling_utils.safe_save_file", full_for_safetensors),
        ("torch.save", full_for_torch),
        ("transformers.trainer_callback.TrainerState.save_to_json", full),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_removed_and_the_one_before_stays(
    tokenizer, tmp_path, monkeypatch, target, error
):
    class DiskFillsUp(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                monkeypatch.setattr(target, error)

    trainer = trainer_of(tokenizer, tmp_path, callbacks=[DiskFillsUp()], save_total_limit=1, **SAVES)
    message = (
        r"checkpoint-2 could not be written to .* \([\d.,]+ MiB were free there\): .*removed; "
        "checkpoint-1 is whole: make room and go on with --resume_from_checkpoint true"
    )
    with pytest.raises(OSError, match=re.compile(message, re.DOTALL)):
        trainer.train()
    monkeypatch.undo()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    resumed = trainer_of(tokenizer, tmp_path, **SAVES)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2 and what_lacks(tmp_path / "checkpoint-2") is None


def test_a_checkpoint_that_was_there_before_stays_when_the_new_one_cannot_be_written(run, tokenizer, monkeypatch):
    def kept():
        files = sorted((run / "checkpoint-2").iterdir())
        return [(file.name, file.stat().st_mtime_ns) for file in files]

    before = kept()
    trainer = trainer_of(tokenizer, run, **SAVES)
    monkeypatch.setattr("transformers.trainer_callback.TrainerState.save_to_json", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .* checkpoint-2 is whole"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    monkeypatch.undo()
    assert kept() == before and what_lacks(run / "checkpoint-2") is None
    trainer_of(tokenizer, run, **SAVES).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert kept() != before and what_lacks(run / "checkpoint-2") is None
    assert [folder.name for folder in sorted(run.glob("*checkpoint*"))] == ["checkpoint-1", "checkpoint-2"]


def test_an_earlier_run_is_refused_unless_nothing_of_it_is_whole(run):
    message = "checkpoint-2 is of an earlier run: .*--resume_from_checkpoint true, name another --output_dir, or delete"
    with pytest.raises(ValueError, match=message):
        refuse_earlier_run(run, None)
    refuse_earlier_run(run, "true")
    cut(run / "checkpoint-2" / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint-1 is of an earlier run"):
        refuse_earlier_run(run, None)
    shutil.rmtree(run / "checkpoint-1")
    refuse_earlier_run(run, None)
    refuse_earlier_run(run / "other", None)


def test_a_saved_model_takes_the_place_of_the_one_before_and_of_nothing_else(tokenizer, tmp_path):
    stale = ("model.safetensors.index.json", "model-00001-of-00002.safetensors")
    own = ("model.fp16.safetensors", "model_ema.safetensors", "model.safetensors.txt")
    for name in (*stale, *own):
        (tmp_path / name).write_text("before")
    trainer_of(tokenizer, tmp_path).save_model()
    assert [name for name in stale if (tmp_path / name).exists()] == []
    assert [(tmp_path / name).read_text() for name in own] == ["before"] * 3
    ImagePromptForConditionalGeneration.from_pretrained(tmp_path)


def test_other_errors_while_saving_stay_what_they_are(tokenizer, tmp_path, monkeypatch):
    def stop(*arguments, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tokenizer, tmp_path, **SAVES).train()
    assert list_checkpoints(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path, saved):
    """A file system with room for one checkpoint and a half."""
    size = sum(file.stat().st_size for file in (saved / "checkpoint-1").rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(tokenizer, small_disk):
    trainer = trainer_of(tokenizer, small_disk / "run", max_steps=3, **SAVES)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .* checkpoint-1 is whole"):
        trainer.train()
    assert [folder.name for folder in list_checkpoints(small_disk / "run")] == ["checkpoint-1"]
    AutoModelForImageTextToText.from_pretrained(small_disk / "run" / "checkpoint-1")
    # Room is made: one checkpoint at a time fits when only the weights are kept.
    resumed = trainer_of(tokenizer, small_disk / "run", max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    with pytest.raises(OSError, match=r"The model could not be written to .* checkpoint-1 is whole"):
        (small_disk / "filling").write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 4096))
        resumed.save_model()
    assert not (small_disk / "run" / "model.safetensors").exists()
    (small_disk / "filling").unlink()
    resumed.save_model()
    AutoModelForImageTextToText.from_pretrained(small_disk / "run")
