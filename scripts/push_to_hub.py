"""Share a saved model: `python scripts/push_to_hub.py runs/captioner you/captioner`."""

import typer

from imageprompt.cli import push

if __name__ == "__main__":
    typer.run(push)
