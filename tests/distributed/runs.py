"""Whole runs of `sat.train`, alone and spread over processes, and what only shows in a model that is spread.

Used by `test_runs.py`; what takes a rank runs inside the processes of `run_distributed`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.core.errors import HookCallError
from swissarmy.mixins.lora import LoRAMixin
from swissarmy.nn.attention import attention
from swissarmy.nn.masks import Full
from swissarmy.testing import tiny_model
from swissarmy.training.callbacks.base import Callback, Run, StepReport
from swissarmy.training.parallel.mesh import ParallelOptions, make_mesh
from swissarmy.training.parallel.parallelize import Checkpointing, parallelize
from swissarmy.training.parallel.shared_samples import plain_tensors_are_whole
from swissarmy.training.steps import STEPS
from tests.training.tiny_runs import Diary, model_of, run

VOCABULARY: Final = 64
LENGTH: Final = 4
BROKEN_OFF: Final = 2
IDS: Final = torch.arange(16).view(2, 8)
TENSOR: Final = ParallelOptions(tensor_parallel=2)


@dataclass(frozen=True)
class Setting:
    """A run: how it is spread, and whether all of the model trains or adapters alone."""

    options: Mapping[str, Any] = field(default_factory=dict)
    adapters: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run says and leaves."""

    losses: Tensor
    """Of its steps."""
    norms: Tensor
    """Of their gradients."""
    evaluations: Tensor
    logits: Tensor
    """Of its `final/`."""
    saved: frozenset[str]
    """The names of what its last checkpoint holds, whole or in pieces."""


class BreakOff(Callback):
    """Ends a run early."""

    def on_step(self, run: Run, report: StepReport) -> None:
        if report.step == BROKEN_OFF:
            run.stop("the test wants it")


def outcomes(rank: int, world_size: int, folder: Path, settings: Sequence[Setting]) -> list[Outcome]:
    """Run each setting, in a folder of its own."""
    torch.set_num_threads(1)
    return [outcome(folder / f"{world_size}-{number}", each) for number, each in enumerate(settings)]


def outcome(folder: Path, setting: Setting, *, broken_off: bool = False) -> Outcome:
    """Four steps with evaluations and checkpoints, from wherever the folder stands."""
    diary = Diary()
    run(
        folder,
        model=model(adapters=setting.adapters),
        forward_step=STEPS["causal_lm"],
        callbacks=[diary, BreakOff()] if broken_off else [diary],
        valid_data=("rows:13",),
        train_iters=LENGTH,
        eval_interval=2,
        save_interval=2,
        resume="auto",
        **setting.options,
    )
    if dist.is_initialized():
        dist.barrier()  # the first rank has written `final/`
    last = folder / "checkpoints" / f"step-{BROKEN_OFF if broken_off else LENGTH:08d}"
    return Outcome(
        losses=torch.tensor([report.loss for report in diary.reports], dtype=torch.float64),
        norms=torch.tensor([report.grad_norm for report in diary.reports], dtype=torch.float64),
        evaluations=torch.tensor([each.loss for each in diary.evaluations], dtype=torch.float64),
        logits=sat.load(folder / "final").double()(IDS)[0].detach(),
        saved=frozenset(name for file in last.rglob("*.safetensors") for name in _names_in(file)),
    )


def _names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return [name.partition("@")[0] for name in tensors.keys()]  # noqa: SIM118 - it is no mapping


def model(*, adapters: bool = False, **changes: Any) -> Model:
    """A tiny GPT-2 in float64, whose vocabulary two processes can share."""
    made = model_of(vocab_size=VOCABULARY, **changes)
    if adapters:
        torch.manual_seed(3)
        made.add_mixin("lora", LoRAMixin.for_model(made, r=2).double()).freeze_except("mixins.lora")
    return made


def differences(one: Outcome, other: Outcome) -> list[float]:
    """The largest ones; a run that was resumed has fewer steps and evaluations than the other."""
    pairs = (
        (each.flatten()[-min(each.numel(), its.numel()) :], its.flatten()[-min(each.numel(), its.numel()) :])
        for each, its in (
            (one.losses, other.losses),
            (one.norms, other.norms),
            (one.evaluations, other.evaluations),
            (one.logits, other.logits),
        )
    )
    return [float((each - its).abs().max()) for each, its in pairs]


# What only shows in a model whose products are shared


def perplexities(family: str) -> list[tuple[float, float]]:
    """Alone and shared: of whole texts, with a stride, and with ids that are ruled out."""
    alone, shared = (tiny_model(family, vocab_size=VOCABULARY).double() for _ in range(2))
    parallelize(shared, TENSOR, make_mesh(TENSOR, "cpu"))
    ways: list[dict[str, Any]] = [{}, {"stride": 4}, {"invalid_slices": [slice(40, VOCABULARY)]}]
    with plain_tensors_are_whole():
        return [tuple(sat.evaluate_perplexity(each, IDS, **way).nll for each in (alone, shared)) for way in ways]  # type: ignore[misc]


def complaint(shared_vocabulary: bool, ids: Sequence[int]) -> str:
    """What a shared model says to ids that its table does not have."""
    shared, options = model(), TENSOR.replace(shard_vocabulary=shared_vocabulary)
    parallelize(shared, options, make_mesh(options, "cpu"))
    try:
        with plain_tensors_are_whole():
            shared(torch.tensor([ids]))
    except HookCallError as error:
        return str(error)
    return "nothing"


def attended() -> tuple[Tensor, Tensor]:
    """Which probabilities dropout leaves of each head, all heads alike before; and what is drawn next."""
    mesh = make_mesh(TENSOR, "cpu")["tensor"]
    q, v = torch.zeros(1, 4, 16, 16), torch.eye(16).expand(1, 4, 16, 16).contiguous()
    torch.manual_seed(1)
    spread = [distribute_tensor(each, mesh, (Shard(1),)) for each in (q, q, v)]
    left: Any = attention(*spread, Full(), torch.nn.Dropout(0.5))
    return left.full_tensor()[0] > 0, torch.rand(1)


def with_dropout(checkpointing: Checkpointing) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a gradient, and what is drawn next, of a shared model with dropout everywhere."""
    shared = model(attn_pdrop=0.5, resid_pdrop=0.3).train()
    parallelize(shared, TENSOR, make_mesh(TENSOR, "cpu"), activation_checkpointing=checkpointing)
    torch.manual_seed(5)
    with plain_tensors_are_whole():
        logits: Tensor = shared(IDS)[0]
        logits.pow(2).sum().backward()
    gradient: Any = shared.transformer.layers[0].attention.query.weight.grad
    return logits.detach(), gradient.full_tensor(), torch.rand(1)


def everything(rank: int, world_size: int, folder: Path, settings: Sequence[Setting]) -> dict[str, Any]:
    """All of the above, for one start of processes."""
    checkpointing: tuple[Checkpointing, ...] = ("none", "full", "selective")
    return {
        "outcomes": outcomes(rank, world_size, folder, settings),
        "perplexities": [pair for family in ("gpt2", "llama") for pair in perplexities(family)],
        "complaints": [complaint(is_shared, ids) for is_shared in (True, False) for ids in ((1, 64), (-1, 1))],
        "attended": attended(),
        "dropout": [with_dropout(each) for each in checkpointing],
    }
