"""CLIP's image encoder: OpenAI's and transformers' files onto timm's towers, and the encoder as CLIP's code defines it.

A timm tower ends where CLIP's projection begins; timm keeps that projection as the classifier. `encode` runs OpenAI's
tensors as they lie in the file, without timm: the reference to which a tower is compared; tensors of transformers are
given OpenAI's names first, and compared with transformers' own class. Source: arXiv 2103.00020 and
github.com/openai/CLIP (`clip/model.py`, `clip/clip.py`).
"""

import os
import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import byobnet, vision_transformer
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPVisionModelWithProjection

from ..comparing import verify
from ..composing import loading, refuse_foreign_training
from ..vision import Backbone
from .backbones import load_pretrained
from .tensors import first_mismatch, read_tensors

# CLIP crops nothing off but what makes the picture square; timm's own settings for these weights cut a tenth more.
PREPROCESSING = {
    "mean": OPENAI_CLIP_MEAN,
    "std": OPENAI_CLIP_STD,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
HEAD_WIDTH = 64  # channels of an attention head, in all of CLIP's towers

# transformers' names of weights, and OpenAI's.
_RENAMES = [
    (r"^visual_projection\.weight$", "proj"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]


def read_visual(source: str | os.PathLike, revision: str | None = None) -> dict[str, Tensor]:
    """CLIP's image encoder in fp32, under the names of OpenAI's file ("visual.conv1.weight").

    Args:
        source: OpenAI's `.pt` file; or a folder or Hub id of transformers with a CLIP (`CLIPModel`,
            `CLIPVisionModelWithProjection`), the folder of "openai/clip-vit-base-patch32".
        revision: of a Hub id.

    Raises:
        ValueError: if there is none, or it cannot be read; see `read_tensors`.
    """
    is_file = Path(source).is_file() or Path(source).suffix in (".pt", ".pth")
    return _read_openai(source) if is_file else _read_transformers(source, revision)


def _read_transformers(source: str | os.PathLike, revision: str | None) -> dict[str, Tensor]:
    encoder = load_pretrained(CLIPVisionModelWithProjection, source, revision=revision)
    visual = {}
    for name, tensor in encoder.state_dict().items():
        name = name.removeprefix("vision_model.")
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        visual[f"visual.{name}"] = tensor
    visual["visual.proj"] = visual["visual.proj"].t()
    for block in range(encoder.config.num_hidden_layers):
        place = f"visual.transformer.resblocks.{block}.attn"
        for kind in ("weight", "bias"):
            parts = [visual.pop(f"{place}.{part}_proj.{kind}") for part in "qkv"]
            visual[f"{place}.in_proj_{kind}"] = torch.cat(parts)
    size = encoder.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def embeddings(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        expected = encoder.to(dtype)(pixel_values=pixels.to(dtype)).image_embeds
        return [(encode(cast(visual, dtype), pixels.to(dtype)), expected)]

    what = f"The embeddings of transformers' CLIP in {os.fspath(source)!r} and of CLIP as OpenAI defines it"
    verify(embeddings, what, "ClipCap was trained on OpenAI's: quick_gelu, and heads of 64 channels.")
    return visual


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in a precision; integers stay what they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _read_openai(path: str | os.PathLike) -> dict[str, Tensor]:
    visual = {name: tensor for name, tensor in read_tensors(path).items() if name.startswith("visual.")}
    if "visual.proj" not in visual and "visual.attnpool.c_proj.weight" not in visual:
        raise ValueError(
            f"{path} is no CLIP file in OpenAI's layout: it has neither `visual.proj` nor `visual.attnpool.c_proj`."
        )
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in visual.items()}


def clip_tower(backbone: Backbone, visual: dict[str, Tensor] | None) -> torch.nn.Module:
    """The timm model with CLIP's projection as its classifier, in eval mode.

    Args:
        backbone: see `imageprompt.vision.resolve_backbone`.
        visual: CLIP's tensors, see `read_visual`; without them, timm's own weights for the backbone are loaded.

    Raises:
        ValueError: if the tensors are another tower's, or were trained with another activation.
    """
    refuse_foreign_training({}, backbone)
    if visual is None:
        with loading(backbone.weights):
            return timm.create_model(backbone.weights, pretrained=True, **backbone.model_args).eval()
    is_vit = "visual.proj" in visual
    size = visual["visual.proj"].shape[1] if is_vit else visual["visual.attnpool.c_proj.weight"].shape[0]
    with torch.device("meta"):  # every weight comes from the file
        model = timm.create_model(backbone.architecture, num_classes=size, **backbone.model_args).eval()
    filters = {
        vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
        byobnet.ByobNet: byobnet.checkpoint_filter_fn,
    }
    try:
        if isinstance(model, byobnet.ByobNet if is_vit else vision_transformer.VisionTransformer):
            raise RuntimeError(f"it holds a {'vision transformer' if is_vit else 'ResNet'}")
        if is_vit:
            _check_vit(backbone, model, visual)
        model.load_state_dict(filters[type(model)](visual, model), assign=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"The CLIP file does not fit {backbone.architecture}: {first_mismatch(error)}. Pass the tower that it is "
            "of (`vision`, --vision)."
        ) from error
    return model


def _check_vit(backbone: Backbone, model: torch.nn.Module, visual: dict[str, Tensor]) -> None:
    """Refuse what timm would load all the same: other activations, and patches and grids, which it would resample."""
    if "quickgelu" not in backbone.architecture and "act_layer" not in backbone.model_args:
        raise RuntimeError(
            "OpenAI trained it with QuickGELU, which this tower does not use (see `timm.list_models('*quickgelu*')`)"
        )
    theirs = (visual["visual.conv1.weight"].shape, visual["visual.positional_embedding"].shape)
    ours = (model.patch_embed.proj.weight.shape, model.pos_embed.shape[1:])
    if theirs != ours:
        raise RuntimeError(f"its patches and positions are {[*map(tuple, theirs)]}, the tower's {[*map(tuple, ours)]}")


def openai_transform(size: int) -> Compose:
    """OpenAI's preprocessing: a PIL image to (3, size, size)."""
    return Compose(
        [
            Resize(size, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(size),
            lambda image: image.convert("RGB"),
            ToTensor(),
            Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        ]
    )


def encode(visual: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
    """CLIP's image embedding, projected and not normalised: (images, 3, size, size) to (images, embedding)."""
    weights = {name.removeprefix("visual."): tensor for name, tensor in visual.items()}
    return (_encode_vit if "proj" in weights else _encode_resnet)(weights, pixel_values)


def _encode_vit(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    patch = weights["conv1.weight"].shape[-1]
    x = F.conv2d(pixels, weights["conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([weights["class_embedding"].expand(len(x), 1, -1), x], dim=1) + weights["positional_embedding"]
    x = norm(x, "ln_pre")
    depth = sum(name.endswith(".attn.in_proj_weight") for name in weights)
    for block in (f"transformer.resblocks.{index}" for index in range(depth)):
        states = norm(x, f"{block}.ln_1")
        states = F.linear(states, weights[f"{block}.attn.in_proj_weight"], weights[f"{block}.attn.in_proj_bias"])
        query, key, value = states.chunk(3, dim=-1)
        x = x + linear(attention(query, key, value, x.shape[-1] // HEAD_WIDTH), f"{block}.attn.out_proj")
        states = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(states * torch.sigmoid(1.702 * states), f"{block}.mlp.c_proj")
    return norm(x[:, 0], "ln_post") @ weights["proj"]


def _encode_resnet(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    def convolve(x: Tensor, conv: str, norm: str, **kwargs) -> Tensor:
        x = F.conv2d(x, weights[f"{conv}.weight"], **kwargs)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{norm}.{name}"] for name in names))

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"attnpool.{name}.weight"], weights[f"attnpool.{name}.bias"])

    x = F.relu(convolve(pixels, "conv1", "bn1", stride=2, padding=1))
    x = F.relu(convolve(x, "conv2", "bn2", padding=1))
    x = F.avg_pool2d(F.relu(convolve(x, "conv3", "bn3", padding=1)), 2)
    blocks = sorted({(int(name[5]), int(name.split(".")[1])) for name in weights if name.startswith("layer")})
    for layer, index in blocks:
        block, halves = f"layer{layer}.{index}", layer > 1 and index == 0
        states = F.relu(convolve(x, f"{block}.conv1", f"{block}.bn1"))
        states = F.relu(convolve(states, f"{block}.conv2", f"{block}.bn2", padding=1))
        states, x = (F.avg_pool2d(states, 2), F.avg_pool2d(x, 2)) if halves else (states, x)
        if f"{block}.downsample.0.weight" in weights:
            x = convolve(x, f"{block}.downsample.0", f"{block}.downsample.1")
        x = F.relu(convolve(states, f"{block}.conv3", f"{block}.bn3") + x)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + weights["attnpool.positional_embedding"]
    states = attention(linear(x[:, :1], "q_proj"), linear(x, "k_proj"), linear(x, "v_proj"), x.shape[-1] // HEAD_WIDTH)
    return linear(states, "c_proj").squeeze(1)


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention, written out: (rows, asking, width), twice (rows, seen, width) to (rows, asking, width)."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)
