"""What the hooks cost: GPT-2 (124M) from the library beside the same network written by hand, in one process.

    python benchmarks/hook_overhead.py [--rounds 15] [--only decode] [--compile]

Forward and training step on 2 x 128 tokens, decoding 32 tokens after a prompt of 32; the same weights on both sides,
which must give the same logits. The ratio is the median of the ratios within each round; 1.00 is a hook that is free.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from handwritten_gpt2 import HandwrittenGPT2
from measure import alternate, describe_machine, print_table
from torch import Tensor, nn

import swissarmy as sat

VOCAB, LENGTH, HIDDEN, LAYERS, HEADS = 50257, 1024, 768, 12, 12


def build() -> tuple[sat.BaseModel, HandwrittenGPT2]:
    """Both networks, with the same weights."""
    torch.manual_seed(0)
    config = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    library = sat.AutoModel.from_config(config)
    library.add_mixin("auto-regressive", sat.CachedAutoRegressiveMixin())
    assert isinstance(library, sat.BaseModel)
    by_hand = HandwrittenGPT2(VOCAB, LENGTH, HIDDEN, LAYERS, HEADS)
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
    return library, by_hand


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


def training_step(network: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], ids: Tensor) -> None:
    """Forward, loss, backward; the optimiser is the same for both and left out."""
    for parameter in parameters:
        parameter.grad = None
    logits = network(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile both with fullgraph=True (no decoding)")
    parser.add_argument("--only", default="", help="the start of a table's title: forward, training or decode")
    options = parser.parse_args()
    library, by_hand = build()
    ids, prompt = torch.randint(0, VOCAB, (2, 128)), torch.randint(0, VOCAB, (1, 32))
    torch.testing.assert_close(library(ids)[0], by_hand(ids))
    torch.testing.assert_close(decode_library(library, prompt, 4), decode_by_hand(by_hand, prompt, 4))
    print(describe_machine())

    first, second = library, by_hand
    if options.compile:
        first, second = torch.compile(library, fullgraph=True), torch.compile(by_hand, fullgraph=True)
    parameters = {"library": list(library.parameters()), "by hand": list(by_hand.parameters())}

    def forward(network: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                network(ids)

        return run

    runs: dict[str, dict[str, Callable[[], object]]] = {
        "forward, 2 x 128 tokens": {"library": forward(first), "by hand": forward(second)},
        "training step, 2 x 128 tokens": {
            "library": lambda: training_step(lambda x: first(x)[0], parameters["library"], ids),
            "by hand": lambda: training_step(second, parameters["by hand"], ids),
        },
        "decode, 32 + 32 tokens": {
            "library": lambda: decode_library(library, prompt, 32),
            "by hand": lambda: decode_by_hand(by_hand, prompt, 32),
        },
    }
    for title, candidates in runs.items():
        if title.startswith(options.only) and not (options.compile and title.startswith("decode")):
            print_table(title, alternate(candidates, rounds=options.rounds), baseline="by hand")


if __name__ == "__main__":
    main()
