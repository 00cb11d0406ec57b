"""The two graphs of an exported model: modules with tensors in and tensors out, and what these tensors are.

`ImageGraph` is the vision tower with the connector, `DecoderGraph` the language model with its cache and head. One
decoder serves the prompt and every step after it: the cache is an input that may be empty, and so are the images.
Each holds only the parts of the model that it runs, for its file to hold no other weights. What the model's
forward decides by looking at values is written anew here, as a graph cannot look.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from ..configuration import ImagePromptConfig
from ..fusion import attention_to_images
from ..modeling import ImagePromptForConditionalGeneration, positions_from_mask
from ..vision import flatten_features

# Dimensions that change from call to call: (fewest, how many while the graph is traced). The graphs are traced with
# sizes above 1, which torch would take for constants, and with a past.
DIMENSIONS = {"images": (0, 2), "rows": (1, 2), "positions": (1, 5), "past": (0, 3), "kept": (1, 4)}


@dataclass
class TensorSpec:
    """A tensor of a graph: its type, and its shape, with names for what changes from call to call."""

    dtype: str
    shape: list[int | str]


@dataclass
class Graph:
    """A module to export, and its inputs and outputs by name, in order."""

    module: nn.Module
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def describe(self) -> dict[str, Any]:
        """As JSON: {"inputs": {name: {"dtype": …, "shape": […]}}, "outputs": …}."""
        return {
            part: {name: {"dtype": spec.dtype, "shape": spec.shape} for name, spec in specs.items()}
            for part, specs in (("inputs", self.inputs), ("outputs", self.outputs))
        }


class ImageGraph(nn.Module):
    """Images to what the decoder reads of them.

    With prefix fusion: image tokens, (images, num_image_tokens, text width). With cross-attention: the keys and values
    of the image tokens in every layer, each (images, layers, heads, num_image_tokens, width of a head); they do not
    depend on the text, so they are made once.
    """

    def __init__(self, model: ImagePromptForConditionalGeneration):
        super().__init__()
        self.config = model.config
        self.vision_tower = model.model.vision_tower
        self.connector = model.model.connector
        if self.config.fusion == "cross_attention":
            blocks = model.model.language_model.h
            self.projections = nn.ModuleList(block.crossattention.c_attn for block in blocks)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """`pixel_values`: (images, channels, height, width)."""
        outputs = self.vision_tower(pixel_values, feature_layer=self.config.feature_layer, return_dict=True)
        layout, prefix = self.config.feature_layout, self.config.num_prefix_tokens
        image_tokens = self.connector(flatten_features(outputs.last_hidden_state, layout, prefix))
        if self.config.fusion == "prefix":
            return (image_tokens,)
        image_tokens = image_tokens.contiguous()  # GPT-2's projections take a view of them
        projected = [projection(image_tokens) for projection in self.projections]
        by_head = torch.stack(projected, dim=1).unflatten(-1, (2, self.config.num_attention_heads, -1))
        return by_head.permute(3, 0, 1, 4, 2, 5).unbind(0)


class DecoderGraph(nn.Module):
    """Ids, images and a cache to logits and the cache with the new positions."""

    def __init__(self, model: ImagePromptForConditionalGeneration):
        super().__init__()
        self.config = model.config
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.takes_positions = model.model._takes_positions

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor, *images_and_cache: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits and cache.

        Args:
            input_ids: (rows, positions).
            attention_mask: (rows, past + positions), 1 at tokens and 0 at padding.
            logits_to_keep: (kept,), indices of the positions whose logits are wanted.
            images_and_cache: for prefix fusion `image_embeds`, (images, num_image_tokens, text width), in the order of
                the placeholders in `input_ids`; none in a step. For cross-attention `image_keys` and `image_values`,
                (rows, images, layers, heads, num_image_tokens, width of a head), of at least one image, and
                `images_passed`, (rows, positions): how many placeholders each position has passed, itself included.
                Then for each layer keys and values, (rows, heads, past, width of a head).

        Returns:
            Logits, (rows, kept, vocabulary), and each layer's keys and values of past + positions.
        """
        num_images = 1 if self.config.fusion == "prefix" else 3
        images, cached = images_and_cache[:num_images], images_and_cache[num_images:]
        length, past = input_ids.shape[1], cached[0].shape[2]
        # Known to be so, the graph needs no case for a mask without a past.
        torch._check(attention_mask.shape[1] == past + length)
        cache = _cache(zip(cached[::2], cached[1::2], strict=True))
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if self.config.fusion == "prefix":
            arguments = {
                "inputs_embeds": self._put_images_in_text(input_ids, embeds, *images),
                "past_key_values": cache,
            }
        else:
            arguments = {"inputs_embeds": embeds, **self._put_images_beside_text(embeds, cache, *images)}
        if self.takes_positions:
            arguments["position_ids"] = positions_from_mask(attention_mask, length)
        outputs = self.language_model(attention_mask=attention_mask, use_cache=True, **arguments)
        logits = self.lm_head(outputs.last_hidden_state[:, logits_to_keep])
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))

    def _put_images_in_text(self, input_ids: Tensor, embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """As the model's `masked_scatter`, by an index; what stands in row 0 is never taken."""
        tokens = torch.cat([torch.zeros_like(embeds[0, :1]), image_embeds.flatten(0, 1)])
        placeholders = torch.eq(input_ids, self.config.image_token_id)
        index = placeholders.flatten().long().cumsum(0).reshape(input_ids.shape)
        # A placeholder that was generated, which the settings may allow, is a word.
        has_image = placeholders & (index < tokens.shape[0])
        return torch.where(has_image[..., None], tokens[index * has_image], embeds)

    def _put_images_beside_text(
        self, embeds: Tensor, cache: DynamicCache, image_keys: Tensor, image_values: Tensor, images_passed: Tensor
    ) -> dict[str, Any]:
        """What GPT-2's cross-attention takes; it finds the images' keys and values in the cache."""
        keys, values = (tensor.movedim(1, 3).flatten(3, 4) for tensor in (image_keys, image_values))
        images = _cache(zip(keys.unbind(1), values.unbind(1), strict=True))
        there = torch.ones_like(keys[:, 0, 0, :, 0], dtype=torch.bool)  # what a row lacks, it has not passed
        scores = attention_to_images(there, images_passed, self.config.num_image_tokens, embeds.dtype)
        return {
            "past_key_values": EncoderDecoderCache(cache, images),
            "encoder_hidden_states": embeds,  # not read
            "encoder_attention_mask": scores,
        }


def _cache(layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    return DynamicCache(list(layers))


def image_graph(model: ImagePromptForConditionalGeneration) -> Graph:
    """The vision tower with the connector, for images of the configuration's size."""
    config = model.config
    pixel_values = TensorSpec("float32", ["images", config.num_channels, *config.image_size])
    if config.fusion == "prefix":
        outputs = {"image_embeds": TensorSpec("float32", ["images", *_tokens_of_an_image(config)])}
    else:
        outputs = {
            name: TensorSpec("float32", ["images", *_keys_of_an_image(config)])
            for name in ("image_keys", "image_values")
        }
    return Graph(ImageGraph(model), {"pixel_values": pixel_values}, outputs)


def decoder_graph(model: ImagePromptForConditionalGeneration) -> Graph:
    """The language model.

    Raises:
        ValueError: if it keeps anything but the keys and values of all positions.
    """
    config = model.config
    inputs = {
        "input_ids": TensorSpec("int64", ["rows", "positions"]),
        "attention_mask": TensorSpec("int64", ["rows", "past + positions"]),
        "logits_to_keep": TensorSpec("int64", ["kept"]),
    }
    if config.fusion == "prefix":
        inputs["image_embeds"] = TensorSpec("float32", ["images", *_tokens_of_an_image(config)])
    else:
        for name in ("image_keys", "image_values"):
            inputs[name] = TensorSpec("float32", ["rows", "images", *_keys_of_an_image(config)])
        inputs["images_passed"] = TensorSpec("int64", ["rows", "positions"])
    outputs = {"logits": TensorSpec("float32", ["rows", "kept", config.vocab_size])}
    for number, layer in enumerate(_cache_layers(model)):
        for name, tensor in (("key", layer.keys), ("value", layer.values)):
            _, heads, _, width = tensor.shape
            inputs[f"past_key_values.{number}.{name}"] = TensorSpec("float32", ["rows", heads, "past", width])
            outputs[f"present.{number}.{name}"] = TensorSpec("float32", ["rows", heads, "past + positions", width])
    return Graph(DecoderGraph(model), inputs, outputs)


def _tokens_of_an_image(config: ImagePromptConfig) -> list[Any]:
    return [config.num_image_tokens, config.hidden_size]


def _keys_of_an_image(config: ImagePromptConfig) -> list[Any]:
    heads = config.num_attention_heads
    return [config.num_hidden_layers, heads, config.num_image_tokens, config.hidden_size // heads]


@torch.no_grad()
def _cache_layers(model: ImagePromptForConditionalGeneration) -> list[Any]:
    """The cache after two words."""
    embeds = model.get_input_embeddings()(torch.tensor([[0, 1]]))
    cache = model.model.language_model(inputs_embeds=embeds, use_cache=True).past_key_values
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = cache.layers if isinstance(cache, DynamicCache) else [cache]
    kinds = {type(layer).__name__ for layer in layers}
    if kinds != {DynamicLayer.__name__}:
        raise ValueError(
            f"A {model.config.text_config.model_type!r} language model keeps other things than the keys and values of "
            f"all positions ({', '.join(sorted(kinds))}), which the exported decoder does not: GPT-2 and others with a "
            "plain cache can be exported."
        )
    return layers


@torch.no_grad()
def trace(graph: Graph) -> torch.export.ExportedProgram:
    """The graph as `torch.export` records it, for any size of the dimensions that have names.

    Raises:
        ValueError: if torch cannot follow the module.
    """
    sizes = {name: size for name, (_, size) in DIMENSIONS.items()} | {"past + positions": 0}
    sizes["past + positions"] = sizes["past"] + sizes["positions"]
    dims = {name: torch.export.Dim(name, min=fewest) for name, (fewest, _) in DIMENSIONS.items()}
    # Past and positions are dimensions of their own, and the sum of two is nothing that torch lets one name.
    dims["past + positions"] = torch.export.Dim.DYNAMIC
    examples, dynamic = [], []
    for spec in graph.inputs.values():
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        examples.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype)))
        dynamic.append({axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)})
    shapes: tuple = tuple(dynamic)
    if isinstance(graph.module, DecoderGraph):
        shapes = (*dynamic[:3], tuple(dynamic[3:]))
    try:
        return torch.export.export(graph.module, tuple(examples), dynamic_shapes=shapes)
    except Exception as error:  # torch has no class for what it cannot follow
        raise ValueError(f"torch.export cannot follow this model: {type(error).__name__}: {error}") from error
