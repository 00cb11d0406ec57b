"""Train or fine-tune an image-prompt model on a data set of images and texts.

Run it as `imageprompt train …`, `python scripts/train.py …` or `accelerate launch scripts/train.py …`. Every field of
`TrainingArguments` is an option as well. Each step of `main` has its own module.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from ..data.arguments import check_data, training_data, training_texts
from ..data.packing import check_packable
from ..data.rows import Mixture, Rows
from .arguments import parse, with_options
from .building import build_model, refuse_streams
from .checkpoints import refuse_earlier_run
from .lengths import check_lengths
from .running import TrainingRows, run_training
from .search import search
from .stages import check_stages, read_stages, run_stages


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (the command line by default), train, and save model, processor, metrics and curves."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    stages = read_stages(argv, options) if options.plan.stages else []
    if stages and options.plan.search:
        raise ValueError("Pass --stages or --search, not both: search first, and write what came out into the stages.")
    if not stages:  # each has its own folder, looked at below
        refuse_earlier_run(options.training.output_dir, options.training.resume_from_checkpoint)
    if options.model.new_tokenizer is not None:
        refuse_streams(options.data)
    check_data(options.data)
    set_seed(options.training.seed)
    model, processor = build_model(options.model, training_texts(options.data))
    runs = [stage.options for stage in stages] or [options]
    evaluates = any(run.training.eval_strategy != "no" for run in runs) or options.plan.search is not None
    seed, output_dir = options.training.seed, Path(options.training.output_dir)
    if options.data.pack_length is not None:
        check_packable(model)
    rows = TrainingRows(*training_data(options.data, model.config.image_size, evaluates=evaluates, seed=seed))
    if isinstance(rows.train, (Rows, Mixture)):  # a stream would have to be read to its end
        check_lengths(rows.train, processor, options.data.max_length)
    if stages:
        check_stages(stages, model, processor, rows, options.training.resume_from_checkpoint)
        run_stages(stages, model, processor, rows, output_dir)
    else:
        if options.plan.search:
            best = search(argv, options, processor, rows)
            options = parse(with_options(argv, best))
            set_seed(seed)
            model, processor = build_model(options.model, training_texts(options.data))
        run_training(model, processor, rows, options)
    if options.training.process_index == 0:
        print(f"Saved to {output_dir.resolve()}")


if __name__ == "__main__":
    main()
