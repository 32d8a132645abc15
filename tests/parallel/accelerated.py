"""Run by `accelerate launch`: two steps of training on shards of one sequence, beside the same in one process; by hand
and by transformers' Trainer."""

import copy
import sys
import tempfile

import torch
from accelerate import Accelerator
from switch_cases import batch_of, ours
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from manyheads.parallel import sequence_parallel

RATE = 0.5


def steps(model, optimizer, losses) -> list[float]:
    found = []
    for loss in losses:
        optimizer.zero_grad()
        found.append(loss())
        optimizer.step()
    return found


def alone_on(alone, batches) -> list[float]:
    def plain(batch):
        loss = alone(**batch).loss
        loss.backward()
        return float(loss.detach())

    return steps(alone, torch.optim.SGD(alone.parameters(), RATE), [lambda b=b: plain(b) for b in batches])


def by_hand(accelerator: Accelerator, model, batches) -> list[float]:
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), RATE))
    with sequence_parallel(accelerator.unwrap_model(prepared)) as spread:

        def shared(batch):
            loss = prepared(**spread.shard(batch)).loss
            # DistributedDataParallel takes the mean of gradients, of which the sum is wanted.
            accelerator.backward(loss * accelerator.num_processes)
            return float(spread.total(loss))

        return steps(prepared, optimizer, [lambda b=b: shared(b) for b in batches])


class Undealt(Trainer):
    """All processes read the same rows."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, 2, collate_fn=self.data_collator)


def by_trainer(model, batches) -> None:
    """Rows of one length, whose last shards are padded."""
    rows = [{key: value[row] for key, value in batch.items()} for batch in batches for row in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as folder, sequence_parallel(model) as spread:

        def collate(examples):
            return spread.shard({key: torch.stack([row[key] for row in examples]) for key in examples[0]}, even=True)

        told = TrainingArguments(
            folder, use_cpu=True, num_train_epochs=1, max_grad_norm=0.0, save_strategy="no", report_to=[],
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        Undealt(model, told, collate, rows, optimizers=(optimizer, schedule)).train()


def gap(model, alone) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def main() -> int:
    accelerator = Accelerator(cpu=True)
    size = accelerator.num_processes
    first = ours("softmax", "lightning").train()
    model, alone = copy.deepcopy(first), copy.deepcopy(first)
    batches = [batch_of(17, padded="left"), batch_of(23)]
    wanted, found = alone_on(alone, batches), by_hand(accelerator, model, batches)
    print(f"{size} processes, {found} and {wanted}, weights within {gap(model, alone):.1e}", flush=True)
    right = gap(model, alone) < 1e-6 and all(abs(a - b) < 1e-6 for a, b in zip(found, wanted, strict=True))

    trained, alone = copy.deepcopy(first), copy.deepcopy(first)
    batches = [batch_of(17, padded="left"), batch_of(17, padded="right")]
    alone_on(alone, batches)
    by_trainer(trained, batches)
    print(f"by Trainer: weights within {gap(trained, alone):.1e}, moved by {gap(trained, first):.1e}", flush=True)
    right = right and gap(trained, alone) < 1e-6 < gap(trained, first)
    return 0 if right and size == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
