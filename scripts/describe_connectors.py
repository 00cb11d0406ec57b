"""Count what each connector costs: parameters, image tokens and positions, without making any weights.

    python scripts/describe_connectors.py --output docs/connectors/connectors.json

`docs/connectors.md` holds the table that this prints, for GPT-2 with 124 M parameters behind each backbone.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GPT2Config

from imageprompt import ImagePromptConfig
from imageprompt.connectors import CONNECTORS, build_connector
from imageprompt.provenance import provenance

BACKBONES = {"vit_small_patch16_224": {}, "resnet50": {"input_size": (3, 256, 256)}}


def main(output: Annotated[Path, typer.Option(help="JSON file.")]) -> None:
    backbones = {
        name: {connector: describe(name, preprocessing, connector) for connector in CONNECTORS}
        for name, preprocessing in BACKBONES.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**provenance(), "backbones": backbones}, indent=1) + "\n")
    print(table(backbones))


def describe(name: str, preprocessing: dict[str, Any], connector: str) -> dict[str, Any]:
    config = ImagePromptConfig.from_backbones(name, GPT2Config(), preprocessing=preprocessing, connector=connector)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_connector(config).parameters())
    return {
        "grid": config.feature_grid,
        "features": config.feature_size,
        "tokens": config.num_image_tokens,
        "parameters": parameters,
    }


def table(backbones: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line for each connector."""
    sizes = [f"{name} at {BACKBONES[name].get('input_size', (3, 224, 224))[1]} pixels" for name in backbones]
    lines = [f"| connector | {' | '.join(sizes)} |", "| --- " * (len(sizes) + 1) + "|"]
    for connector in CONNECTORS:
        costs = [
            f"{cost['tokens']} tokens, {cost['parameters'] / 1e6:.1f} M"
            for cost in (each[connector] for each in backbones.values())
        ]
        lines.append(f"| `{connector}` | {' | '.join(costs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
