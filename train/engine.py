"""Hugging Face's Trainer with whole checkpoints, batches made beforehand and a quiet terminal."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from train.instruction_data import only_item
from train.processes import processes
from vision_moe import InputError

_WEIGHTS = "trained.safetensors"
_FINGERPRINT = "fingerprint.json"


class ProgressBar(TrainerCallback):
    """Steps, time left and loss on stderr; transformers' own writes to stdout."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.description,
            unit="step",
            mininterval=0.5,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self.bar is not None
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def close(self) -> None:
        """End the bar's line: also where training was cut short and a message follows."""
        if self.bar is not None:
            self.bar.close()


class WholeCheckpointTrainer(Trainer):
    """A Trainer whose checkpoints hold the trained weights alone and appear whole or not at all.

    Only the newest is kept. What is frozen is rebuilt from the recipe, which the folder's
    fingerprint stands for.
    """

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), "unfinished")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # below "unfinished"
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            assert self.args.output_dir is not None
            folder = Path(self.args.output_dir)
            older = list(folder.glob("checkpoint-*"))
            name = f"checkpoint-{self.state.global_step}"
            os.replace(folder / "unfinished" / name, folder / name)
            for one in older:
                shutil.rmtree(one, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        assert output_dir is not None and self.model is not None
        os.makedirs(output_dir, exist_ok=True)
        trained = {k: p.detach().contiguous() for k, p in _trained(self.model).items()}
        save_file(trained, os.path.join(output_dir, _WEIGHTS))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        assert self.model is not None
        stored = load_file(os.path.join(resume_from_checkpoint, _WEIGHTS))
        trained = _trained(self.model)
        assert stored.keys() == trained.keys(), "a checkpoint of another model"
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fit(
    model: nn.Module,
    batches: Dataset[dict[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    steps: int,
    checkpoints: Path,
    fingerprint: str,
    description: str,
    seed: int,
    bf16: bool,
    gradient_accumulation: int,
    max_grad_norm: float,
    log_steps: int,
    save_steps: int | None,
    resume: bool,
) -> list[dict[str, float]]:
    """Train ``model`` for ``steps`` optimiser steps, in place.

    Args:
        model: ``forward(**batch, num_items_in_batch)`` gives ``loss``.
        batches: Item ``i`` is the ``i``-th batch of the whole run.
        optimizer: With a parameter group for each learning rate.
        scheduler: Of the optimiser's learning rates.
        steps: Optimiser steps.
        checkpoints: Folder for checkpoints, removed when the run is done.
        fingerprint: Of the run; checkpoints of another one are refused.
        description: Of the progress bar.
        seed: Of dropout.
        bf16: Compute under bf16 autocast.
        gradient_accumulation: Batches for each optimiser step.
        max_grad_norm: Where the gradient's norm is clipped.
        log_steps: Steps between two log entries.
        save_steps: Steps between two checkpoints; none by default.
        resume: Go on from a checkpoint of this run, if there is one.

    Returns:
        The log: ``step``, ``loss`` (mean since the last entry), ``learning_rate``, ``grad_norm``.
    """
    with processes().main_process_first():
        last = _prepare_checkpoints(checkpoints, fingerprint, resume, bool(save_steps))
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=gradient_accumulation,
        max_steps=steps,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        seed=seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=log_steps,
        logging_first_step=True,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or steps,
        disable_tqdm=True,
        report_to="none",
    )
    progress = ProgressBar(description)
    trainer = WholeCheckpointTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=only_item,
        optimizers=(optimizer, scheduler),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    with _quiet_libraries(), closing(progress):
        trainer.train(resume_from_checkpoint=last)
    if processes().is_main_process:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _prepare_checkpoints(
    folder: Path, fingerprint: str, resume: bool, will_save: bool
) -> str | None:
    """The checkpoint to go on from, in a folder that is then ready for this run's own."""
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    if last is not None:
        try:
            stored = json.loads((folder / _FINGERPRINT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None
        if stored != fingerprint:
            raise InputError(
                f"{folder}: holds checkpoints of a run with another configuration;"
                " delete it, choose another 'out', or set resume=never"
            )
        if processes().is_main_process:
            shutil.rmtree(folder / "unfinished", ignore_errors=True)
        return last
    if not processes().is_main_process:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    if will_save:
        folder.mkdir(parents=True)
        (folder / _FINGERPRINT).write_text(json.dumps(fingerprint), encoding="utf-8")
    return None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Errors only from transformers and accelerate: the bar and the log tell the rest."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
