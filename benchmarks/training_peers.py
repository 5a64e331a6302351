"""How each candidate of `training.py` trains: a function of its own, run in a process of its own."""

import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_works import Work

LEARNING_RATE: Final = 1e-4


@dataclass
class Outcome:
    """What a candidate did in one run, a value for each step."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    first_loss: float = 0.0
    peak_bytes: int = 0

    def end(self) -> None:
        """Note the most memory that this process ever had; before anything is saved."""
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def swissarmy(work: Work, folder: str, steps: int, **options: Any) -> Outcome:
    """This library: `sat.train`, with its loader and all that it does by default, but for the options."""
    import swissarmy as sat
    from swissarmy.training.callbacks.base import Callback, Run, StepReport
    from swissarmy.training.steps import causal_lm_step, classification_step, image_classification_step

    outcome = Outcome()

    class Watch(Callback):
        def on_step(self, run: Run, report: StepReport) -> None:
            outcome.seconds.append(report.seconds)
            outcome.tokens.append(report.tokens)
            outcome.waited.append(report.waited)
            outcome.first_loss = report.loss if report.step == 1 else outcome.first_loss
            if run.is_last_step:
                outcome.end()

    model: Any = sat.load(folder)
    if work.lora:
        model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=8))
    step = {"classify": classification_step, "images": image_classification_step}.get(work.task, causal_lm_step)
    samples = work.samples(model.config.vocab_size)
    if work.task == "classify":
        samples = [_encoded(sample) for sample in samples]
    with tempfile.TemporaryDirectory() as output:
        config = sat.TrainConfig(
            output=output,
            train_data=("samples",),
            train_iters=steps,
            batch_size=2 if work.task == "verses" else work.batch,
            lr=LEARNING_RATE,
            trainable=("mixins.lora",) if work.lora else (),
            **_data_options(work),
            **options,
        )
        sat.train(
            model,
            step,
            lambda path, config: samples,
            config,
            callbacks=[Watch()],
            collate=_collator(work),
        )
    return outcome


def _data_options(work: Work) -> dict[str, Any]:
    if work.task == "verses":
        return {"record_format": "tokens", "packing": True, "sequence_length": work.length}
    if work.task == "causal":
        return {"record_format": "tokens"}
    return {"record_format": "samples", "bucketing_window": 16 if work.task == "classify" else 0}


def _encoded(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A verse as the library's own encoder would give it."""
    ids = np.array(sample["input_ids"])
    return {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "labels": sample["labels"]}


def _collator(work: Work) -> Any:
    from swissarmy.data.loading.collate import ClassificationCollator, ImageCollator, Padding

    if work.task == "classify":
        return ClassificationCollator(padding=Padding(pad_id=0))
    return ImageCollator() if work.task == "images" else None


def trainer(work: Work, folder: str, steps: int, *, compile: bool = False, by_length: bool = False) -> Outcome:
    """`transformers.Trainer`, and `peft` where LoRA is asked for."""
    import transformers

    transformers.logging.set_verbosity_error()
    outcome = Outcome()

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **keywords: Any) -> None:
            self.began, seconds = time.perf_counter(), time.perf_counter() - self.began
            outcome.seconds.append(seconds)
            if state.global_step == steps:
                del outcome.tokens[steps:]  # its loader reads one batch ahead
                outcome.end()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
            if state.global_step == 1 and "loss" in logs:
                outcome.first_loss = float(logs["loss"])

    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = _padded(work, samples)
        outcome.tokens.append(int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(samples))
        return batch

    model = _network(work, folder)
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=work.batch,
            learning_rate=LEARNING_RATE,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            torch_compile=compile,
            train_sampling_strategy="group_by_length" if by_length else "random",
            remove_unused_columns=False,
        )
        samples = work.samples(model.config.vocab_size if work.task != "images" else 0)
        transformers.Trainer(
            model=model, args=arguments, train_dataset=samples, data_collator=collate, callbacks=[Watch()]
        ).train()
    return outcome


def _network(work: Work, folder: str) -> Any:
    import transformers

    kinds = {
        "classify": transformers.AutoModelForSequenceClassification,
        "images": transformers.AutoModelForImageClassification,
    }
    model = kinds.get(work.task, transformers.AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    if not work.lora:
        return model
    import peft

    # GPT-2's query, key and value are one matrix there, so the key learns too: what people get
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))


def _padded(work: Work, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """As `transformers`' own collators pad."""
    if work.task == "images":
        labels = torch.tensor([sample["labels"] for sample in samples])
        return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # never predicted, and Trainer would count it all the same
    if work.task == "classify":
        labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loop(work: Work, folder: str, steps: int) -> Outcome:
    """In the manner of nanoGPT: the network by hand, fused AdamW, clipping, one step after the other."""
    from handwritten_gpt2 import HandwrittenGPT2
    from hook_overhead import copy_weights

    import swissarmy as sat

    library: Any = sat.load(folder)
    model = HandwrittenGPT2(library.config.vocab_size, 1024, 768, 12, 12)
    copy_weights(library, model)
    ids = torch.tensor([sample["input_ids"] for sample in work.samples(library.config.vocab_size)])
    del library
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    outcome = Outcome()
    for _ in _timed_steps(outcome, steps, ids.numel()):
        logits = model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        outcome.first_loss = outcome.first_loss or loss.item()
    outcome.end()
    return outcome


def _timed_steps(outcome: Outcome, steps: int, tokens: int) -> Iterator[int]:
    for step in range(steps):
        start = time.perf_counter()
        yield step
        outcome.seconds.append(time.perf_counter() - start)
        outcome.tokens.append(tokens)


RUNNERS: Final[Mapping[str, Callable[[Work, str, int], Outcome]]] = {
    "swissarmy": swissarmy,
    "swissarmy, compiled": partial(swissarmy, compile=True),
    "swissarmy, recomputing": partial(swissarmy, activation_checkpointing="full"),
    "swissarmy, giving back": partial(swissarmy, keep_memory=False),
    "Trainer": trainer,
    "Trainer, compiled": partial(trainer, compile=True),
    "Trainer, by length": partial(trainer, by_length=True),
    "plain loop": plain_loop,
}
