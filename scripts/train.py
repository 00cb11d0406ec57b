"""Train an image-prompt model: `python scripts/train.py --help`, or `accelerate launch scripts/train.py …`."""

from imageprompt.training.train import main

if __name__ == "__main__":
    main()
