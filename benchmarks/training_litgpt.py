"""litgpt's part of `training.py`, run by the Python of an environment that has litgpt; prints one line of JSON.

python training_litgpt.py STEPS BATCH LENGTH THREADS
"""

import json
import resource
import sys
import time

import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy


def main() -> None:
    """Train the LLaMA-like network in the manner of `litgpt pretrain`."""
    steps, batch, length, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Config(
        n_layer=12,
        n_embd=768,
        n_head=12,
        n_query_groups=4,
        intermediate_size=2048,
        padded_vocab_size=32000,
        block_size=1024,
        bias=False,
        parallel_residual=False,
        rotary_percentage=1.0,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(100, 32000, (batch, length))
    seconds = []
    first_loss = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        loss = chunked_cross_entropy(model(ids)[:, :-1], ids[:, 1:], chunk_size=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first_loss = first_loss or loss.item()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = [ids.numel()] * steps
    print(
        json.dumps({"seconds": seconds, "tokens": tokens, "waited": [], "first_loss": first_loss, "peak_bytes": peak})
    )


if __name__ == "__main__":
    main()
