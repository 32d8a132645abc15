"""Run by `accelerate launch`: two steps of training on shards of one sequence, beside the same in one process."""

import copy
import sys

import torch
from accelerate import Accelerator
from switch_cases import batch_of, ours

from manyheads.parallel import sequence_parallel


def steps(model, optimizer, losses) -> list[float]:
    found = []
    for loss in losses:
        optimizer.zero_grad()
        found.append(loss())
        optimizer.step()
    return found


def main() -> int:
    accelerator = Accelerator(cpu=True)
    alone = ours("softmax", "lightning").train()
    model = copy.deepcopy(alone)
    batches = [batch_of(17, padded="left"), batch_of(23)]

    def plain(batch):
        loss = alone(**batch).loss
        loss.backward()
        return float(loss.detach())

    wanted = steps(alone, torch.optim.SGD(alone.parameters(), 0.5), [lambda b=b: plain(b) for b in batches])
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.5))
    with sequence_parallel(accelerator.unwrap_model(prepared)) as spread:

        def shared(batch):
            loss = prepared(**spread.shard(batch)).loss
            # DistributedDataParallel takes the mean of gradients, of which the sum is wanted.
            accelerator.backward(loss * accelerator.num_processes)
            return float(spread.total(loss))

        found = steps(prepared, optimizer, [lambda b=b: shared(b) for b in batches])
    gap = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    print(f"{accelerator.num_processes} processes, {found} and {wanted}, weights within {gap:.1e}", flush=True)
    right = gap < 1e-6 and all(abs(a - b) < 1e-6 for a, b in zip(found, wanted, strict=True))
    return 0 if right and accelerator.num_processes == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
