"""Share a saved model: `python scripts/push_to_hub.py runs/captioner you/captioner`."""

from functools import partial

import typer

from imageprompt.cli import main, push

if __name__ == "__main__":
    main(partial(typer.run, push))
