"""Ask a saved model about a data set split and score its answers: `python scripts/evaluate.py --help`."""

from imageprompt.evaluation.evaluate import main

if __name__ == "__main__":
    main()
