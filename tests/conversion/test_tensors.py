"""Foreign files: every tensor by its name, and nothing run."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

from imageprompt.conversion.tensors import read_tensors


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.layers = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
        self.register_buffer("resolution", torch.tensor(224))
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torchscript_archives_give_the_state_dict(tmp_path, dtype):
    module = Nested().to(dtype).eval()
    torch.jit.save(torch.jit.trace(module, torch.zeros(2, 8, dtype=dtype)), tmp_path / "archive.pt")
    tensors, expected = read_tensors(tmp_path / "archive.pt"), module.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_state_dicts_are_read(tmp_path):
    expected = Nested().state_dict()
    torch.save(expected, tmp_path / "state.pt")
    tensors = read_tensors(tmp_path / "state.pt")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert tensors.keys() == expected.keys()


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_an_archive_runs_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"tensor": Evil(str(tmp_path / "made"))}, 2))
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
    with pytest.raises(ValueError, match=r"archive\.pt"):
        read_tensors(tmp_path / "archive.pt")
    assert not (tmp_path / "made").exists()


def test_a_pickle_that_needs_code_is_refused(tmp_path):
    for name, content in {"module": nn.Linear(2, 2), "evil": {"tensor": Evil(str(tmp_path / "made"))}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=r"holds Python objects besides tensors \(.*would run code"):
            read_tensors(tmp_path / f"{name}.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is no checkpoint of PyTorch, or a damaged one"),
        (b"", "is no checkpoint of PyTorch, or a damaged one"),
        ([torch.zeros(2)], "holds no tensors by name"),
        ({"epoch": 3}, "holds no tensors by name"),
    ],
    ids=["text", "empty", "list", "number"],
)
def test_other_files_are_refused(tmp_path, content, message):
    file = tmp_path / "file.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        read_tensors(file)


def test_a_cut_file_is_refused(tmp_path):
    torch.save(Nested().state_dict(), tmp_path / "state.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"cut\.pt is no checkpoint of PyTorch, or a damaged one"):
        read_tensors(tmp_path / "cut.pt")
