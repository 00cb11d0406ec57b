"""The benchmark compares the same work: contestants run, have the same sizes, and answer alike where they should."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from benchmark import WORKS, begin, write
from benchmark import table as table_of_works
from contestants import CONTESTANTS, QUICK
from scaling import CURVES, line, throughput
from scaling import table as table_of_curves
from torch.optim.optimizer import register_optimizer_step_pre_hook

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    """The graphs are captured and differentiated as ever; making machine code of them would take a minute each."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()  # other tests in this process compile the same forward pass


def contestant(name, dtype="fp32", sizes=QUICK):
    return CONTESTANTS[name](sizes, dtype, "cpu")


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


@pytest.mark.parametrize("name", ["Ours", "Gpt2"])
def test_every_step_behind_a_cache_is_the_same(name):
    seen = []
    for method in ("decode", "decode_static") if name == "Ours" else ("decode",):
        found = contestant(name)
        step = getattr(found, method)()
        found.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        step()
        step()
    assert len(seen) >= 2
    for logits in seen[1:]:
        torch.testing.assert_close(logits, seen[0], atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize("other", ["train_all_logits", "train_gelu_in_eight"])
def test_what_saves_memory_gives_the_same_gradients(other):
    gradients = []
    for method in ("train", other):
        model = contestant("Ours")
        kept = []
        step = getattr(model, method)()
        model.model.eval()  # no dropout
        handle = register_optimizer_step_pre_hook(
            lambda *_, model=model, kept=kept: kept.extend(p.grad.clone() for p in model.model.parameters())
        )
        step()
        handle.remove()
        gradients.append(kept)
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["generate_static", "generate_compiled"])
def test_a_static_cache_and_compiled_steps_give_the_same_captions(method):
    expected = contestant("OursPooled").generate()()
    assert getattr(contestant("OursPooled"), method)()().equal(expected)


def test_a_compiled_training_step_changes_the_same_weights():
    plain, compiled = contestant("OursPooled"), contestant("OursPooled")
    steps = plain.train(), compiled.train_compiled()
    for model, step in zip((plain, compiled), steps, strict=True):
        model.model.eval()
        step()
    for one, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=0)


def test_packed_rows_have_the_loss_of_padded_ones():
    losses = []
    for method in ("train_padded", "train_packed"):
        model = contestant("OursPooled")
        steps = []
        model._training_on = steps.append
        getattr(model, method)()
        losses.append(model.model.eval()(**steps[0]).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_batch_from_photos_is_as_large_and_every_file_is_captioned():
    model = contestant("OursPooled")
    assert model.load_photos()()["pixel_values"].shape == model.pixels.shape
    captions = model.caption_files()()
    assert sorted(index for index, _ in captions) == list(range(QUICK.files))
    assert all(isinstance(text, str) for _, text in captions)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
def test_a_curve_changes_what_its_contestants_do(curve):
    """Twice as much is more work, by the operations that are counted."""
    from torch.utils.flop_counter import FlopCounterMode

    for name, method in curve.series:
        counts = []
        for value in (1, 4):
            work = getattr(contestant(name, sizes=replace(QUICK, **{curve.size: value})), method)()
            with FlopCounterMode(display=False) as counter:
                work()
            counts.append(counter.get_total_flops())
        assert counts[0] < counts[1]


def test_a_line_through_points_on_a_line():
    assert line((1, 2, 4), [5.0, 7.0, 11.0]) == pytest.approx({"fixed": 3, "each": 2, "unexplained": 0}, abs=1e-9)


def command(script, tmp_path, *options):
    """What a script printed, and what it wrote."""
    output = tmp_path / "found" / "result.json"
    arguments = [sys.executable, SCRIPTS / script, "--quick", *options, "--output", output]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert output.with_suffix(".png").stat().st_size > 1000
    return printed, json.loads(output.read_text())


def test_the_benchmark_writes_what_it_measured(tmp_path):
    options = ["--works", "decode", "--dtypes", "fp32", "--repeats", "2", "--peak-tflops", "1"]
    printed, found = command("benchmark.py", tmp_path, *options)
    decoding = [(run["contestant"], run["method"]) for run in found["runs"]]
    assert decoding == WORKS["decode a token"]
    assert all(run["seconds"]["lowest"] > 0 and run["peak_bytes"] > 1e8 for run in found["runs"])
    assert found["runs"][0]["times_the_first"] == 1
    ours, gpt2, gemms, pooled, _ = found["runs"]
    assert ours["flops"] >= gpt2["flops"] > gemms["flops"] > 0 and ours["flops"] > pooled["flops"]
    assert gemms["model_flops_utilization"] == pytest.approx(gemms["flops"] / gemms["seconds"]["median"] / 1e12)
    assert {"aten::addmm", "aten::mm"} & gemms["share_by_operation"].keys()
    assert all(0 < sum(run["share_by_operation"].values()) <= 1.001 for run in found["runs"])
    assert table_of_works(found["runs"]) in printed


def test_a_file_is_gone_on_with_in_the_same_circumstances_only(tmp_path):
    file = tmp_path / "result.json"
    assert begin({"device": "CPU"}, None) == begin({"device": "CPU"}, file) == {"device": "CPU"}
    write({"device": "CPU", "runs": [1]}, file)
    assert begin({"device": "CPU"}, file)["runs"] == [1]
    with pytest.raises(typer.BadParameter, match="was measured with device 'CPU' instead of 'GPU': name another file"):
        begin({"device": "GPU"}, file)


def test_the_scaling_command_writes_what_it_measured(tmp_path):
    printed, found = command("scaling.py", tmp_path, "--curves", "captioned at once", "--repeats", "1")
    assert [curve["contestant"] for curve in found["curves"]] == ["OursPooled", "Llava", "EncoderDecoder"]
    for curve in found["curves"]:
        assert [point["seconds"]["median"] > 0 for point in curve["points"]] == [True] * len(curve["values"])
        assert curve["flops"]["each"] > 0
        assert curve["flops"]["unexplained"] < 0.01
    assert table_of_curves(found["curves"]) in printed
    assert throughput(found["curves"]) in printed
