"""Save a tiny checkpoint with any commit of this package, and what it answers, for tests/test_compatibility.py.

    git worktree add --detach ../older COMMIT
    PYTHONPATH=../older python tests/checkpoints/save.py KIND tests/checkpoints/COMMIT-KIND
    git worktree remove ../older

KIND is "prefix" or "cross_attention". `expected.safetensors` beside the checkpoint holds the answers. Whenever
`FORMAT_VERSION` is raised, add one of each kind, add what that format holds to formats.json, and leave the older ones
as they are; the `*.py` may go where another checkpoint keeps its code.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

TEXTS = ["A photo of a dog!", "Two cats on a red sofa.", "What is it? It is the number seven."]
KINDS = {
    "prefix": {
        "vision": "vit_tiny_patch16_224",
        "model_args": {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8},
        "num_image_tokens": 4,
    },
    # Batch norm has buffers besides its parameters.
    "cross_attention": {
        "vision": "fasternet_t0",
        "model_args": {"embed_dim": 4, "depths": (1, 1, 1, 1), "feature_dim": 16},
        "fusion": "cross_attention",
        "connector": "resampler",
        "connector_args": {"depth": 1},
        "num_image_tokens": 2,
    },
}


@torch.no_grad()
def answers(model, processor) -> dict[str, torch.Tensor]:
    """Logits and greedily generated ids for an image with a text, and for a text alone."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    results = {}
    for name, images in (("image", image), ("text", None)):
        inputs = processor(images=images, text="A photo of", return_tensors="pt")
        results[f"{name}_logits"] = model(**inputs).logits
        results[f"{name}_ids"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return results


def main(kind: str, folder: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2Tokenizer

    from imageprompt import compose

    torch.manual_seed(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(TEXTS, trainer)
    text_config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=300, bos_token_id=0, eos_token_id=0
    )
    model, processor = compose(
        text=text_config,
        tokenizer=GPT2Tokenizer(tokenizer_object=bpe),
        pretrained=False,
        preprocessing={"input_size": (3, 32, 32)},
        **KINDS[kind],
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():  # far from what is drawn where weights are missing
                tensor.add_(0.3 * torch.rand_like(tensor))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    versions = {name: version(name) for name in ("torch", "transformers", "timm", "pillow")}
    save_file(answers(model, processor), Path(folder, "expected.safetensors"), metadata=versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
