"""One small training run, alone and spread over processes: what it computes on the way must be the same.

Used by `test_equality.py`; everything here runs inside the processes of `run_distributed`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.core.hooks import Hook
from swissarmy.testing import tiny_inputs, tiny_model
from swissarmy.training.parallel.mesh import ParallelOptions, make_mesh
from swissarmy.training.parallel.parallelize import Checkpointing, parallelize
from swissarmy.training.parallel.shared_samples import plain_tensors_are_whole

FAMILIES = ("gpt2", "bert", "t5", "vit", "llama")
STEPS, BATCH = 5, 4
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Plan:
    """How a run is spread."""

    options: Mapping[str, Any]
    checkpointing: Checkpointing = "none"
    accumulation: int = 1
    compiled: bool = False
    """Whether layers are compiled, as far as autograd's graphs: the code made of them is another matter, and slow."""


@dataclass(frozen=True)
class Case:
    """What is trained."""

    family: str
    mixins: tuple[str, ...] = ()
    frozen: bool = False
    """Whether only the mixins train."""
    targets: bool = False
    """Whether the model is given the targets, and makes no logits."""
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What a run computed: the loss of each step, and logits and gradients of the last one."""

    losses: Tensor
    logits: Tensor
    gradients: Mapping[str, Tensor]


class TalkingHeads(sat.BaseMixin):
    """A user's attention (Shazeer et al. 2020), written without a thought of parallelism: heads are mixed."""

    def __init__(self, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(num_heads, num_heads, bias=False) for _ in range(num_layers))

    @classmethod
    def for_config(cls, config: Any, **options: Any) -> "TalkingHeads":
        return cls(config.num_layers, config.num_attention_heads, **options)

    def attention_fn(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_fn: Any, cross_attention: bool = False, **kw: Any
    ) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        scores = self.layers[kw["layer_id"]](scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = ~mask.dense(q.shape[2], k.shape[2], q.device)
        return dropout_fn(scores.masked_fill(hidden, -1e9).softmax(dim=-1)) @ v


class Gate(sat.BaseMixin):
    """A user's wrapper: a trained factor on what each MLP gives, from one vector for all layers."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(-1.0, 1.0, hidden_size))

    @classmethod
    def for_config(cls, config: Any, **options: Any) -> "Gate":
        return cls(config.hidden_size, **options)

    @sat.non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        changed: Tensor = old_impl(hidden_states, **kw_args) * torch.tanh(self.gate)
        return changed


class Router(sat.BaseMixin):
    """A user's choice of experts, in the model's precision: the stock one's is float32, and so exact to 1e-8 only."""

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_size, 3, bias=False) for _ in range(num_layers))

    @classmethod
    def for_config(cls, config: Any, **options: Any) -> "Router":
        return cls(config.num_layers, config.hidden_size, **options)

    def routing_forward(self, hidden_states: Tensor, **kw_args: Any) -> tuple[Tensor, Tensor]:
        weights, expert_ids = self.layers[kw_args["layer_id"]](hidden_states).softmax(dim=-1).topk(2, dim=-1)
        return weights / weights.sum(-1, keepdim=True), expert_ids


def make(case: Case) -> Model:
    """The model of a case, in float64, with weights that show."""
    changes = {"vocab_size": 64, "pad_token_id": 3} if case.family != "vit" else {}
    model = tiny_model(case.family, scale=2.0, **changes, **case.changes).double().train()
    kinds = {
        "prefix": lambda: sat.PrefixTuningMixin.for_model(model, prefix_len=3),
        "lora": lambda: sat.LoRAMixin.for_model(model, targets=("attention.*", "mlp.*"), lr_ratio=2.0),
        "talking-heads": lambda: TalkingHeads.for_model(model),
        "gate": lambda: Gate.for_model(model),
        "router": lambda: Router.for_model(model),
        "experts": lambda: sat.MixtureOfExpertsMixin.for_model(model, num_experts=3),
    }
    for name in case.mixins:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.add_mixin(name, kinds[name]())
            for parameter_name, parameter in model.named_parameters():
                if f"mixins.{name}." in parameter_name:
                    nn.init.normal_(parameter, std=0.1)
    return model.freeze_except("mixins.*") if case.frozen else model


def batch_of(model: Model, step: int) -> dict[str, Tensor]:
    """The inputs of a step, with padding tokens among them, and `labels`, one for each row of logits."""
    inputs = tiny_inputs(model, batch=BATCH, seed=step)
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(5, (BATCH,) if tokens is None else tuple(tokens.shape), generator=generator)
    return {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()} | {"labels": labels}


def train(case: Case, model: Model, rank: int = 0, ranks: int = 1, accumulation: int = 1) -> Record:
    """Take the steps, on one of `ranks` shares of each batch.

    The optimizer is linear in the gradients: what they have of rounding stays what it is.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = batch_of(model, step)
        share = {name: x.chunk(ranks)[rank] for name, x in batch.items()}
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(accumulation):
            inputs = {name: x.chunk(accumulation)[micro] for name, x in share.items()}
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(micro == accumulation - 1)
            labels = inputs.pop("labels")
            loss = _loss(case, model, inputs, labels)
            loss.backward()
            total += loss.detach()
        losses.append(total)
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        for gradient in gradients.values():
            gradient.div_(batch["labels"].numel())
        optimizer.step()
    with torch.no_grad():
        logits = model(**{name: x for name, x in share.items() if name != "labels"})[0]
    return Record(torch.stack(losses), logits, {name: _whole(each) for name, each in gradients.items()})


def _loss(case: Case, model: Model, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The sum of the losses of all rows."""
    if case.targets:
        total: Tensor = model(**inputs, targets=labels)[0].total
        return total
    return F.cross_entropy(model(**inputs)[0].flatten(0, -2), labels.flatten(), reduction="sum")


def compare(rank: int, world_size: int, plans: Sequence[Plan], cases: Sequence[Case]) -> list[str]:
    """Run each case alone and by each plan, in this process's place; what differs, a line each."""
    problems = []
    for case in cases:
        alone = train(case, make(case))
        for plan in plans:
            spread = _spread(rank, world_size, plan, case)
            problems += [f"{case} by {plan}: {problem}" for problem in _differences(alone, spread, rank)]
    return problems


def _spread(rank: int, world_size: int, plan: Plan, case: Case) -> Record:
    options = ParallelOptions(**plan.options)
    model = make(case)
    marks = {name: getattr(parameter, "lr_scale", None) for name, parameter in model.named_parameters()}
    parallelize(model, options, make_mesh(options, "cpu"), activation_checkpointing=plan.checkpointing)
    assert {name: getattr(each, "lr_scale", None) for name, each in model.named_parameters()} == marks
    if plan.compiled:
        torch._dynamo.reset()
        model.compile(dynamic=None, backend="aot_eager")
    ranks = options.data_size(world_size) * options.shard
    with plain_tensors_are_whole():
        own = train(case, model, rank // options.sharing_size, ranks, plan.accumulation)
    losses = own.losses if rank % options.sharing_size == 0 else torch.zeros_like(own.losses)
    dist.all_reduce(losses)
    return Record(losses, own.logits, own.gradients)


def _differences(alone: Record, spread: Record, rank: int) -> list[str]:
    if alone.gradients.keys() != spread.gradients.keys():
        return [f"gradients of {sorted(alone.gradients.keys() ^ spread.gradients.keys())}"]
    size = max(float(gradient.abs().max()) for gradient in alone.gradients.values())
    rows = len(spread.logits)
    distances = {
        "losses": float(((spread.losses - alone.losses) / alone.losses).abs().max()),
        "logits": min(float((spread.logits - part).abs().max()) for part in alone.logits.split(rows)),
        **{
            f"gradient of {name}": float((spread.gradients[name] - gradient).abs().max()) / size
            for name, gradient in alone.gradients.items()
        },
    }
    return [f"rank {rank}, {what}: {far:.1e}" for what, far in distances.items() if not far <= TOLERANCE]


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
