"""Train a language model on plain text: `python scripts/pretrain.py --help`, or under `accelerate launch`."""

from imageprompt.training.pretrain import main

if __name__ == "__main__":
    main()
