"""A ViT learns handwritten digits from nothing, on 1,437 pictures of 8 x 8 pixels.

    python examples/vit_digits.py

The pictures come with scikit-learn; every fifth is held out. A forward step of our own moves the pictures about.
"""

import torch
from gospels import argument_parser, tell
from sklearn.datasets import load_digits
from torch import Tensor

import swissarmy as sat
from swissarmy.training.steps import image_classification_step

options = argument_parser(__doc__, "runs/digits").parse_args()
steps = 4 if options.smoke else 1200


# (a) The data: any object with a length and records by number will do.
class Digits:
    """The pictures whose number leaves one of some remainders when divided by five."""

    def __init__(self, *remainders: int) -> None:
        images, labels = load_digits(return_X_y=True)
        chosen = [number for number in range(len(images)) if number % 5 in remainders]
        self.images = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        self.labels = torch.tensor(labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[number], "labels": self.labels[number]}


def create_dataset(name: str, config: sat.DataConfig) -> Digits:
    """What the names of the config below stand for."""
    return Digits(4) if name == "held out" else Digits(0, 1, 2, 3)


# (b) The model: what a `config.json` of ViT would say, small. A picture is 16 patches of 2 x 2 pixels.
torch.manual_seed(0)
model = sat.AutoModel.from_config(
    {
        "model_type": "vit",
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "num_labels": 10,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.1,  # 0.02 is for wide models: this one would hardly begin to learn
    }
)


# (c) The step: the stock one, after each picture of a training batch was moved by up to one pixel.
def shifted(images: Tensor) -> Tensor:
    """`[b, c, h, w]`, each picture on its own; what comes in at the edge is paper."""
    rows, columns = torch.randint(-1, 2, (2, len(images), 1), device=images.device)
    place = torch.arange(images.shape[-1], device=images.device)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded[picture, :, (place + 1 + rows)[:, :, None], (place + 1 + columns)[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def forward_step(batch, model):
    if model.training:
        batch = {**batch, "pixel_values": shifted(batch["pixel_values"])}
    return image_classification_step(batch, model)


# (d) The run.
config = sat.TrainConfig(
    output=str(options.output),
    train_data=("train",),
    valid_data=("held out",),
    record_format="samples",
    train_iters=steps,
    batch_size=64,
    eval_batch_size=360,
    optimizer="muon",
    lr=6e-3,
    lr_decay_style="linear",
    warmup=0.02,
    lr_floor=0.0,
    weight_decay=0.05,
    log_interval=100,
)
result = sat.train(model, forward_step, create_dataset, config)

valid = result.evaluations["valid"]
tell(example="vit_digits", steps=result.step, held_out=int(valid.count), accuracy=valid.metrics["accuracy"])
