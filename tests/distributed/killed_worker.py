"""What `torchrun` starts in `test_survival.py`: sharded steps, in the midst of which rank 1 is killed."""

import os
import signal
from datetime import timedelta

import torch.distributed as dist

from swissarmy.training.parallel.mesh import ParallelOptions, make_mesh
from swissarmy.training.parallel.parallelize import parallelize
from tests.distributed.cases import Case, batch_of, make

OPTIONS = ParallelOptions(shard=2, distributed_timeout=30.0)


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=OPTIONS.distributed_timeout))
    model = make(Case("gpt2"))
    parallelize(model, OPTIONS, make_mesh(OPTIONS, "cpu"))
    for step in range(1000):
        batch = batch_of(model, step)
        model(batch["input_ids"])[0].sum().backward()
        if step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
