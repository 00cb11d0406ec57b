"""The benchmark compares the same work: contestants run, have the same sizes, and answer alike where they should."""

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from benchmark import WORKS, Job, _forget_peak, _peak, begin, choose, code_digest, compare, times_of, write
from benchmark import table as table_of_works
from contestants import CONTESTANTS, QUICK
from scaling import CURVES, line, throughput
from scaling import table as table_of_curves
from torch.optim.optimizer import register_optimizer_step_pre_hook

from imageprompt.cpu import multiplies_bf16

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
    if method.endswith("_prepacked") and dtype == "bf16" and not multiplies_bf16():
        pytest.skip("a CPU without instructions for bfloat16")
    model = contestant(name, dtype)
    work = getattr(model, method)()
    work()
    before = [parameter.clone() for parameter in model.model.parameters()]
    work()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True)]
    assert any(changed) == (method.startswith("train") and "Gemms" not in name)


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
    assert len(answers) == 8
    assert all(found.equal(answers[0]) for found in answers)
    assert len(answers[0]) == QUICK.questions


@pytest.mark.parametrize("name", ["Ours", "Gpt2"])
def test_every_step_behind_a_cache_is_the_same(name):
    seen = []
    for method in (
        ("decode", "decode_prepacked", "decode_static", "decode_static_prepacked") if name == "Ours" else ("decode",)
    ):
        found = contestant(name)
        step = getattr(found, method)()
        found.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        step()
        step()
    assert len(seen) >= 2
    for logits in seen[1:]:
        torch.testing.assert_close(logits, seen[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("method", "peer"), [("decode", "Gpt2"), ("train", "Ours"), ("train", "OursPooled")])
def test_the_floor_does_the_matrix_products_of_the_work(method, peer):
    """Counted by the operations that run: as many multiplications as in the peer's own."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for name in ("GemmsPooled" if peer == "OursPooled" else "Gemms", peer):
        work = getattr(contestant(name), method)()
        with FlopCounterMode(display=False) as counter:
            work()
        operations = counter.get_flop_counts()["Global"]
        counts.append(sum(operations.get(getattr(torch.ops.aten, name), 0) for name in ("addmm", "mm", "bmm")))
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="weights are prepacked on CPUs")
def test_products_with_prepacked_weights_are_counted_as_others_are():
    plain, packed = compare("decode", [Job("Ours", m, QUICK) for m in ("decode", "decode_prepacked")], "fp32", 1, 0)
    assert plain["flops"] == packed["flops"] > 0


@pytest.mark.parametrize("other", ["train_all_logits", "train_gelu_in_eight", "train_compiled"])
def test_what_saves_time_or_memory_gives_the_same_gradients(other):
    gradients = []
    for method in ("train", other):
        model = contestant("OursPooled")
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


def test_packed_rows_have_the_loss_of_padded_ones():
    losses, sizes = [], []
    for method in ("train_padded", "train_packed"):
        model = contestant("OursLongText")
        steps = []
        model._training_on = steps.append
        getattr(model, method)()
        losses.append(model.model.eval()(**steps[0]).loss.item())
        sizes.append(steps[0]["input_ids"].numel())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert sizes[0] > sizes[1]


def test_a_batch_from_photos_is_as_large_and_every_file_is_captioned():
    model = contestant("OursPooled")
    assert model.load_photos()()["pixel_values"].shape == model.pixels.shape
    features = model.load_features()()["image_features"]
    assert features.shape == model.model.get_image_features(model.pixels).last_hidden_state.shape
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
    options = ["--works", "the floor", "--dtypes", "fp32", "--repeats", "2", "--peak-tflops", "1"]
    printed, found = command("benchmark.py", tmp_path, *options)
    assert [(run["contestant"], run["method"]) for run in found["runs"]] == WORKS["train, and the floor"]
    ours, gemms = found["runs"]
    for run in (ours, gemms):
        assert run["code"] == code_digest()
        assert run["seconds"]["lowest"] == min(run["seconds"]["all"]) > 0 and len(run["seconds"]["all"]) == 2
        assert run["peak_bytes"] > 1e8 and 0 < sum(run["share_by_operation"].values()) <= 1.001
    ratio = times_of(gemms["seconds"]["all"], ours["seconds"]["all"])
    assert ours["times_the_first"] == 1 and gemms["times_the_first"] == pytest.approx(ratio)
    assert ours["flops"] > gemms["flops"] > 0
    assert gemms["model_flops_utilization"] == pytest.approx(gemms["flops"] / gemms["seconds"]["median"] / 1e12)
    assert {"aten::addmm", "aten::mm"} & gemms["share_by_operation"].keys()
    assert table_of_works(found["runs"]) in printed


def test_a_file_is_gone_on_with_in_the_same_circumstances_only(tmp_path):
    file, here = tmp_path / "result.json", {"device": "CPU"}
    assert begin(here, "runs", None) == begin(here, "runs", file) == {"device": "CPU", "runs": []}
    write({"device": "CPU", "runs": [1]}, file)
    assert begin(here, "runs", file)["runs"] == [1]
    for wanted, name, message in (({"device": "GPU"}, "runs", "device 'CPU' instead of 'GPU'"), (here, "curves", "no")):
        with pytest.raises(typer.BadParameter, match=f"was measured with {message}.*: name another file"):
            begin(wanted, name, file)


def test_a_contestant_may_start_processes_and_none_outlives_a_failure():
    (found,) = compare("photos", [Job("OursPooled", "caption_files", QUICK)], "fp32", 1, 0)
    assert found["flops"] > 0
    with pytest.raises(RuntimeError, match="Loop: train has ended"):
        compare("training", [Job("Ours", "train", QUICK), Job("Loop", "train", QUICK)], "fp32", 1, 0)
    assert not [process for process in multiprocessing.active_children() if process.join(30) or process.is_alive()]


def test_a_name_that_there_is_not_is_refused():
    assert choose(WORKS, "") == list(WORKS) and choose(["a b", "b c", "d"], "b,d") == ["a b", "b c", "d"]
    with pytest.raises(typer.BadParameter, match="'decoed' is in no name; there are: train, all image tokens; "):
        choose(WORKS, "decode,decoed")


def test_a_contestant_that_cannot_be_built_is_named():
    with pytest.raises(RuntimeError, match="Ours: train has ended: see its error above"):
        compare("training", [Job("Ours", "train", replace(QUICK, backbone="no_such"))], "fp32", 1, 0)


def test_ratios_are_those_of_the_same_turn():
    """The machine is twice as slow in the second turn, and ten times in the third."""
    assert times_of([3, 6, 30], [2, 4, 20]) == times_of([3, 6, 31], [2, 4, 20]) == 1.5


def test_a_peak_is_of_what_was_done_since_it_was_forgotten():
    kept = torch.ones(50_000_000)
    before = _peak("cpu")
    del kept
    _forget_peak("cpu")
    after = _peak("cpu")
    assert before - after > 150e6
    kept = torch.ones(50_000_000)
    assert _peak("cpu") - after > 150e6
    del kept


def test_the_scaling_command_writes_what_it_measured(tmp_path):
    printed, found = command("scaling.py", tmp_path, "--curves", "learnt at once", "--repeats", "1")
    (curve,) = found["curves"]
    assert (curve["contestant"], curve["method"], curve["values"]) == ("OursPooled", "train", [1, 4, 16])
    assert [point["seconds"]["median"] > 0 for point in curve["points"]] == [True] * 3
    assert curve["flops"]["each"] > 0 and curve["flops"]["unexplained"] < 0.01
    assert table_of_curves(found["curves"]) in printed


def test_captions_a_second_are_images_by_time():
    points = [{"seconds": {"median": seconds}} for seconds in (0.5, 1.0)]
    curve = {"name": "images that are captioned at once", "values": [1, 4], "points": points}
    curve |= {"contestant": "Ours", "method": "generate"}
    peer = curve | {"contestant": "Llava", "points": [{"seconds": {"median": seconds}} for seconds in (1.0, 2.0)]}
    *_, ours, theirs = throughput([curve, peer]).splitlines()
    assert ours == "| Ours: generate | 2.00 | 4.00 | 4.00 | 2.00 |"
    assert theirs == "| Llava: generate | 1.00 | 2.00 | 2.00 | 1.00 |"
    assert throughput([curve | {"name": "new tokens"}]) == ""
