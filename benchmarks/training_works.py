"""What `training.py` trains: the networks, their samples, and the least time that a step's products take."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import nn

from swissarmy.nn.linear import linear

TRAINER: Final = ("Trainer", "Trainer, compiled")
OURS: Final = ("swissarmy", "swissarmy, compiled", "swissarmy, recomputing", "swissarmy, giving back")
TEXT: Final = Path(__file__).parent.parent / "examples" / "data" / "kjv_gospels_and_acts.txt"
CLASSES: Final = 5


@dataclass(frozen=True)
class Work:
    """One table: what is trained, on what."""

    name: str
    network: str
    task: Literal["causal", "verses", "classify", "images"]
    batch: int
    candidates: tuple[str, ...]
    length: int = 0
    """Tokens of a row, where all have as many; for packing, of a row that is packed."""
    lora: bool = False

    @property
    def same_samples(self) -> bool:
        """Whether all candidates see the same samples in the first step: there are no others."""
        return self.task in ("causal", "images")

    @property
    def unit(self) -> str:
        """What is counted."""
        return "images" if self.task == "images" else "tokens"

    def samples(self, vocab: int) -> list[dict[str, Any]]:
        """Token ids as lists, or pictures, and labels."""
        generator = torch.Generator().manual_seed(0)
        if self.task == "images":
            pictures = torch.randn(self.batch, 3, 224, 224, generator=generator)
            return [{"pixel_values": each, "labels": index % CLASSES} for index, each in enumerate(pictures)]
        if self.task == "causal":
            rows = torch.randint(100, vocab, (self.batch, self.length), generator=generator)
            return [{"input_ids": row.tolist()} for row in rows]
        if self.task == "verses":
            return [{"input_ids": ids} for ids, _ in verses(vocab)]
        return [{"input_ids": ids, "labels": label} for ids, label in verses(vocab)]


def verses(vocab: int) -> Iterator[tuple[list[int], int]]:
    """Each verse as an id for every word and mark, and the number of its book."""
    known: dict[str, int] = {}
    book, books = "", list[str]()
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"(\D+) \d+", line):
            book = heading[1]
            books += [] if book in books else [book]
        elif line:
            words = re.findall(r"\w+|[^\w\s]", line.partition(" ")[2])
            yield [100 + known.setdefault(word, len(known)) % (vocab - 100) for word in words], books.index(book)


WORKS: Final = (
    Work("gpt2 124M, 2 x 256", "gpt2", "causal", 2, (*TRAINER, "plain loop", *OURS), length=256),
    Work("llama-like 125M, 2 x 256", "llama", "causal", 2, (*TRAINER, "litgpt", *OURS), length=256),
    Work("gpt2 124M, LoRA r=8, 2 x 256", "gpt2", "causal", 2, (*TRAINER, *OURS), length=256, lora=True),
    Work("gpt2 124M, verses", "gpt2", "verses", 8, ("Trainer", "Trainer, by length", *OURS), length=256),
    Work("bert-base, classify verses", "bert", "classify", 8, ("Trainer", "Trainer, by length", *OURS)),
    Work("vit-b/16, 4 images", "vit", "images", 4, (*TRAINER, *OURS)),
)


def save_networks(works: Sequence[Work], folder: Path) -> dict[str, str]:
    """The networks as folders that both libraries load, with random weights and without dropout."""
    return {network: _save(network, folder / network) for network in dict.fromkeys(work.network for work in works)}


def _save(network: str, folder: Path) -> str:
    import transformers

    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
    ends = {"bos_token_id": None, "eos_token_id": None}
    made: Any
    if network == "gpt2":
        config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ends)
        made = transformers.GPT2LMHeadModel(config)
    elif network == "llama":
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
        llama = transformers.LlamaConfig(
            **sizes, num_key_value_heads=4, vocab_size=32000, max_position_embeddings=1024, **ends
        )
        made = transformers.LlamaForCausalLM(llama)
    elif network == "bert":
        made = transformers.BertForSequenceClassification(transformers.BertConfig(**no_dropout))
    else:
        made = transformers.ViTForImageClassification(transformers.ViTConfig(**no_dropout))
    made.save_pretrained(folder)
    return str(folder)


def products_seconds(work: Work, folder: str, *, rounds: int = 5) -> float | None:
    """The time of a step's matrix products alone, by the fastest path there is: forward, and both gradients.

    `None` where steps differ in their number of tokens. Attention's own products are left out: below 5 % here.
    """
    if work.task in ("verses", "classify"):
        return None
    rows = work.batch * (197 if work.task == "images" else work.length)
    return sum(
        count * sum(_fastest(product, rounds) for product in _products(rows, *shape, weight_trains=not work.lora))
        for shape, count in _shapes(folder).items()
    )


def _shapes(folder: str) -> Counter[tuple[int, int]]:
    """`(inputs, outputs)` of every large product of the network, the head's included."""
    import swissarmy as sat

    model: Any = sat.load(folder)
    found = Counter((each.in_features, each.out_features) for each in model.modules() if isinstance(each, nn.Linear))
    if model.config.vocab_size and model.transformer.lm_head is None:
        found[model.config.hidden_size, model.config.vocab_size] += 1
    return Counter({shape: count for shape, count in found.items() if min(shape) > CLASSES})


def _products(rows: int, inputs: int, outputs: int, *, weight_trains: bool) -> Iterator[Sequence[Callable[[], Any]]]:
    """Each product of a layer, in all the ways to compute it."""
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    pairs = [(x, weight), (grad, weight.t())] + ([(grad.t(), x.t())] if weight_trains else [])
    for left, right in pairs:
        yield [lambda a=left, b=right: linear(a, b), lambda a=left, b=right: F.linear(a, b)]  # type: ignore[misc]


@torch.inference_mode()
def _fastest(ways: Sequence[Callable[[], Any]], rounds: int) -> float:
    """A limit is what the machine can do when left alone."""
    least = float("inf")
    for way in ways:
        for _ in range(rounds):
            start = time.perf_counter()
            way()
            least = min(least, time.perf_counter() - start)
    return least
