"""`sat train`: a model, data and a config in; a run's folder with the trained model out."""

from functools import partial
from typing import TYPE_CHECKING

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, LaterOptions, UsageError
from swissarmy.core.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    from swissarmy.cli.train_options import TrainOptions
    from swissarmy.data.tokenizer import Tokenizer


def run(options: "TrainOptions") -> int:
    """Train, or with `--dry-run` say what training would take."""
    try:
        return _dry_run(options) if options.dry_run else _train(options)
    except ConfigError as error:  # found before the first step
        raise UsageError(str(error)) from error


def _train(options: "TrainOptions") -> int:
    """128 and the number of the signal, where one ended the run."""
    from swissarmy.cli.train_model import find_model
    from swissarmy.data.objectives.collator import objective_collator
    from swissarmy.data.sources.open import check_path
    from swissarmy.training.checkpoint.lock import RunLock
    from swissarmy.training.folder import check_folder
    from swissarmy.training.ranks import Ranks
    from swissarmy.training.sample_sizes import sized_for
    from swissarmy.training.steps import STEPS
    from swissarmy.training.train import train

    RunLock(options.output, Ranks()).check_free()
    check_folder(options)
    for path in (*options.train_data, *options.valid_data, *options.test_data):
        check_path(path)
    tokenizer = _tokenizer(options)
    collate_for = partial(objective_collator, options.objective, tokenizer=tokenizer, options=options)
    collate_for(data=options)  # all that is wrong so far is told before a model is loaded
    model, weights = find_model(options)
    config = sized_for(options.with_trainable(list(options.wanted_mixins)).with_record_format(), model)
    result = train(
        model,
        STEPS[options.objective],
        None,
        config,
        tokenizer=tokenizer,
        collate=collate_for(data=config),
        weights=weights,
    )
    return DONE if result.signal is None else 128 + result.signal


def _tokenizer(options: "TrainOptions") -> "Tokenizer | None":
    """The one that is named, or the model's own, if it has one."""
    from swissarmy.interop.tokenizer import load_tokenizer

    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    try:
        return None if options.model is None else load_tokenizer(options.model)
    except TokenizerError:  # models of pictures have none; where one is needed, the data says so
        return None


def _dry_run(options: "TrainOptions") -> int:
    from swissarmy.cli.train_model import planner
    from swissarmy.cli.train_plan import show
    from swissarmy.training.dry_run.plan import dry_run

    config = options.with_trainable(list(options.wanted_mixins))
    plan = dry_run(config, planner(options), options.world_size)
    if options.json:
        output.print_json(plan.to_dict(), indent=2)
    else:
        show(plan)
    return DONE


COMMAND = Command(
    summary="train a model, or fine-tune one, on one machine or on many",
    examples=(
        "sat train --config run.yaml",
        "sat train --model openai-community/gpt2 --train-data books.txt --output runs/books --lora-rank 8 "
        "--train-iters 1000 --batch-size 8 --sequence-length 256 --packing",
        "torchrun --nproc-per-node 8 -m swissarmy train --config run.yaml --shard 4 --tensor-parallel 2",
        "sat train --config run.yaml --dry-run --world-size 512",
    ),
    options=LaterOptions("swissarmy.cli.train_options", "TrainOptions"),
    run=run,
)
