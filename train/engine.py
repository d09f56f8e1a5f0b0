"""Hugging Face's Trainer with whole checkpoints, batches made beforehand and a quiet terminal."""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from mllm.allocator import grow_in_huge_pages, hand_back_freed_memory
from train import checkpoints
from train.checkpoints import Content
from train.instruction_data import only_item
from train.processes import processes
from train.progress import ProgressBar, check_tracker, tensorboard_callback
from train.recipe import LogTo
from train.sharding import load_whole_optimizer_state, whole_optimizer_state
from train.stages import checkpoint_folder
from vision_moe import InputError


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run goes, apart from what it trains.

    Args:
        folder: Of the result; checkpoints and curves stand beside it.
        fingerprint: Of the run; checkpoints of another one are refused.
        description: Of the progress bar.
        seed: Of dropout.
        bf16: Compute under bf16 autocast.
        gradient_accumulation: Batches of each process for an optimiser step.
        max_grad_norm: Where the gradient's norm is clipped.
        log_steps: Steps between two log entries.
        log_to: Where curves go.
        save_steps: Steps between two checkpoints; none by default.
        keep_checkpoints: So many of the newest.
        resume: Go on from a checkpoint of this run, if there is one.
    """

    folder: Path
    fingerprint: str
    description: str
    seed: int
    bf16: bool
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    log_steps: int
    log_to: LogTo = "none"
    save_steps: int | None = None
    keep_checkpoints: int = 1
    resume: bool = True

    @property
    def checkpoints(self) -> Path:
        """There until the run's result is whole."""
        return checkpoint_folder(self.folder)


class WholeCheckpointTrainer(Trainer):
    """A Trainer that stops at a loss that is no number, and whose checkpoints are whole.

    A checkpoint holds what trains and what it takes to go on, and appears complete or not at all.
    """

    def __init__(
        self,
        *,
        own_optimizer: torch.optim.Optimizer,
        own_scheduler: torch.optim.lr_scheduler.LambdaLR,
        content: Content,
        keep_checkpoints: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.own_optimizer = own_optimizer
        self.own_scheduler = own_scheduler
        self.content = content
        self.keep_checkpoints = keep_checkpoints
        self._tokens: Tensor | None = None
        self._logged_at = time.monotonic()

    # --- optimiser -------------------------------------------------------------------------------

    # Not as arguments: FSDP and DeepSpeed take none, and DeepSpeed drops what stands there before
    # it begins, for the Trainer's own at the Trainer's own rate.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.own_optimizer
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = self.own_scheduler
        return self.lr_scheduler

    # --- steps -----------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if (count := getattr(self.unwrapped, "num_tokens", None)) is not None:
            seen = count(inputs)
            self._tokens = seen if self._tokens is None else self._tokens + seen
        loss = super().compute_loss(model, inputs, *args, **options)
        value = (loss[0] if isinstance(loss, tuple) else loss).detach()
        if not torch.isfinite(value):
            raise InputError(self._no_number("loss", value))
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(norm):
            raise InputError(self._no_number("gradient", norm))
        return norm

    def _no_number(self, what: str, value: Any) -> str:
        assert self.args.output_dir is not None
        whole = checkpoints.checkpoints_in(Path(self.args.output_dir))
        kept = f"{whole[0]} is from before it" if whole else "there is no checkpoint yet"
        return (
            f"step {self.state.global_step + 1}{self._batch_of_step()}: the {what} is"
            f" {float(value)}; the run stops before the weights change ({kept}), lower the learning"
            " rate, or look at the data"
        )

    def _batch_of_step(self) -> str:
        """What the model can say of the batch that the step is at."""
        describe = getattr(self.unwrapped, "describe_step", None)
        return f" ({describe(self.state.global_step)})" if describe is not None else ""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed, the routers' losses and their load, over all processes."""
        if "loss" in logs:
            pop_curves = getattr(self.unwrapped, "pop_curves", dict)
            tokens = 0 if self._tokens is None else int(self._tokens)
            everyone = gather_object([(tokens, pop_curves())])
            now = time.monotonic()
            if total := sum(count for count, _ in everyone):
                logs["tokens_per_second"] = round(total / max(now - self._logged_at, 1e-9), 1)
            logs |= _means([means for _, means in everyone])
            self._tokens, self._logged_at = None, now
        super().log(logs, start_time)

    @property
    def unwrapped(self) -> nn.Module:
        """The model as it was given, whatever it has been wrapped in."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.model)
        return unwrapped

    # --- checkpoints -----------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), checkpoints.UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.args.output_dir is not None
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        aside = folder / checkpoints.UNFINISHED
        try:
            super()._save_checkpoint(model, trial)  # below "unfinished"
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.write_manifest(aside / name)
                shutil.rmtree(folder / name, ignore_errors=True)  # of this step, but not whole
                os.replace(aside / name, folder / name)
        except (OSError, RuntimeError, SafetensorError, InputError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            whole = checkpoints.checkpoints_in(folder)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            kept = f"the same command goes on from {whole[0].name}" if whole else "it was the first"
            raise InputError(f"{folder / name}: cannot be written ({reason}); {kept}") from error
        if self.args.should_save:
            for older in checkpoints.checkpoints_in(folder)[self.keep_checkpoints :]:
                shutil.rmtree(older, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        assert output_dir is not None
        if not self.args.should_save:  # it has taken part in gathering what another writes
            return
        os.makedirs(output_dir, exist_ok=True)
        self.content.save(self.kept_state(state_dict), Path(output_dir))

    def kept_state(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds of the weights, by name in the model.

        Args:
            state_dict: Whole tensors of a model that is sharded; its own by default.
        """
        if state_dict is None:
            model = self.unwrapped
            state_dict = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: state_dict[name] for name in self.content.names()}

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        state = self.content.read(Path(resume_from_checkpoint))
        checkpoints.put_weights(self.unwrapped, state, resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As one process does, also where the optimiser's state is spread over several."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with checkpoints.reading(Path(checkpoint)):
            if not self.is_fsdp_enabled:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            assert self.optimizer is not None and self.lr_scheduler is not None
            optimizer, scheduler = (
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            )
            load_whole_optimizer_state(self.optimizer, optimizer)
            self.lr_scheduler.load_state_dict(scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with checkpoints.reading(Path(checkpoint)):
                super()._load_rng_state(checkpoint)


def _means(of_processes: list[dict[str, float]]) -> dict[str, float]:
    """Over those processes that have a value: a batch of text alone routes no picture."""
    names = dict.fromkeys(name for one in of_processes for name in one)
    values = {name: [one[name] for one in of_processes if name in one] for name in names}
    return {name: sum(ones) / len(ones) for name, ones in values.items()}


class SaveLast(TrainerCallback):
    """A checkpoint after the last step, so that a result that cannot be written is not lost."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = True


@dataclass(frozen=True)
class Fitted:
    """What a run leaves besides the model.

    Attributes:
        history: The log: ``step``, ``loss`` (mean since the last entry), ``learning_rate``,
            ``grad_norm``, ``tokens_per_second``, and the routers' losses and loads where some take
            part.
        gathered: The weights that a checkpoint holds, where asked for, and of a model that is
            sharded over processes (on the main one); else the model holds them itself.
    """

    history: list[dict[str, float]]
    gathered: dict[str, Tensor] | None


def fit(
    model: nn.Module,
    batches: Dataset[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    steps: int,
    settings: RunSettings,
    content: Content | None = None,
    num_skipped: Callable[[], int] = lambda: 0,
    gather: bool = False,
) -> Fitted:
    """Train ``model`` for ``steps`` optimiser steps, in place.

    Args:
        model: ``forward(**batch)`` gives ``loss``, and takes ``num_items_in_batch`` too if
            ``accepts_loss_kwargs``. It may have ``num_tokens(batch)``, for the speed, and
            ``pop_curves()``, named values for the log.
        batches: Item ``i`` is the ``i``-th batch of the whole run.
        optimizer: With a parameter group for each learning rate.
        scheduler: Of the optimiser's learning rates.
        steps: Optimiser steps.
        settings: All else.
        content: What checkpoints hold of the model; what trains by default.
        num_skipped: How many samples have been left out so far, for the progress line.
        gather: Give what a checkpoint holds back apart from the model, also where that has it.
    """
    check_tracker(settings.log_to)
    content = content or checkpoints.TrainedWeights(model)
    saves = settings.save_steps is not None
    last = _prepare(settings, saves)
    arguments = TrainingArguments(
        output_dir=str(settings.checkpoints),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=steps,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        seed=settings.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=settings.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_steps=settings.save_steps or steps,
        disable_tqdm=True,
        project="mllm",
        run_name=settings.folder.name,
        report_to=settings.log_to if settings.log_to in ("trackio", "wandb") else "none",
        # No parameter that trains is ever left out of a step.
        ddp_find_unused_parameters=False,
    )
    progress = ProgressBar(settings.description, num_skipped)
    callbacks: list[TrainerCallback] = [progress]
    if saves:
        callbacks.append(SaveLast())
    if settings.log_to == "tensorboard":
        callbacks.append(tensorboard_callback(Path(f"{settings.folder}.logs")))
    trainer = WholeCheckpointTrainer(
        own_optimizer=optimizer,
        own_scheduler=scheduler,
        content=content,
        keep_checkpoints=settings.keep_checkpoints,
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=only_item,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    hand_back_freed_memory()
    grow_in_huge_pages()
    with _quiet_libraries(), closing(progress):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        unset_hf_deepspeed_config()  # or ZeRO-3 would spread any model that is loaded from now on
        return Fitted(history, trainer.kept_state(whole) if whole else {})
    return Fitted(history, trainer.kept_state() if gather else None)


def _prepare(settings: RunSettings, saves: bool) -> Path | None:
    """:func:`train.checkpoints.prepare` by one process, for all."""
    folder = settings.checkpoints
    with processes().main_process_first():
        if processes().is_main_process:
            return checkpoints.prepare(folder, settings.fingerprint, settings.resume, saves)
        return checkpoints.newest_whole(folder) if settings.resume else None


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
