"""A small T5 learns from nothing to fill in what was cut out of a text.

    python examples/t5_span_corruption.py

The loss is that of the missing tokens; beside it stands what one gets who knows only how frequent each token is.
"""

import torch
from gospels import argument_parser, read_chapters, tell, write_records
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import swissarmy as sat
from swissarmy.data.objectives.collator import objective_collator
from swissarmy.data.tokenizer import Tokenizer as TokenizerWithRoles
from swissarmy.training.steps import seq2seq_step

options = argument_parser(__doc__, "runs/t5").parse_args()
steps = 3 if options.smoke else 500

# (a) The data: passages of four verses; every fifth chapter is held out.
train, held_out = (
    [
        {"text": " ".join(each.verses[start : start + 4])}
        for each in read_chapters()
        if each.held_out == out
        for start in range(0, len(each.verses), 4)
    ]
    for out in (False, True)
)

if options.smoke:
    train, held_out = train[:64], held_out[:8]

# (b) A tokenizer of 1,000 pieces of words, and the sentinels that stand for what is missing.
SPECIAL = ["<pad>", "</s>", *(f"<extra_id_{number}>" for number in range(24))]
pieces = Tokenizer(models.BPE())
pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=1000,
    special_tokens=SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
pieces.train_from_iterator((record["text"] for record in train), trainer)
tokenizer = TokenizerWithRoles(pieces, special_tokens={"pad_token": "<pad>", "eos_token": "</s>"})

# (c) The model: what a `config.json` of T5 1.1 would say, small.
torch.manual_seed(0)
model = sat.AutoModel.from_config(
    {
        "model_type": "t5",
        "vocab_size": len(tokenizer),
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 4,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }
)

# (d) The run. What is cut out of a passage is another thing in each epoch, and of held-out ones always the same.
config = sat.TrainConfig(
    output=str(options.output),
    train_data=(write_records(options.output / "train.jsonl", train),),
    valid_data=(write_records(options.output / "held_out.jsonl", held_out),),
    sequence_length=160,
    bucketing_window=8,
    mask_probability=0.15,
    mean_span_length=3.0,
    train_iters=steps,
    batch_size=32,
    optimizer="muon",
    lr=4e-3,
    precision="bf16",
    warmup=0.05,
    lr_floor=0.02,
    eval_interval=max(steps // 5, 1),
    log_interval=25,
)
collate = objective_collator("span_corruption", config, tokenizer, config)


# (e) The baseline: targets of the training data, counted.
def unigram_loss() -> float:
    """In nats for each token of the held-out targets."""
    loaders = sat.build_loaders(config, tokenizer, global_batch_size=32, epochs=1, collate=collate)
    seen, wanted = (
        torch.stack([torch.bincount(batch["labels"][batch["labels"] >= 0], minlength=len(tokenizer)) for batch in each])
        for each in (loaders.train, loaders.valid)
    )
    shares = (seen.sum(dim=0) + 1) / (seen.sum() + len(tokenizer))
    return float(-(wanted.sum(dim=0) * shares.log()).sum() / wanted.sum())


baseline = unigram_loss()
print(f"knowing only how frequent each token is: {baseline:.3f} nats per missing token")

result = sat.train(model, seq2seq_step, None, config, tokenizer=tokenizer, collate=collate)
valid = result.evaluations["valid"]
tell(
    example="t5_span_corruption",
    steps=result.step,
    held_out_tokens=int(valid.count),
    unigram_loss=baseline,
    loss=valid.loss,
    accuracy=valid.metrics["accuracy"],
)
