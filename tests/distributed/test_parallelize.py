"""What a process holds of a model that is spread, and what is refused."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.core.hooks import Hook
from swissarmy.testing import run_distributed, tiny_model
from swissarmy.training.parallel.mesh import ParallelOptions, make_mesh, shared_mesh
from swissarmy.training.parallel.parallelize import parallelize
from swissarmy.training.parallel.shared_samples import plain_tensors_are_whole, share_samples
from tests.distributed.cases import Case, batch_of, make

TENSOR = ParallelOptions(tensor_parallel=2)
CONTEXT = ParallelOptions(context_parallel=2)


def spread(case: Case, options: ParallelOptions, **more: Any) -> Model:
    model = make(case)
    parallelize(model, options, make_mesh(options, "cpu"), **more)
    return model


def local_size(tensor: Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


class Spy(sat.BaseMixin):
    """Looks at the residual stream between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    @sat.non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        self.seen.append(hidden_states)
        result: Tensor = old_impl(hidden_states, mask, **kw_args)
        return result


def each_process_holds_half(rank: int) -> None:
    for options in (ParallelOptions(shard=2), TENSOR):
        model, whole = spread(Case("llama", ("prefix",)), options), make(Case("llama", ("prefix",)))
        own = sum(map(local_size, model.parameters()))
        assert own < 0.55 * sum(each.numel() for each in whole.parameters())
        for name, parameter in whole.named_parameters():
            assert torch.equal(model.get_parameter(name).full_tensor(), parameter), name
            storage = model.get_parameter(name).to_local().untyped_storage().nbytes()
            assert storage <= parameter.numel() * 8, f"{name}: a piece keeps the whole in memory"


def shared_parameters_stay_shared(rank: int) -> None:
    for options in (ParallelOptions(shard=2), TENSOR):
        model = spread(Case("t5"), options)
        encoder, decoder = (model.parts[name].transformer.word_embeddings for name in ("encoder", "decoder"))
        assert encoder.weight is decoder.weight
        assert encoder.weight.shape == (64, 32)


def layers_are_units(rank: int) -> None:
    """A layer's parameters, a mixin's of that layer among them, come and go together; nothing else calls FSDP2."""
    model = spread(Case("gpt2", ("prefix", "lora")), ParallelOptions(shard=2))
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", "transformer.layers.0", "transformer.layers.1"]
    assert not any(hasattr(layer, "held") for layer in model.transformer.layers)
    batch = batch_of(model, 0)
    sizes: list[int] = []
    handle = model.transformer.layers[1].register_forward_pre_hook(
        lambda *_: sizes.extend(local_size(model.mixins["prefix"].layers[i].key) for i in (0, 1))
    )
    model(batch["input_ids"])
    handle.remove()
    whole = model.mixins["prefix"].layers[0].key.numel()
    assert sizes == [whole // 2, whole], "layer 0 has let its prefix go, layer 1 has gathered its own"


def names_are_as_before(rank: int) -> None:
    case = Case("bert", ("prefix", "lora"))
    for options in (ParallelOptions(shard=2), TENSOR):
        model = spread(case, options, activation_checkpointing="full")
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in make(case).named_parameters()]
        assert list(model.state_dict()) == list(make(case).state_dict())


def marks_stay(rank: int) -> None:
    for options in (ParallelOptions(shard=2), TENSOR):
        model = make(Case("gpt2", ("lora",)))
        model.get_parameter("transformer.final_norm.weight").no_weight_decay = True
        parallelize(model, options, make_mesh(options, "cpu"))
        assert model.get_parameter("mixins.lora.layers.0.attention_query.lora_B").lr_scale == 2.0
        assert model.get_parameter("transformer.final_norm.weight").no_weight_decay is True
        assert not hasattr(model.get_parameter("transformer.final_norm.bias"), "no_weight_decay")


def the_stream_is_shared_by_positions(rank: int) -> None:
    for sequence_parallel in (False, True):
        options = ParallelOptions(tensor_parallel=2, sequence_parallel=sequence_parallel)
        model = make(Case("gpt2")).add_mixin("spy", Spy())
        parallelize(model, options, make_mesh(options, "cpu"))
        with plain_tensors_are_whole(), torch.no_grad():
            model(torch.arange(22).view(2, 11))
        seen = model.get_mixin("spy").seen
        assert [each.placements == (Shard(1),) for each in seen] == [sequence_parallel] * 2
        assert [each.to_local().shape[1] for each in seen] == [(6 - rank if sequence_parallel else 11)] * 2


def kept_for_the_backward_pass(model: Model, length: int) -> int:
    """Bytes of what the backward pass needs, parameters left out."""
    own = {each.to_local().untyped_storage()._cdata for each in model.parameters() if isinstance(each, DTensor)}
    own |= {each.untyped_storage()._cdata for each in model.parameters() if not isinstance(each, DTensor)}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found[local.untyped_storage()._cdata] = local
        return tensor

    ids = torch.arange(2 * length).view(2, length) % 40
    with plain_tensors_are_whole(), saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, targets=ids)[0].total.backward()
    return sum(each.untyped_storage().nbytes() for storage, each in found.items() if storage not in own)


def context_parallelism_keeps_about_half(rank: int) -> None:
    for family in ("gpt2", "llama"):
        case = Case(family, changes={"hidden_size": 64} if family == "llama" else {"n_embd": 64})
        alone, shared = make(case), make(case)
        share_positions_alone(shared)
        assert kept_for_the_backward_pass(shared, 32) < 0.65 * kept_for_the_backward_pass(alone, 32)


def share_positions_alone(model: Model) -> None:
    """Context parallelism without FSDP2, whose gathered parameters would be counted as kept."""
    mesh = shared_mesh(make_mesh(CONTEXT, "cpu"), CONTEXT)
    assert mesh is not None
    share_samples(model, mesh, sequence_parallel=False, shard_vocabulary=True)


def masks_of_positions_are_shared(rank: int) -> None:
    """Each kind of mask and of head, at lengths that processes share evenly and unevenly, down to two."""
    documents = sat.Documents(torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, 7))
    padding = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    by_head = torch.rand(1, 4, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    calls: list[dict[str, Any]] = [
        {},
        {"attention_mask": None},
        {"attention_mask": sat.SlidingWindow(3)},
        {"attention_mask": sat.PrefixLM(torch.tensor([3, 1]))},
        {"attention_mask": documents & sat.Causal()},
        {"attention_mask": by_head | torch.eye(7, dtype=torch.bool)},
        {"padding_mask": padding},
        {"logits_to_keep": 1},
        {"logits_to_keep": 2},
    ]
    calls = [{"input_ids": torch.arange(14).view(2, 7), **call} for call in calls]
    calls += [{"input_ids": torch.arange(2 * length).view(2, length)} for length in (2, 3, 8)]
    for mixins in ((), ("prefix",)):
        alone, shared = make(Case("gpt2", mixins)), spread(Case("gpt2", mixins), CONTEXT)
        for call in calls:
            with plain_tensors_are_whole():
                torch.testing.assert_close(
                    shared(**call)[0], alone(**call)[0], msg=lambda text, call=call: f"{call} {text}"
                )


def what_positions_cannot_do_is_refused(rank: int) -> None:
    model = make(Case("gpt2")).add_mixin("cache", sat.CachedAutoRegressiveMixin())
    parallelize(model, CONTEXT, make_mesh(CONTEXT, "cpu"))
    with plain_tensors_are_whole(), pytest.raises(sat.SwissArmyError, match=r"1 positions.*context_parallel=2.*pad"):
        model(torch.arange(2).view(2, 1))
    with plain_tensors_are_whole(), pytest.raises(sat.SwissArmyError, match=r"context_parallel.*leave `mems` out"):
        model(torch.arange(8).view(2, 4), mems=sat.KVCache(2))


def callers_give_and_get_plain_tensors(rank: int) -> None:
    model = make(Case("gpt2"))
    model.add_mixin("states", sat.HiddenStatesMixin())
    alone = model(torch.arange(8).view(2, 4))
    parallelize(model, TENSOR, make_mesh(TENSOR, "cpu"))
    with plain_tensors_are_whole(), plain_tensors_are_whole():
        logits, *layers = model(torch.arange(8).view(2, 4))
        assert type(logits) is Tensor
        assert type(layers[1]["hidden_states"]) is Tensor
        torch.testing.assert_close(logits, alone[0])
        torch.testing.assert_close(layers[1], alone[2])
    with pytest.raises(sat.SwissArmyError, match=r"plain_tensors_are_whole\(\)"):
        model(torch.arange(8).view(2, 4))


def the_mixin_shows_in_explain(rank: int) -> None:
    model = spread(Case("gpt2"), TENSOR)
    assert "tensor-parallel" in model.explain()


def masks_by_head_are_shared_too(rank: int) -> None:
    model = make(Case("gpt2"))
    mask = torch.rand(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    mask |= torch.eye(6, dtype=torch.bool)
    ids = torch.arange(12).view(2, 6)
    alone = model(ids, attention_mask=mask)[0]
    parallelize(model, TENSOR, make_mesh(TENSOR, "cpu"))
    with plain_tensors_are_whole():
        torch.testing.assert_close(model(ids, attention_mask=mask)[0], alone)


def processes_draw_dropout_together(rank: int) -> None:
    """Each process is given the same seed; what is whole on each must be dropped alike."""
    options = ParallelOptions(tensor_parallel=2, sequence_parallel=True)
    for plan, length in ((TENSOR, 5), (options, 6), (CONTEXT, 6)):
        model = make(Case("gpt2", ("lora",), changes={"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}))
        parallelize(model, plan, make_mesh(plan, "cpu"))
        torch.manual_seed(0)
        with plain_tensors_are_whole():
            for _ in range(2):
                model(torch.arange(2 * length).view(2, length))[0].square().sum().backward()
        own = torch.cat([torch.rand(1).double(), model.get_parameter("transformer.final_norm.bias").grad.to_local()])
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own)
        assert torch.equal(*both)
    with plain_tensors_are_whole(), pytest.raises(sat.SwissArmyError, match=r"5 positions.*2 processes.*dropout"):
        model(torch.arange(10).view(2, 5))


def what_cannot_be_spread_is_refused(rank: int) -> None:
    model = tiny_model("gpt2")
    model.add_mixin("reduced", sat.ReducedWeightsMixin.for_model(model, kind="int8"))
    with pytest.raises(sat.SwissArmyError, match=r"mixins\.reduced: reduced weights.*`quantize`"):
        parallelize(model, TENSOR, make_mesh(TENSOR, "cpu"))
    model = tiny_model("gpt2")
    model.transformer.scalar = nn.Parameter(torch.zeros(()))
    with pytest.raises(sat.SwissArmyError, match=r"transformer\.scalar is a single number.*shape \[1\]"):
        parallelize(model, TENSOR, make_mesh(TENSOR, "cpu"))
    with pytest.raises(sat.SwissArmyError, match="number of processes, 2"):
        make_mesh(ParallelOptions(shard=4), "cpu")


CHECKS = (
    each_process_holds_half,
    shared_parameters_stay_shared,
    layers_are_units,
    names_are_as_before,
    marks_stay,
    the_stream_is_shared_by_positions,
    context_parallelism_keeps_about_half,
    masks_of_positions_are_shared,
    what_positions_cannot_do_is_refused,
    callers_give_and_get_plain_tensors,
    the_mixin_shows_in_explain,
    masks_by_head_are_shared_too,
    processes_draw_dropout_together,
    what_cannot_be_spread_is_refused,
)


def run_checks(rank: int, world_size: int) -> list[str]:
    warnings.simplefilter("error")
    for check in CHECKS:
        check(rank)
        dist.barrier()
    return [check.__name__ for check in CHECKS]


def test_a_spread_model() -> None:
    """One start of two processes for all checks; an error carries the name of the check that raised it."""
    assert run_distributed(run_checks, 2) == [[check.__name__ for check in CHECKS]] * 2


def test_a_process_alone_is_left_as_it_is() -> None:
    model = make(Case("gpt2"))
    parallelize(model, ParallelOptions(), None, activation_checkpointing="selective", checkpoint_every_layers=2)
    assert (model.checkpoint_every, model.checkpoint_selective) == (2, True)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
