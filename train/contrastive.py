"""Contrastive training of a CLIP, and the part of it that every stage of upcycling shares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor, nn

from train import stages
from train.attention import attention_kernel
from train.config import recipe_dict, save_resolved
from train.earlier_pairs import EarlierPairs
from train.engine import RunSettings, fit
from train.optimizers import build_optimizer
from train.pair_batches import PairBatches, random_batches
from train.pair_sources import fingerprints
from train.pairs import Pairs, load_pairs, tell_of_skipped
from train.precision import use_bf16
from train.processes import processes
from train.recipe import (
    ContrastiveRecipe,
    ContrastiveTraining,
    Precision,
    RouterTraining,
    UpcycleRecipe,
)
from train.router_losses import router_z_loss
from train.schedule import learning_rate_schedule
from train.stages import Stage, StageResult
from vision_moe import (
    CLIPMoEConfig,
    CLIPMoEModel,
    FeatureShards,
    InputError,
    contrastive_loss,
    load,
    load_balancing_loss,
    moe_layers,
    record_routing,
    save,
)

LOG_FILE, RECIPE_FILE = "training_log.json", "recipe.yaml"

#: CLIP clamps its trained inverse temperature here.
MAX_LOGIT_SCALE = 100.0

#: Keys of a recipe that say where things are, not what comes out.
NOT_CONFIGURATION = ("out", "save_steps")


class ContrastiveModel(nn.Module):
    """A CLIP whose forward pass is its loss.

    Args:
        clip: The model that trains.
        training: Label smoothing, temperature, weight of the patch tokens' loss, number of earlier
            pairs and, for routers, weight of the balance loss.
        batches: Pair numbers of each step's batch, to name them where something goes wrong.
        kept: Where the features of every step go.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        clip: CLIPMoEModel,
        training: ContrastiveTraining,
        batches: Sequence[np.ndarray] = (),
        kept: FeatureShards | None = None,
    ) -> None:
        super().__init__()
        self.batches = batches
        self.kept = kept
        self.clip = clip
        self.label_smoothing = training.label_smoothing
        self.logit_scale = training.logit_scale
        self.patch_loss = training.patch_loss
        self.patch_layer = training.patch_layer
        assert clip.config.open_clip_config is not None
        width = clip.config.open_clip_config["embed_dim"]
        self.earlier, self.earlier_patches = (
            EarlierPairs(training.earlier_pairs, width) if training.earlier_pairs and used else None
            for used in (True, training.patch_loss > 0)
        )
        self.router = training if isinstance(training, RouterTraining) else None

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, numbers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of a batch of pairs.

        Args:
            pixel_values: ``(B, 3, H, W)``.
            input_ids: ``(B, L)``.
            numbers: ``(B,)``, of the pairs; needed to keep features and for earlier pairs.

        Returns:
            ``loss``, a scalar.
        """
        longest = longest_sequence(self.clip)
        with attention_kernel(pixel_values.device, longest), record_routing(self.clip) as record:
            if self.patch_loss:
                image, patches = self.clip.encode_image_and_patches(pixel_values, self.patch_layer)
            else:
                image = self.clip.encode_image(pixel_values)
            if self.router is not None:
                text = self.clip.encode_text(input_ids)
            else:
                text = self.clip.encode_text_by_length(input_ids)
        if self.kept is not None and numbers is not None:
            self._keep(numbers, image.detach(), text.detach())
        scale = (
            self.clip.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            if self.logit_scale is None
            else self.logit_scale
        )
        loss = self._contrastive_loss(image, text, scale, numbers, self.earlier)
        if self.patch_loss:
            of_patches = self._contrastive_loss(patches, text, scale, numbers, self.earlier_patches)
            loss = loss + self.patch_loss * of_patches
        if self.router is not None:
            loss = loss + self._router_losses(tuple(record.router_logits.values()))
        return {"loss": loss}

    def _contrastive_loss(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        numbers: Tensor | None,
        earlier: EarlierPairs | None,
    ) -> Tensor:
        state = processes()
        negatives = None
        if earlier is not None:
            if numbers is None:
                raise ValueError("earlier pairs need the numbers of a batch's pairs")
            batch = gather(numbers)
            negatives = earlier.features(batch)
            earlier.remember(batch, *gather((image.detach().float(), text.detach().float())))
        return contrastive_loss(
            image,
            text,
            scale,
            label_smoothing=self.label_smoothing,
            world_size=state.num_processes,
            rank=state.process_index,
            earlier=negatives,
        )

    def _keep(self, numbers: Tensor, image: Tensor, text: Tensor) -> None:
        """Put the features of all processes where their pairs belong."""
        assert self.kept is not None
        numbers, image, text = gather((numbers, image.float(), text.float()))
        if processes().is_main_process:
            self.kept.put(numbers.cpu().numpy(), image.cpu().numpy(), text.cpu().numpy())

    def describe_step(self, step: int) -> str:
        """The pairs of a step, counted from 0."""
        numbers = np.sort(self.batches[step]).tolist()
        more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
        return f"pairs {', '.join(map(str, numbers[:8]))}{more}"

    def _router_losses(self, router_logits: Sequence[Tensor]) -> Tensor:
        """Weighted sum of the routers' losses; the biases that stand in for one move here."""
        assert self.router is not None
        world_size = processes().num_processes
        layers = moe_layers(self.clip).values()
        loss = self.router.balance * load_balancing_loss(router_logits, world_size)
        if self.router.z:
            z = torch.stack([router_z_loss(logits) for logits in router_logits]).mean()
            loss = loss + self.router.z * z
        for layer, logits in zip(layers, router_logits, strict=True):
            if layer.expert_bias is not None and self.training:
                layer.balance_bias(logits.detach(), self.router.bias_rate, world_size)
        return loss


def check_patch_loss(clip: CLIPMoEModel, *trainings: ContrastiveTraining) -> None:
    """Refuse a ``patch_loss`` that the vision tower cannot have, before anything trains.

    Raises:
        InputError: The tower has no patch tokens in CLIP's space, or no such layer.
    """
    layers = {training.patch_layer for training in trainings if training.patch_loss}
    size = clip.config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    blank = torch.zeros(1, 3, height, width, device=clip.device)
    for layer in sorted(layers):
        with torch.no_grad():
            clip.encode_image_and_patches(blank, layer)


def longest_sequence(clip: CLIPMoEModel) -> int:
    """Tokens of the longer of a picture and the longest text."""
    patch = clip.config.vision_config.patch_size
    assert clip.config.open_clip_config is not None
    context = clip.config.open_clip_config["text_cfg"].get("context_length", 77)
    size = clip.config.vision_config.image_size
    if not isinstance(patch, int) or not isinstance(size, int):
        return context
    return max((size // patch) ** 2 + 1, context)


def train_contrastive(
    clip: CLIPMoEModel,
    parameters: Sequence[nn.Parameter],
    pairs: Pairs,
    batches: Sequence[np.ndarray],
    training: ContrastiveTraining,
    *,
    stage: Stage,
    seed: int,
    precision: Precision,
    save_steps: int | None,
    kept: FeatureShards | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, float]]:
    """Train ``parameters`` of ``clip`` in place, all else frozen.

    Args:
        clip: The model.
        parameters: Those of its parameters that train.
        pairs: The data.
        batches: Pair numbers of each step's batch, ``training.steps`` of them.
        training: Rates, steps and temperature.
        stage: What is being made; checkpoints stand beside its folder and carry its fingerprint.
        seed: Of dropout, where the model has any.
        precision: See :func:`train.precision.use_bf16`.
        save_steps: Steps between two checkpoints; none by default.
        kept: Where the features go that each step computes.
        rates: Of parameters, by name in ``clip``, that have another than ``training.lr``.

    Returns:
        The log of :func:`train.engine.fit`.
    """
    num_processes = processes().num_processes
    if len(batches[0]) % num_processes:
        raise InputError(
            f"{stage.name}: a batch of {len(batches[0])} pairs cannot be shared evenly by"
            f" {num_processes} processes"
        )
    clip.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = build_optimizer(clip.named_parameters(), training, rates)
    history = fit(
        ContrastiveModel(clip, training, batches, kept).train(),
        PairBatches(pairs, batches, clip, num_processes),
        optimizer,
        learning_rate_schedule(
            optimizer, "cosine", min(training.warmup_steps, training.steps // 2), training.steps
        ),
        training.steps,
        RunSettings(
            folder=stage.folder,
            fingerprint=stage.fingerprint,
            description=stage.name,
            seed=seed,
            bf16=use_bf16(precision),
            log_steps=max(1, training.steps // 100),
            save_steps=save_steps,
        ),
    ).history
    clip.requires_grad_(True)
    clip.eval()
    return history


def start_model(model: dict[str, Any] | str, pretrained: str | None, seed: int) -> CLIPMoEModel:
    """The CLIP that a recipe names: a folder, a name of open_clip's, or a configuration."""
    torch.manual_seed(seed)
    if isinstance(model, dict):
        description = {key: value for key, value in model.items() if key != "preprocess"}
        try:
            clip = CLIPMoEModel(
                CLIPMoEConfig(open_clip_config=description, preprocess=model.get("preprocess"))
            )
        except Exception as error:  # open_clip raises whatever a wrong value makes it stumble over
            raise InputError(f"'model': no CLIP can be built from it ({error})") from error
    elif Path(model).is_dir():
        clip = load(model)
    else:
        try:
            clip = CLIPMoEModel.from_open_clip(model, pretrained)
        except RuntimeError as error:
            raise InputError(f"'pretrained' of {model}: {error}") from error
    clip.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return clip.eval()


def run(recipe: ContrastiveRecipe) -> Path:
    """Train, unless the recipe's folder holds the result already."""
    run_stage(recipe, "contrastive training")
    return Path(recipe.out)


def run_stage(recipe: ContrastiveRecipe, name: str) -> StageResult:
    """:func:`run` under a name, with what the stage took."""
    inputs = [*model_inputs(recipe.model), *fingerprints(recipe.data)]
    stage = Stage(name, Path(recipe.out), configuration(recipe), inputs)
    return stages.run(stage, lambda folder: _make(recipe, stage, folder))


def configuration(recipe: Any) -> dict[str, Any]:
    """What of a recipe decides the result."""
    content = recipe_dict(recipe)
    if isinstance(recipe.model, str) and Path(recipe.model).is_dir():
        content.pop("model")  # what the folder holds is an input, not where it lies
    # As before there were these keys, whose runs go on.
    for part, key in ((content, "attention_lr"), (content.get("router", {}), "experts_lr")):
        if part.get(key) is None:
            part.pop(key, None)
    return {key: value for key, value in content.items() if key not in NOT_CONFIGURATION}


def model_inputs(model: dict[str, Any] | str) -> list[str]:
    """Fingerprints of the model that a recipe starts from."""
    return [stages.fingerprint_of(model)] if isinstance(model, str) else []


def write_log(folder: Path, **content: Any) -> None:
    """Write what a run has to tell beside its weights."""
    (folder / LOG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model(
    recipe: ContrastiveRecipe | UpcycleRecipe,
    model: CLIPMoEModel,
    training: ContrastiveTraining,
    pairs: Pairs,
    history: list[dict[str, float]],
    folder: Path,
    **more: Any,
) -> None:
    """Write what a run has made, its recipe, and what it has to tell beside them."""
    save(model, folder)
    save_resolved(recipe, folder / RECIPE_FILE)
    write_log(
        folder,
        training=asdict(training),
        num_processes=processes().num_processes,
        num_pairs=len(pairs),
        **more,
        skipped_pairs=pairs.skipped,
        history=history,
    )


def _make(recipe: ContrastiveRecipe, stage: Stage, folder: Path) -> None:
    model = start_model(recipe.model, recipe.pretrained, recipe.seed)
    check_patch_loss(model, recipe.training)
    pairs = load_pairs(recipe.data, model, recipe.seed)
    training = recipe.training
    batches = random_batches(len(pairs), training.batch_size, training.steps, recipe.seed)
    history = train_contrastive(
        model,
        list(model.parameters()),
        pairs,
        batches,
        training,
        stage=stage,
        seed=recipe.seed,
        precision=recipe.precision,
        save_steps=recipe.save_steps,
    )
    write_model(recipe, model, training, pairs, history, folder)
    tell_of_skipped(pairs.skipped, len(pairs), recipe.out)
