"""The command line of a training that takes a second."""

import json

TINY_TEXT = json.dumps({"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 400})


def options(folders, output, *more: str) -> list[str]:
    """Options of `imageprompt train` on the fixture `folders`, for two steps."""
    data, tokenizer = folders
    parts = [
        "--vision",
        "test_resnet",
        "--text_config",
        TINY_TEXT,
        "--tokenizer",
        str(tokenizer),
        "--pretrained",
        "false",
    ]
    parts += ["--image_size", "32", "--dataset", str(data), "--suffix_column", "captions", "--output_dir", str(output)]
    return [*parts, "--per_device_train_batch_size", "4", "--max_steps", "2", "--use_cpu", *more]
