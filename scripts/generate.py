"""Answer for images with a saved model: `python scripts/generate.py MODEL IMAGE … --prompt "A photo of"`."""

import typer

from imageprompt.cli import generate

if __name__ == "__main__":
    typer.run(generate)
