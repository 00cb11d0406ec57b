"""Caption a data set split and score the captions: `python scripts/evaluate.py --help`."""

from imageprompt.evaluation.evaluate import main

if __name__ == "__main__":
    main()
