"""Folders that commands write are new and whole, or not there at all."""

import pytest

from imageprompt.folders import new_folder


def test_a_folder_is_there_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with new_folder(target) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "weights").write_text("w")
        assert not target.exists() and draft.parent == target.parent
    assert (target / "sub" / "weights").read_text() == "w"
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_an_empty_folder_is_filled_and_stays_itself(tmp_path):
    """It may be another disk, or the folder in which a shell stands."""
    before = tmp_path.stat().st_ino
    with new_folder(tmp_path) as draft:
        (draft / "weights").write_text("w")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"] and tmp_path.stat().st_ino == before


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(tmp_path, there, error):
    target = tmp_path / "model"
    if there:
        target.mkdir()
    with pytest.raises(error), new_folder(target) as draft:
        (draft / "half").write_text("h")
        raise error
    assert list(tmp_path.rglob("*")) == ([target] if there else [])


@pytest.mark.parametrize("used", ["model/tokenizer.json", "model/.hidden", "model"])
def test_what_is_there_is_not_overwritten(tmp_path, used):
    (tmp_path / used).parent.mkdir(exist_ok=True)
    (tmp_path / used).write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder: nothing is overwritten"), new_folder(tmp_path / "model"):
        pytest.fail("the work had begun")
    assert (tmp_path / used).read_text() == "mine"
