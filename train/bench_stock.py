"""The stock way to tune a LLaVA, which ``mllm bench train`` measures against.

transformers' ``Trainer`` on the stock class: one question a sample, shuffled, a batch padded to its
longest, pictures read and seen by the tower in every step, logits at every token. Texts are
tokenised beforehand, to the ids that our rows hold: in a script of one's own that would cost time.

b samples of a batch, l tokens of the longest, H, W sides of a picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from train.instruction_rows import Row

_IGNORED = -100  # transformers' label of a token that is not learnt


@dataclass(frozen=True)
class StockSample:
    """One question: ``input_ids`` and ``labels`` ``(l,)``, and the number of its picture."""

    input_ids: np.ndarray
    labels: np.ndarray
    image_key: int


def stock_samples(row: Row) -> list[StockSample]:
    """Each branch of a row with the prefix before it."""
    (image_key,) = row.image_keys
    samples = []
    for branch in range(1, int(row.branch_ids.max()) + 1):
        kept = np.flatnonzero((row.branch_ids == 0) | (row.branch_ids == branch))
        labels = np.full(len(kept), _IGNORED, dtype=np.int64)
        num_prefix = int((row.branch_ids == 0).sum())
        for position, label in zip(row.label_positions, row.labels, strict=True):
            if row.branch_ids[position] == branch:
                labels[np.searchsorted(kept, position) + 1] = label
            elif position == num_prefix - 1 and row.input_ids[kept[num_prefix]] == label:
                labels[num_prefix] = label  # the prefix's end predicts the branch's first token
        samples.append(StockSample(row.input_ids[kept], labels, image_key))
    return samples


class StockData(Dataset[StockSample]):
    """Samples, of which a Trainer makes batches."""

    def __init__(self, samples: Sequence[StockSample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> StockSample:
        return self.samples[index]


@dataclass(frozen=True)
class StockCollator:
    """Pad a batch and read its pictures."""

    processor: LlavaProcessor
    open_images: Sequence[Callable[[], Image.Image]]

    def __call__(self, samples: Sequence[StockSample]) -> dict[str, Tensor]:
        length = max(len(sample.input_ids) for sample in samples)
        input_ids = np.full((len(samples), length), self.processor.tokenizer.pad_token_id or 0)
        attention_mask = np.zeros((len(samples), length), dtype=np.int64)
        labels = np.full((len(samples), length), _IGNORED, dtype=np.int64)
        for line, sample in enumerate(samples):
            count = len(sample.input_ids)
            input_ids[line, :count] = sample.input_ids
            attention_mask[line, :count] = 1
            labels[line, :count] = sample.labels
        images = [self.open_images[sample.image_key]() for sample in samples]
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "pixel_values": pixels["pixel_values"],
        }


def train_stock(
    model: LlavaForConditionalGeneration,
    samples: Sequence[StockSample],
    collator: StockCollator,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    batch_size: int,
    steps: int,
    seed: int,
    bf16: bool,
) -> None:
    """``steps`` optimiser steps, in place."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                max_steps=steps,
                bf16=bf16,
                use_cpu=not torch.cuda.is_available(),
                seed=seed,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=StockData(samples),
            data_collator=collator,
            optimizers=(optimizer, scheduler),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
