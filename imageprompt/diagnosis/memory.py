"""How much memory training and generation take, counted on fake tensors, which have shapes and no values.

The model's own code runs, and two counters watch: one what autograd keeps for the backward pass, one every storage that
lives. Nothing is copied from formulas, so a new backbone, connector or adapter is counted like the old ones.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary, weakref
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import logging

from ..configuration import ImagePromptConfig
from ..modeling import ImagePromptForConditionalGeneration
from ..provenance import is_weights
from .report import Memory, Part, Plan


def build_on_meta(config: ImagePromptConfig, dtype: str = "float32") -> ImagePromptForConditionalGeneration:
    """The model without memory for its weights, in a `Plan`'s dtype."""
    with torch.device("meta"), quiet():
        return ImagePromptForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32
        )


def count_parts(model: ImagePromptForConditionalGeneration) -> dict[str, Part]:
    """Parameters by part; a head that shares the embeddings' weights is no part of its own."""
    base = model.model
    modules = {"vision": base.vision_tower, "connector": base.connector, "text": base.language_model}
    shared = {id(parameter) for parameter in base.parameters()}
    if any(id(parameter) not in shared for parameter in model.lm_head.parameters()):
        modules["head"] = model.lm_head
    return {
        name: Part(
            sum(parameter.numel() for parameter in module.parameters()),
            sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
        )
        for name, module in modules.items()
    }


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live: `now`, and the highest, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._sizes:
                self._sizes[storage] = size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, size)
        return outputs

    def _forget(self, size: int) -> None:
        self.now -= size


@contextmanager
def count_saved_bytes(model: nn.Module) -> Iterator[WeakIdKeyDictionary]:
    """Collects the storages, with their bytes, that autograd saves for the backward pass; not the model's own."""
    own = WeakIdKeyDictionary()
    for tensor in (*model.parameters(), *model.buffers()):
        own[tensor.untyped_storage()] = True
    saved = WeakIdKeyDictionary()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in own:
            saved[storage] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def on_fake_tensors(model: nn.Module) -> Iterator[None]:
    """Run a meta model on fake CPU tensors, for which torch chooses the kernels of the CPU; meta ones get others."""
    fakes: dict[int, Tensor] = {}  # tied tensors stay tied
    # With `ShapeEnv`, checks of values pass, as they do for right inputs.
    with FakeTensorMode(shape_env=ShapeEnv()), quiet():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in fakes:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                            is_parameter = isinstance(tensor, nn.Parameter)
                            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                        tensors[name] = fakes[id(tensor)]
        yield


def fake_loss(model: ImagePromptForConditionalGeneration, plan: Plan) -> tuple[Tensor, Tensor]:
    """Loss and logits of a training batch of fake tensors, all of whose text is supervised."""
    config, rows = model.config, plan.batch_size
    length = plan.images_per_row * config.image_seq_length + plan.text_tokens
    hidden_states = model.model(**_fake_batch(model, rows, length, plan), use_cache=False).last_hidden_state
    targets = torch.zeros(rows * plan.text_tokens, dtype=torch.long)
    supervised = torch.zeros(rows, length, dtype=torch.bool)
    # Values would decide how many positions this selects, and fake tensors have none.
    setattr(supervised, "nonzero_memo", len(targets))  # noqa: B010
    logits = model.lm_head(hidden_states[supervised])
    loss = model.loss_function(logits=logits, labels=None, shift_labels=targets, vocab_size=config.vocab_size)
    return loss, logits


def _fake_batch(
    model: ImagePromptForConditionalGeneration, rows: int, length: int, plan: Plan, num_beams: int = 1
) -> dict[str, Any]:
    """Inputs of so many rows, with images encoded once for all beams of a row, as `generate` does it."""
    config, images = model.config, rows // num_beams * plan.images_per_row
    batch = {
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }
    pixel_values = torch.zeros(images, config.num_channels, *config.image_size)
    encoded = model.get_image_features(pixel_values, return_dict=True)
    tokens = encoded.pooler_output.repeat_interleave(num_beams, dim=0) if num_beams > 1 else encoded.pooler_output
    if config.fusion == "prefix":
        encoded.pooler_output = tokens
        return batch | {"mm_encoder_outputs": {"image": encoded}}
    return batch | {"encoder_hidden_states": tokens.reshape(rows, -1, config.hidden_size)}


def stored_bytes(folder: Path) -> int:
    """Bytes of the tensors in a saved model's files, without loading them."""
    total = 0
    for path in filter(lambda path: is_weights(path.name) and path.suffix == ".safetensors", folder.iterdir()):
        with path.open("rb") as file:  # the header's length comes first
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def estimate_memory(model: ImagePromptForConditionalGeneration, plan: Plan, stored: int | None = None) -> Memory:
    """Count the bytes of a training step and of `generate`; on fake tensors, no memory is needed for it.

    Args:
        stored: bytes of weights that are held as they are stored, not as in this model: quantised ones.
    """
    config = model.config
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if stored is not None:
        in_files = model.state_dict().keys()
        weights = stored + sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in in_files)
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=plan.dtype == "autocast")
    with LiveBytes() as step, count_saved_bytes(model) as saved:
        with autocast:
            loss, logits = fake_loss(model, plan)
        activations, logits_bytes = sum(saved.values()), logits.nbytes
        del logits
        if loss.requires_grad:
            loss.backward()
    model.zero_grad()
    training = weights + 2 * gradients + max(step.peak, gradients)

    model.eval()
    prompt, rows = plan.images_per_row * config.image_seq_length + plan.text_tokens, plan.batch_size * plan.num_beams
    with LiveBytes() as prefill, torch.no_grad():
        outputs = model.model(**_fake_batch(model, rows, prompt, plan, plan.num_beams), use_cache=True)
        model.lm_head(outputs.last_hidden_state[:, -1:])
    keys_and_values = outputs.past_key_values
    if isinstance(keys_and_values, EncoderDecoderCache):  # the images' part does not grow
        text, of_images = _nbytes(keys_and_values.self_attention_cache), _nbytes(keys_and_values.cross_attention_cache)
    else:
        text, of_images = _nbytes(keys_and_values), 0
    cached = text + of_images
    cache = text // prompt * (prompt + plan.max_new_tokens) + of_images
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=2 * gradients,
        activations=activations,
        logits=logits_bytes,
        training=training,
        kv_cache_per_row=cache // rows,
        kv_cache=cache,
        generation=weights + prefill.peak + cache - cached,
    )


def _nbytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings: the report says what matters."""
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
