"""The graphs of every connector, and language models that the decoder graph does not fit."""

import numpy as np
import pytest
import torch
from conftest import tiny
from transformers import MistralConfig

from imageprompt.exporting import exporter
from imageprompt.exporting.graphs import decoder_graph, image_graph, trace

for package in exporter.ONNX_PACKAGES:
    pytest.importorskip(package, reason="exporting to ONNX needs imageprompt[export]")

import onnxruntime  # noqa: E402

CONNECTORS = {
    "pixel_shuffle": {"num_image_tokens": None},
    "resampler": {"connector_args": {"depth": 1}},
    "clipcap_mlp": {},
    "clipcap_transformer": {"connector_args": {"depth": 1}},
    "pool": {},
}


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_every_connector_goes_into_the_vision_graph(connector, tokenizer, tmp_path):
    settings = {"model_args": {"depth": 1, "embed_dim": 48, "num_heads": 2}} | CONNECTORS[connector]
    model, _ = tiny(tokenizer, "NLC", connector=connector, **settings)
    model.requires_grad_(False)
    exporter._write(image_graph(model), tmp_path / "vision", ["onnx", "torch"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(tmp_path / "vision.onnx"), options)
    program = torch.export.load(tmp_path / "vision.pt2").module()
    for count in (1, 3):
        pixels = torch.randn(count, 3, 64, 64)
        expected = model.get_image_features(pixels).pooler_output
        for (tokens,) in (program(pixels), session.run(None, {"pixel_values": pixels.numpy()})):
            assert tokens.shape == (count, model.config.num_image_tokens, 32)
            assert np.abs(np.asarray(tokens) - expected.numpy()).max() <= 1e-5


def test_a_language_model_with_another_cache_is_refused(tokenizer):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0}
    model, _ = tiny(tokenizer, text_config=MistralConfig(sliding_window=16, **small))
    with pytest.raises(ValueError, match=r"'mistral' language model keeps other things .*SlidingWindow"):
        decoder_graph(model)


def test_what_torch_cannot_follow_is_refused(tokenizer):
    model, _ = tiny(tokenizer)
    graph = image_graph(model)
    graph.module.forward = lambda pixel_values: pixel_values[pixel_values.sum() > 0 and 0]
    with pytest.raises(ValueError, match=r"torch\.export cannot follow this model: "):
        trace(graph)
