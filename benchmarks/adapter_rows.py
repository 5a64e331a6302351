"""Rows of a batch that want different LoRA adapters: one call here; beside `peft`, which switches, or mixes rows too.

    python benchmarks/adapter_rows.py [--rounds 11] [--adapters 4] [--rows 8] [--length 64]

GPT-2 (124M) with rank-8 adapters on queries, keys and values, as `peft` has them on GPT-2, the same numbers on both
sides; logits are compared before anything is timed. Forward passes only, as in serving.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import alternate, describe_machine, ratio
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import swissarmy as sat


def trained(folder: Path, count: int) -> PeftModel:
    """`peft`'s model with so many adapters that differ, each saved as a folder."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval()
    base.save_pretrained(folder / "base")
    names = [f"a{index}" for index in range(count)]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(folder / "adapters"))
    return model.eval()


def ours(folder: Path, count: int) -> sat.BaseModel:
    """The same model and adapters, as a bank."""
    model = sat.load(folder / "base")
    names = [f"a{index}" for index in range(count)]
    for name in names:
        place = folder / "adapters" / name
        sat.load_adapter(model, place, name=name)
    sat.bundle_adapters(model, *names)
    assert isinstance(model, sat.BaseModel)
    return model


@torch.inference_mode()
def one_call(model: sat.BaseModel, ids: Tensor, wanted: Tensor) -> Tensor:
    logits: Tensor = model(ids, adapter_ids=wanted)[0]
    return logits


@torch.inference_mode()
def switching(model: PeftModel, ids: Tensor, wanted: Tensor) -> Tensor:
    """Each adapter in its turn, on its rows."""
    logits = torch.empty(*ids.shape, model.config.vocab_size)
    for index in wanted.unique().tolist():
        model.set_adapter(f"a{index}")
        rows = wanted == index
        logits[rows] = model(ids[rows]).logits
    return logits


@torch.inference_mode()
def mixing(model: PeftModel, ids: Tensor, wanted: Tensor) -> Tensor:
    """`peft`'s own way to serve a mixed batch."""
    logits: Tensor = model(ids, adapter_names=[f"a{index}" for index in wanted.tolist()]).logits
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peft, model = trained(folder, options.adapters), ours(folder, options.adapters)
    ids = torch.randint(50257, (options.rows, options.length), generator=torch.Generator().manual_seed(1))
    wanted = torch.arange(options.rows) % options.adapters
    candidates: dict[str, Callable[[], Tensor]] = {
        "here, one call": partial(one_call, model, ids, wanted),
        "peft, switching": partial(switching, peft, ids, wanted),
        "peft, mixed batch": partial(mixing, peft, ids, wanted),
    }
    expected = candidates["peft, switching"]()
    for run in candidates.values():
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    timings = alternate(candidates, rounds=options.rounds)
    table = Table(title=f"{options.rows} rows of {options.length} tokens, {options.adapters} adapters")
    for column in ("", "seconds", "min", "max", "ratio to switching"):
        table.add_column(column, justify="left" if not column else "right")
    for name, timing in timings.items():
        share = ratio(timing, timings["peft, switching"])
        table.add_row(name, f"{timing.median:.3f}", f"{timing.min:.3f}", f"{timing.max:.3f}", f"{share:.2f}")
    Console().print(describe_machine(), table)


if __name__ == "__main__":
    main()
