"""Cross-entropy over a vocabulary that several processes share (tensor parallelism): no process sees all logits.

Three numbers a position are exchanged: the largest logit, the sum of exponentials, and the target's logit (Shoeybi et
al. 2019).
"""

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from swissarmy.nn.precision import precise
from swissarmy.nn.token_losses import LossTerms, loss_terms


def whole(x: Tensor) -> Tensor:
    """A tensor that is shared by processes as a plain one; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that are in no process's part of a table: looked up, they would give zeros.

    Raises:
        IndexError: On a CPU; an accelerator, which nobody is to wait for, fails by itself, as with a whole table.
    """
    known = ((ids >= 0) & (ids < vocabulary)).all()
    try:
        torch._assert_async(known, "an id is outside the vocabulary")  # no `if`: ids may have no values (dry runs)
    except RuntimeError as error:
        raise IndexError(str(error)) from None


def shared_loss_terms(logits: Tensor, targets: Tensor) -> LossTerms:
    """From logits `[1, n, v]`, shared by vocabulary or in another way, and targets `[n]`."""
    if isinstance(logits, DTensor) and any(isinstance(each, Shard) for each in logits.placements):
        return _shared_terms(logits.redistribute(logits.device_mesh, (Shard(2),)), targets)
    return loss_terms(whole(logits)[0], targets)


def _shared_terms(logits: DTensor, targets: Tensor) -> LossTerms:
    mesh, local = logits.device_mesh, precise(logits.to_local()[0])
    largest: Tensor = collectives.all_reduce(local.detach().amax(dim=1), "max", mesh)
    place = targets - mesh.get_local_rank() * local.shape[1]
    is_here = (place >= 0) & (place < local.shape[1])
    own = torch.where(is_here, local.gather(1, torch.where(is_here, place, 0)[:, None])[:, 0], 0.0)
    own, exponentials = _added_up(torch.stack((own, (local - largest[:, None]).exp().sum(dim=1))), mesh)
    return LossTerms(own, exponentials.log() + largest, largest)


def _added_up(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes of a mesh; each process's part gets the gradient of the whole."""
    parts = DTensor.from_local(x, mesh, (Partial(),), run_check=False)
    total: Tensor = parts.redistribute(mesh, (Replicate(),)).to_local()
    return total
