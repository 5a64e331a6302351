"""What the hooks cost: GPT-2 (124M) from the library beside the same network written by hand, in one process.

    python benchmarks/hook_overhead.py [--rounds 15] [--only decode] [--compile]

Forward and training step on 2 x 128 tokens, decoding 32 tokens after a prompt of 32; the same weights on all sides,
which must give the same logits. By hand there are two: plain PyTorch, and one that takes its products from our
`nn/linear.py`, beside which only the hooks differ. The ratio is the median of the ratios within each round; 1.00 is a
hook that is free.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from handwritten_gpt2 import HandwrittenGPT2
from measure import alternate, describe_machine, print_table, ratio
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.nn.linear import Linear, linear

VOCAB, LENGTH, HIDDEN, LAYERS, HEADS = 50257, 1024, 768, 12, 12


def build() -> tuple[sat.BaseModel, HandwrittenGPT2, HandwrittenGPT2]:
    """The library's network, and by hand in plain PyTorch and with the library's products; the same weights."""
    torch.manual_seed(0)
    config = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    library = sat.AutoModel.from_config(config)
    library.add_mixin("auto-regressive", sat.CachedAutoRegressiveMixin())
    assert isinstance(library, sat.BaseModel)
    plain = HandwrittenGPT2(VOCAB, LENGTH, HIDDEN, LAYERS, HEADS)
    same_products = HandwrittenGPT2(VOCAB, LENGTH, HIDDEN, LAYERS, HEADS, linear=Linear, product=linear)
    copy_weights(library, plain)
    same_products.load_state_dict(plain.state_dict())
    return library, plain, same_products


def copy_weights(library: sat.BaseModel, by_hand: HandwrittenGPT2) -> None:
    """Give the network by hand the library's weights."""
    names = {
        "word_embedding": "transformer.word_embeddings",
        "position_embedding": "mixins.positions.table",
        "final_norm": "transformer.final_norm",
    }
    inside = {
        "attention_norm": "attention_residual.input_norm",
        "attention": "attention",
        "mlp_norm": "mlp_residual.input_norm",
        "up": "mlp.up",
        "down": "mlp.down",
    }
    for name, module in by_hand.named_children():
        if name in names:
            module.load_state_dict(library.get_submodule(names[name]).state_dict())
    for index, layer in enumerate(by_hand.layers):
        for name, module in layer.named_children():
            source = library.get_submodule(f"transformer.layers.{index}.{inside[name]}").state_dict()
            module.load_state_dict({key: source[key] for key in module.state_dict()})


def decode_library(model: sat.BaseModel, prompt: Tensor, steps: int) -> Tensor:
    """Greedy decoding with the library's cache."""
    with torch.inference_mode():
        cache = sat.KVCache(LAYERS, capacity=prompt.shape[1] + steps)
        logits = model(prompt, mems=cache)[0]
        for _ in range(steps):
            logits = model(logits[:, -1:].argmax(-1), mems=cache)[0]
    return logits


def decode_by_hand(model: HandwrittenGPT2, prompt: Tensor, steps: int) -> Tensor:
    """The same, by hand."""
    logits, cache = model.prefill(prompt, prompt.shape[1] + steps)
    for _ in range(steps):
        logits = model.decode(logits[:, -1:].argmax(-1), cache)
    return logits


def forward(network: Callable[[Tensor], object], ids: Tensor) -> None:
    """Logits, without gradients."""
    with torch.inference_mode():
        network(ids)


def training_step(network: Callable[[Tensor], Any], parameters: list[nn.Parameter], ids: Tensor) -> None:
    """Forward, loss, backward; the optimiser is the same for all and left out."""
    for parameter in parameters:
        parameter.grad = None
    result = network(ids)
    logits = result[0] if isinstance(result, tuple) else result
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile both with fullgraph=True (no decoding)")
    parser.add_argument("--only", default="", help="the start of a table's title: forward, training or decode")
    options = parser.parse_args()
    library, *by_hand = build()
    ids, prompt = torch.randint(0, VOCAB, (2, 128)), torch.randint(0, VOCAB, (1, 32))
    for network in by_hand:
        torch.testing.assert_close(library(ids)[0], network(ids), rtol=1e-4, atol=1e-4)
        decoded = decode_library(library, prompt, 4), decode_by_hand(network, prompt, 4)
        torch.testing.assert_close(*decoded, rtol=1e-4, atol=1e-4)
    print(describe_machine())

    networks: dict[str, nn.Module] = dict(
        zip(("library", "by hand", "by hand, our products"), (library, *by_hand), strict=True)
    )
    called = {
        name: torch.compile(network, fullgraph=True) if options.compile else network
        for name, network in networks.items()
    }
    runs: dict[str, dict[str, Callable[[], object]]] = {
        "forward, 2 x 128 tokens": {name: partial(forward, network, ids) for name, network in called.items()},
        "training step, 2 x 128 tokens": {
            name: partial(training_step, network, list(networks[name].parameters()), ids)
            for name, network in called.items()
        },
        "decode, 32 + 32 tokens": {
            "library": partial(decode_library, library, prompt, 32),
            "by hand": partial(decode_by_hand, by_hand[0], prompt, 32),
            "by hand, our products": partial(decode_by_hand, by_hand[1], prompt, 32),
        },
    }
    for title, candidates in runs.items():
        if title.startswith(options.only) and not (options.compile and title.startswith("decode")):
            timings = alternate(candidates, rounds=options.rounds)
            print_table(title, timings, baseline="by hand")
            print(f"the hooks alone: {ratio(timings['library'], timings['by hand, our products']):.3f}\n")


if __name__ == "__main__":
    main()
