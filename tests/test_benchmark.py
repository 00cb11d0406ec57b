"""The benchmark compares the same work: contestants run, have the same sizes, and answer alike where they should."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
BENCHMARK = runpy.run_path(str(SCRIPT))
QUICK, CONTESTANTS, WORKS = BENCHMARK["QUICK"], BENCHMARK["CONTESTANTS"], BENCHMARK["WORKS"]


def contestant(name, dtype="fp32"):
    return CONTESTANTS[name](QUICK, dtype, "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "method"), [pair for work in WORKS.values() for pair in work])
def test_every_contestant_does_its_work_again_and_again(name, method, dtype):
    model = contestant(name, dtype)
    work = getattr(model, method)()
    work()
    before = [parameter.clone() for parameter in model.model.parameters()]
    work()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True)]
    assert any(changed) == method.startswith("train")


def test_what_is_frozen_stays_and_features_are_those_of_the_images():
    for name in ("OursPooled", "EncoderDecoder"):
        frozen = contestant(name)
        step = frozen.train_frozen()
        tower = frozen.model.model.vision_tower if name == "OursPooled" else frozen.model.encoder
        before = [parameter.clone() for parameter in tower.parameters()]
        step()
        assert all(map(torch.equal, before, tower.parameters()))
    plain, cached = contestant("OursPooled"), contestant("OursPooled")
    cached._encode_once()
    assert "pixel_values" not in cached.labelled()
    losses = [found.model.eval()(**found.labelled()).loss.item() for found in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("name", ["Ours", "OursPooled", "Llava", "EncoderDecoder"])
def test_all_generate_as_many_tokens(name):
    model = contestant(name)
    ids = model.generate()()
    begun = model.inputs(model.text[:, :1]).get("input_ids", ids[:, :1])  # an encoder-decoder begins by itself
    assert ids.shape == (QUICK.batch, begun.shape[1] + QUICK.new_tokens)


def test_peers_have_the_same_towers_and_layers():
    """What differs is the connector, the head that LLaVA does not share, and cross-attention."""
    ours, llava, other = (contestant(name).model for name in ("Ours", "Llava", "EncoderDecoder"))

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    text = count(ours.model.language_model)
    assert count(llava.model.language_model) == text
    cross = sum(count(block.crossattention) + count(block.ln_cross_attn) for block in other.decoder.transformer.h)
    assert count(other.decoder) == text + cross
    vision = count(ours.model.vision_tower)
    # CLIP's ViT has a norm before its blocks and no bias of its patches; ViT's has a pooler.
    assert count(llava.model.vision_tower) == pytest.approx(vision, rel=0.01)
    assert count(other.encoder) == pytest.approx(vision, rel=0.1)


def test_the_loss_of_all_is_of_the_same_tokens():
    for name in ("Ours", "Llava"):
        labels = contestant(name).labelled()["labels"]
        assert (labels != -100).sum() == QUICK.batch * QUICK.text_tokens


def test_answers_behind_a_prefix_are_those_without():
    answers = [getattr(contestant("Ours"), method)()() for _, method in WORKS["questions about one image"]]
    assert all(found.equal(answers[0]) for found in answers)
    assert len(answers[0]) == QUICK.questions


def test_the_floor_does_the_matrix_products_of_a_decoding_step():
    """Counted by the operations that run: as many multiplications as GPT-2's own step has in its layers and head."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for name in ("Gemms", "Gpt2"):
        step = contestant(name).decode()
        with FlopCounterMode(display=False) as counter:
            step()
        operations = counter.get_flop_counts()["Global"]
        counts.append(sum(operations.get(getattr(torch.ops.aten, name), 0) for name in ("addmm", "mm")))
    assert counts[0] == counts[1] > 0


def test_the_command_writes_what_it_measured(tmp_path):
    output = tmp_path / "found" / "benchmark.json"
    options = ["--quick", "--works", "decode", "--dtypes", "fp32", "--repeats", "2", "--output", str(output)]
    options += ["--peak-tflops", "1"]
    printed = subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True, text=True).stdout
    found = json.loads(output.read_text())
    assert [run["contestant"] for run in found["runs"]] == [name for name, _ in WORKS["decode a token"]]
    assert all(run["seconds"]["lowest"] > 0 and run["peak_bytes"] > 1e8 for run in found["runs"])
    assert found["runs"][0]["times_the_first"] == 1
    ours, gpt2, gemms = found["runs"]
    assert ours["flops"] >= gpt2["flops"] > gemms["flops"] > 0
    assert gemms["model_flops_utilization"] == pytest.approx(gemms["flops"] / gemms["seconds"]["median"] / 1e12)
    assert output.with_suffix(".png").stat().st_size > 1000
    assert BENCHMARK["table"](found["runs"]) in printed
