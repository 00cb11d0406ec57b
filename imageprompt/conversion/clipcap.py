"""ClipCap's published checkpoints as imageprompt models.

A ClipCap file holds `clip_project.*`, the mapper from CLIP's image embedding to a prefix, and mostly `gpt.*`, a GPT-2;
never CLIP. The mapper becomes a connector, the GPT-2 the language model, CLIP's tower is timm's. Nothing is taken on
trust: the model's logits are compared with those of the file's own tensors, run by the definition. Source: arXiv
2111.09734 and github.com/rmokady/CLIP_prefix_caption (`train.py`, `predict.py`, `notebooks/`).
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, GPT2LMHeadModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..comparing import verify
from ..composing import compose, load_tokenizer, loading
from ..language_models import load_language_model
from ..modeling import ImagePromptForConditionalGeneration
from ..vision import hub_id, resolve_backbone
from .clip import PREPROCESSING, attention, cast, clip_tower, encode, openai_transform, read_visual
from .conversion import Conversion
from .tensors import first_mismatch, read_tensors

# By the numbers of an embedding: the two encoders for which ClipCap has training commands.
TOWERS = {512: "timm/vit_base_patch32_clip_quickgelu_224.openai", 640: "timm/resnet50x4_clip.openai"}
NUM_HEADS = 8  # of the transformer mapper; the file does not say, the code has no other
MAX_NEW_TOKENS = 67  # `entry_length` of ClipCap's generation
STOP = "."  # its `stop_token`


@dataclass
class Mapper:
    """The mapper of a file: the connector that it becomes, and the connector's weights."""

    connector: str
    clip_size: int
    prefix_length: int
    connector_args: dict[str, int | bool]
    weights: dict[str, Tensor]


def convert_clipcap(
    checkpoint: str | os.PathLike,
    *,
    vision: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    text: str | os.PathLike = "openai-community/gpt2",
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    normalize: bool | None = None,
    clip_revision: str | None = None,
    text_revision: str | None = None,
) -> Conversion:
    """Make a ClipCap checkpoint an imageprompt model with equal logits.

    Args:
        checkpoint: ClipCap's `.pt` file.
        vision: CLIP's tower as a timm name, Hub id or local folder in timm's layout; by default OpenAI's ViT-B/32 for
            embeddings of 512 numbers and RN50x4 for 640.
        clip: where the tower's weights are, instead of timm's: OpenAI's own file (`ViT-B-32.pt`, `RN50x4.pt`), or a
            folder or Hub id of transformers ("openai/clip-vit-base-patch32").
        text: the GPT-2 that the checkpoint was trained from, a Hub id or local folder: its configuration, tokenizer,
            and, if the checkpoint holds no GPT-2, its weights.
        tokenizer: where the tokenizer is, if not with `text`.
        normalize: whether the embedding's length is made 1 (`--normalize_prefix` of ClipCap's `train.py`). The file
            does not say. By default not for the MLP mapper; for the transformer it must be given.
        clip_revision, text_revision: branch, tag or commit, where `clip` and `text` are Hub ids.

    Returns:
        The model with its processor, the differences of logits, and what was assumed of CLIP.

    Raises:
        ValueError: if a file is not what it should be, parts do not fit together, or any logit differs.
    """
    tensors = read_tensors(checkpoint)
    mapping = _part(tensors, "clip_project.")
    if not mapping:
        found = ", ".join([*tensors][:3]) or "nothing"
        raise ValueError(f"{checkpoint} is no ClipCap checkpoint: it has no `clip_project`, but {found}.")
    if surplus := [name for name in tensors if not name.startswith(("clip_project.", "gpt."))]:
        raise ValueError(
            f"{checkpoint} holds `{min(surplus)}`, which is neither of ClipCap's mapper nor of its GPT-2 (there are "
            f"{len(surplus)} such tensors), so it is another model. Where they are of no use, save it without them."
        )
    language_model = _language_model(checkpoint, tensors, text, text_revision)
    mapper = _read_mapper(checkpoint, mapping, language_model.config.n_embd)
    if normalize is None and mapper.connector == "clipcap_transformer":
        raise ValueError(
            f"{checkpoint} does not say whether its embeddings were normalised. Pass `normalize` (--normalize) for the "
            "published COCO weights of the transformer mapper, or for training with `--normalize_prefix`; otherwise "
            "`normalize=False` (--no-normalize)."
        )
    mapper.connector_args |= {"normalize": True} if normalize else {}
    vision = _choose_tower(vision, mapper.clip_size)
    backbone = resolve_backbone(vision, preprocessing=PREPROCESSING)
    visual = None if clip is None else read_visual(clip, clip_revision)
    tower = clip_tower(backbone, visual)
    if tower.num_classes != mapper.clip_size:
        raise ValueError(
            f"{checkpoint} maps embeddings of {mapper.clip_size} numbers, but {os.fspath(vision)!r} gives "
            f"{tower.num_classes}: pass the tower that it was trained with (`vision`, --vision)."
        )

    if tokenizer is None:
        tokenizer = load_tokenizer(text, revision=text_revision)
    model, processor = compose(
        vision,
        language_model.config,
        tokenizer=tokenizer,
        pretrained=False,
        preprocessing=PREPROCESSING,
        connector=mapper.connector,
        connector_args=mapper.connector_args,
        num_image_tokens=mapper.prefix_length,
        trainable={"vision": False},  # as in ClipCap
    )
    vocab_size = language_model.config.vocab_size
    load_language_model(model, language_model)
    _load_parts(model, tower, mapper)
    stop = processor.tokenizer.encode(STOP, add_special_tokens=False)[0]
    model.generation_config.eos_token_id = [stop, processor.tokenizer.eos_token_id]
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    known = {
        "vision": hub_id(backbone) if clip is None else _unless_local(clip),
        "text": _unless_local(text),
    }
    model.config.base_models = {part: name for part, name in known.items() if name} or None

    pictures, ids = _samples(min(vocab_size, processor.image_token_id))
    inputs = processor(images=pictures, return_tensors="pt")
    prompts = {"input_ids": torch.cat([inputs["input_ids"], ids], dim=1), "pixel_values": inputs["pixel_values"]}
    pixels = torch.stack([openai_transform(model.config.image_size[0])(picture) for picture in pictures])

    def logits(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        found = model.to(dtype)(**prompts).logits[..., :vocab_size]
        seen = pixels.to(dtype)
        embedding = tower.to(dtype)(seen) if visual is None else encode(cast(visual, dtype), seen)
        if normalize:
            embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        prefix = map_to_prefix(cast(mapping, dtype), embedding, mapper.prefix_length)
        words = language_model.to(dtype).get_input_embeddings()(ids)
        expected = language_model(inputs_embeds=torch.cat([prefix, words], dim=1)).logits[..., :vocab_size]
        return [(found, expected)]

    what = "The logits of the converted model and of ClipCap's definition"
    differences = verify(logits, what, "Please report it with the checkpoint's name.")
    length = "made 1" if normalize else "left as it is"
    assumed = [
        f"CLIP is {backbone.architecture} with the weights of {os.fspath(clip) if clip else backbone.weights}.",
        f"The length of its embedding of {mapper.clip_size} numbers is {length}, and mapped to {mapper.prefix_length} "
        f"tokens by {mapper.connector}.",
    ]
    return Conversion(model, processor, differences, assumed)


def _unless_local(source: str | os.PathLike) -> str | None:
    return None if os.path.exists(source) else os.fspath(source)


def map_to_prefix(mapping: dict[str, Tensor], embedding: Tensor, prefix_length: int) -> Tensor:
    """ClipCap's mappers by their definition: (images, clip_size) to (images, prefix_length, text width).

    Args:
        mapping: the tensors of `clip_project` under their own names.
        embedding: CLIP's image embedding.
        prefix_length: image tokens.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, mapping[f"{name}.weight"], mapping.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], mapping[f"{name}.weight"], mapping[f"{name}.bias"])

    if "model.0.weight" in mapping:
        return linear(torch.tanh(linear(embedding, "model.0")), "model.2").unflatten(1, (prefix_length, -1))
    constants = mapping["prefix_const"].expand(len(embedding), -1, -1)
    x = torch.cat([linear(embedding, "linear").unflatten(1, (-1, constants.shape[-1])), constants], dim=1)
    for layer in (f"transformer.layers.{index}" for index in range(_depth(mapping))):
        states = norm(x, f"{layer}.norm1")
        key, value = linear(states, f"{layer}.attn.to_keys_values").chunk(2, dim=-1)
        seen = attention(linear(states, f"{layer}.attn.to_queries"), key, value, NUM_HEADS)
        x = x + linear(seen, f"{layer}.attn.project")
        x = x + linear(F.relu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return x[:, -prefix_length:]


def clipcap_beam_search(
    model, input_ids: Tensor, logits_processor, stopping_criteria, generation_config, **model_kwargs
) -> Tensor:
    """ClipCap's own beam search: `model.generate(**inputs, num_beams=5, custom_generate=clipcap_beam_search)`.

    It differs from the library's in one thing: a caption that has ended stays among the beams. There it is ranked with
    the others by the mean log-probability of its tokens, takes the place of one that goes on, and is lost when enough
    better ones come. One row at a time.

    Returns:
        (num_return_sequences, positions), the best first; padding follows an end.

    Raises:
        ValueError: for several rows, or no beams.
    """
    num_beams = generation_config.num_beams
    if num_beams < 2 or len(input_ids) != num_beams:
        raise ValueError("ClipCap's beam search takes one row at a time, and `num_beams` of 2 or more.")
    ends, padding = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    sums = torch.full((num_beams,), -torch.inf, device=input_ids.device)
    sums[0] = 0  # the beams are still alike: one of them is continued
    lengths, ended = torch.zeros_like(sums), torch.zeros_like(sums, dtype=torch.bool)
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        # What may not be said, such as the placeholder, takes no share of the probability, as it has none in ClipCap.
        log_probs = logits_processor(input_ids, outputs.logits[:, -1].float()).log_softmax(-1)
        log_probs[ended] = -torch.inf
        log_probs[ended, padding] = 0
        lengths = lengths + ~ended
        means, chosen = ((sums[:, None] + log_probs) / lengths[:, None]).flatten().topk(num_beams)
        beams, tokens = chosen // log_probs.shape[1], chosen % log_probs.shape[1]
        lengths, sums = lengths[beams], means * lengths[beams]
        input_ids = torch.cat([input_ids[beams], tokens[:, None]], dim=1)
        ended = ended[beams] | torch.isin(tokens, ends)
        if ended.all() or input_ids.shape[1] == generation_config.max_length:
            return input_ids[: generation_config.num_return_sequences]
        if (cache := model_kwargs.get("past_key_values")) is not None:
            cache.reorder_cache(beams)
        step = 1 if model_kwargs.get("use_cache") else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **model_kwargs)
        outputs = model(**inputs, return_dict=True)


def _language_model(
    checkpoint, tensors: dict[str, Tensor], text: str | os.PathLike, revision: str | None
) -> GPT2LMHeadModel:
    """The GPT-2 of the file, or, where it holds none, that of `text`."""
    with loading(text):
        config = AutoConfig.from_pretrained(text, revision=revision)
    if config.model_type != "gpt2":
        raise ValueError(f"ClipCap's language model is a GPT-2; {os.fspath(text)!r} is a {config.model_type!r}.")
    # Older versions of the library saved the causal mask of each layer as well.
    masks = (".attn.bias", ".attn.masked_bias")
    gpt = {name: tensor for name, tensor in _part(tensors, "gpt.").items() if not name.endswith(masks)}
    if not gpt:
        with loading(text):
            return GPT2LMHeadModel.from_pretrained(text, revision=revision, dtype=torch.float32).eval()
    words = gpt.get("transformer.wte.weight")
    if words is None or not torch.equal(gpt.setdefault("lm_head.weight", words), words):
        raise ValueError(f"{checkpoint} holds a GPT-2 whose head is not its word embeddings: ClipCap has none such.")
    model = GPT2LMHeadModel(config).eval()
    try:
        model.load_state_dict(gpt)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} holds another GPT-2 than {os.fspath(text)!r}: {first_mismatch(error)}. Pass the one that it "
            "was trained from (`text`, --text)."
        ) from error
    return model


def _read_mapper(checkpoint, mapping: dict[str, Tensor], width: int) -> Mapper:
    """Which connector the mapper is, and its weights under our names; the shapes say all but the number of heads."""
    readers = {"model.0.weight": _read_mlp, "prefix_const": _read_transformer}
    read = next((read for name, read in readers.items() if name in mapping), None)
    if read is None:
        raise ValueError(
            f"{checkpoint} holds neither ClipCap's MLP mapper nor its transformer: `clip_project` has "
            f"{', '.join(sorted(mapping)[:3])}."
        )
    tensors = dict(mapping)
    try:
        mapper = read(tensors, width)
    except KeyError as error:
        raise ValueError(f"{checkpoint} lacks `clip_project.{error.args[0]}`, which a ClipCap mapper has.") from error
    except RuntimeError as error:
        raise ValueError(
            f"The mapper of {checkpoint} does not fit GPT-2's width of {width}: {error}. Pass the GPT-2 that it was "
            "trained with (`text`, --text)."
        ) from error
    if tensors:
        raise ValueError(f"{checkpoint} has `clip_project.{min(tensors)}`, for which a ClipCap mapper has no place.")
    return mapper


def _read_mlp(tensors: dict[str, Tensor], width: int) -> Mapper:
    (hidden, clip_size), outputs = tensors["model.0.weight"].shape, len(tensors["model.2.weight"])
    if outputs % width or hidden != outputs // 2:
        raise RuntimeError(f"its layers have {hidden} and {outputs} outputs")
    weights = _renamed(tensors, {"linear_1": "model.0", "linear_2": "model.2"})
    return Mapper("clipcap_mlp", clip_size, outputs // width, {"clip_size": clip_size}, weights)


def _read_transformer(tensors: dict[str, Tensor], width: int) -> Mapper:
    depth, (outputs, clip_size) = _depth(tensors), tensors["linear.weight"].shape
    constants = tensors.pop("prefix_const")
    if outputs % width or constants.shape[1] != width:
        raise RuntimeError(f"its linear layer has {outputs} outputs, its constants {constants.shape[1]} columns")
    weights = _renamed(tensors, {"linear": "linear"}) | {"constants.weight": constants}
    for index in range(depth):
        ours, theirs = f"layers.{index}", f"transformer.layers.{index}"
        names = ("to_queries", "to_keys_values")
        weights[f"{ours}.self_attn.in_proj_weight"] = torch.cat(
            [tensors.pop(f"{theirs}.attn.{name}.weight") for name in names]
        )
        weights[f"{ours}.self_attn.in_proj_bias"] = torch.zeros(3 * width)  # ClipCap's attention has none
        same = {"self_attn.out_proj": "attn.project", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
        same |= {"norm1": "norm1", "norm2": "norm2"}
        weights |= _renamed(tensors, {f"{ours}.{our}": f"{theirs}.{their}" for our, their in same.items()})
    arguments = {"clip_size": clip_size, "clip_length": outputs // width, "depth": depth}
    return Mapper("clipcap_transformer", clip_size, len(constants), arguments, weights)


def _renamed(tensors: dict[str, Tensor], layers: dict[str, str]) -> dict[str, Tensor]:
    """Weights and biases of layers under our names, taken out of `tensors`."""
    return {
        f"{ours}.{kind}": tensors.pop(f"{theirs}.{kind}")
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }


def _depth(mapping: dict[str, Tensor]) -> int:
    return sum(name.endswith(".attn.to_queries.weight") for name in mapping)


def _choose_tower(vision: str | os.PathLike | None, clip_size: int) -> str | os.PathLike:
    if vision is not None:
        return vision
    if clip_size not in TOWERS:
        raise ValueError(
            f"The mapper takes embeddings of {clip_size} numbers; ClipCap's own encoders give "
            f"{' or '.join(map(str, TOWERS))}. Pass the tower that it was trained with (`vision`, --vision)."
        )
    return TOWERS[clip_size]


def _load_parts(model: ImagePromptForConditionalGeneration, tower: torch.nn.Module, mapper: Mapper) -> None:
    """The tower, CLIP's projection, which timm keeps as the classifier, and the mapper."""
    projection = tower.get_classifier()
    name = next(name for name, module in tower.named_modules() if module is projection)
    weights = tower.state_dict()
    projected = {f"projection.{kind}": weights.pop(f"{name}.{kind}") for kind in ("weight", "bias")}
    model.model.vision_tower.timm_model.load_state_dict(weights)
    model.model.connector.load_state_dict(projected | mapper.weights)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _samples(words: int) -> tuple[list[Image.Image], Tensor]:
    """Two pictures, and 24 tokens for each of them."""
    random = np.random.default_rng(0)
    sizes = [(320, 420), (500, 300)]
    pictures = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return pictures, torch.from_numpy(random.integers(0, words, (len(pictures), 24)))
