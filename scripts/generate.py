"""Answer for images with a saved model: `python scripts/generate.py MODEL IMAGE … --prompt "A photo of"`."""

from functools import partial

import typer

from imageprompt.cli import generate, main

if __name__ == "__main__":
    main(partial(typer.run, generate))
