"""The feature cache: what it keeps, when it is refused, and that the loss does not notice."""

from pathlib import Path

import pytest
import torch
from conftest import count_tower_calls, max_difference, picture, tiny
from datasets import Dataset
from datasets import Image as DatasetImage

from imageprompt.data import ImagePromptCollator, Mixture, Rows, Source
from imageprompt.data import feature_cache as module
from imageprompt.data.augmenting import augmentation
from imageprompt.data.feature_cache import cache_features, without_features
from imageprompt.data.rows import BrokenRow
from imageprompt.data.sources import undecoded
from imageprompt.image_processing import ImageFeatures


@pytest.fixture
def parts(tokenizer):
    torch.manual_seed(0)
    model, processor = tiny(tokenizer)
    model.set_trainable(vision=False)
    return model.eval(), processor


def rows_of(pictures, **settings):
    columns = {"image": pictures, "suffix": [f"a {number}" for number in range(len(pictures))]}
    dataset = Dataset.from_dict(columns)
    if not isinstance(pictures[0], (str, list)):
        dataset = dataset.cast_column("image", DatasetImage())
    return Rows(undecoded(dataset), Source("the data", prompt="It is"), **settings)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Four images, of which the last is the first's copy."""
    (tmp_path / "images").mkdir()
    for number, seed in enumerate([0, 1, 2, 0]):
        picture(seed).save(tmp_path / "images" / f"{number}.png")
    return [str(tmp_path / "images" / f"{number}.png") for number in range(4)]


def loss_of(parts, rows) -> torch.Tensor:
    model, processor = parts
    return model(**ImagePromptCollator(processor)([rows[index] for index in range(len(rows))])).loss


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_the_loss_is_the_same_and_the_tower_rests(parts, files, tmp_path, dtype, tolerance):
    rows = rows_of(files)
    expected = loss_of(parts, rows)
    cache_features(tmp_path / "cache", *parts, rows, dtype=dtype, batch_size=3)
    calls = count_tower_calls(parts[0])
    assert max_difference(loss_of(parts, rows), expected) <= tolerance
    assert calls == []
    without_features(rows)
    assert max_difference(loss_of(parts, rows), expected) == 0 and calls == [4]


def test_images_of_another_size_than_the_features_are_refused(tokenizer, files, tmp_path):
    model, processor = tiny(tokenizer, dynamic_image_size=True)
    model.set_trainable(vision=False)
    processor.image_processor.size = {"height": 128, "width": 128}
    processor.check_model(model)
    with pytest.raises(ValueError, match=r"the configuration, \[3, 64, 64\], not of the processor's \[3, 128, 128\]"):
        cache_features(tmp_path / "cache", model, processor, rows_of(files))
    assert not (tmp_path / "cache" / "about.json").exists()


def test_an_image_is_encoded_once_for_all_rows_sources_and_runs(parts, files, tmp_path):
    calls = count_tower_calls(parts[0])
    mixture = Mixture({"some": rows_of(files[:2]), "lists": rows_of([files[1:3], files[3:]])})
    cache_features(tmp_path / "cache", *parts, mixture)
    assert sum(calls) == 3  # of seven places
    size = parts[0].config.feature_size * torch.Size(parts[0].config.feature_grid).numel() * 4
    assert (tmp_path / "cache" / "features.bin").stat().st_size == 3 * size
    assert [len(mixture.parts["lists"][row]["images"]) for row in range(2)] == [2, 1]
    again = rows_of(files)
    cache_features(tmp_path / "cache", *parts, again)
    assert sum(calls) == 3
    picture(9).save(files[1])  # another image under the same name
    expected = loss_of(parts, rows_of(files))
    changed, calls[:] = rows_of(files), []
    cache_features(tmp_path / "cache", *parts, changed)
    assert sum(calls) == 1 and max_difference(loss_of(parts, changed), expected) <= 1e-5


def test_a_run_that_was_stopped_goes_on(parts, files, tmp_path):
    expected, rows = loss_of(parts, rows_of(files)), rows_of(files)
    cache_features(tmp_path / "cache", *parts, rows)
    names, features = tmp_path / "cache" / "images.txt", tmp_path / "cache" / "features.bin"
    whole = features.read_bytes()
    size = len(whole) // 3
    for kept_names, kept_bytes, missing in ((65 + 30, 2 * size, 2), (3 * 65, size + 7, 2), (0, size, 3), (65, 0, 3)):
        names.write_bytes(names.read_bytes()[:kept_names])
        features.write_bytes(whole[:kept_bytes])
        calls = count_tower_calls(parts[0])
        rows = rows_of(files)
        cache_features(tmp_path / "cache", *parts, rows, batch_size=1)
        assert sum(calls) == missing
        assert max_difference(loss_of(parts, rows), expected) <= 1e-5


def test_what_features_depend_on_must_be_the_same(parts, files, tmp_path, tokenizer):
    cache_features(tmp_path / "cache", *parts, rows_of(files))
    other, _ = tiny(tokenizer)
    other.set_trainable(vision=False)
    with pytest.raises(
        ValueError,
        match=r"would compute, with weights_sha256 '\w{64}' instead of '\w{64}'\. Name",
    ):
        cache_features(tmp_path / "cache", other, parts[1], rows_of(files))
    with pytest.raises(ValueError, match=r"features \[.*'float32'\] instead of \[.*'bfloat16'\]"):
        cache_features(tmp_path / "cache", *parts, rows_of(files), dtype=torch.bfloat16)
    parts[1].image_processor.crop_pct = 0.5
    with pytest.raises(ValueError, match=r"with preprocessing\.crop_pct 0\.\d+ instead of 0\.5"):
        cache_features(tmp_path / "cache", *parts, rows_of(files))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"full holds something else \(thesis\.tex\): name a new folder"):
        cache_features(tmp_path / "full", *parts, rows_of(files))


def test_features_that_would_not_stay_true_are_refused(parts, files, tmp_path):
    model, processor = parts
    augmented = rows_of(files, augment=augmentation(model.config.image_size, {}))
    with pytest.raises(ValueError, match="leave out the augmentation of the data, or the feature cache"):
        cache_features(tmp_path / "cache", model, processor, augmented)
    with pytest.raises(ValueError, match="leave out `--streaming`"):
        cache_features(tmp_path / "cache", model, processor, iter([]))
    model.set_trainable(vision=True)
    with pytest.raises(ValueError, match="pass `--train_vision false`"):
        cache_features(tmp_path / "cache", model, processor, rows_of(files))
    assert not (tmp_path / "cache").exists()


def test_no_room_is_said_before_work_starts(parts, files, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        ValueError, match=r"Features of 3 images take .* \([\d,]+ bytes each\), but .* room for 0\.0 GB"
    ):
        cache_features(tmp_path / "cache", *parts, rows_of(files))


def test_a_broken_image_is_left_out_as_without_a_cache(parts, files, tmp_path):
    Path(files[1]).write_bytes(b"no image")
    rows = rows_of(files)
    cache_features(tmp_path / "cache", *parts, rows, num_workers=1)
    with pytest.raises(BrokenRow, match=r"Row 1 of the data .*: an image could not be read"):
        rows[1]
    assert len(rows.__getitems__([0, 1, 2])) == 2 and len(rows.broken) == 1


def test_images_and_features_do_not_mix(parts):
    features = torch.zeros(1, 4, 8).as_subclass(ImageFeatures)
    with pytest.raises(ValueError, match="not both in one batch"):
        parts[1](images=[features, picture()], text=["a", "b"])
