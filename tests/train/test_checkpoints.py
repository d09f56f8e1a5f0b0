"""Training checkpoints: whole or refused, self-contained, exported to stock folders."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from mllm.model import load_mllm
from train import checkpoints, progress, run_recipe
from train.export import export
from train.recipe import (
    ConnectorTraining,
    InstructionRecipe,
    LLMTraining,
    RouterPartTraining,
    TowerTraining,
    Trainable,
)
from vision_moe import InputError


@pytest.fixture
def recipe(recipe: InstructionRecipe) -> InstructionRecipe:
    """Something of everything trains."""
    recipe.trainable = Trainable(
        connector=ConnectorTraining(lr=1e-2),
        llm=LLMTraining(mode="lora", lr=1e-2, r=4, dropout=0.1),
        vision=TowerTraining(mode="lora", lr=1e-2, r=2),
        router=RouterPartTraining(mode="full", lr=1e-2),
        experts=TowerTraining(mode="lora", lr=1e-2, r=2),
    )
    recipe.steps, recipe.save_steps = 4, 2
    return recipe


class Killed(BaseException):
    """Stands for a signal: nothing below catches it."""


def run_killed_after(
    recipe: InstructionRecipe, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of the checkpoints that it leaves."""
    original = progress.ProgressBar.on_step_end

    def kill(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == num_steps:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(progress.ProgressBar, "on_step_end", kill)
        with pytest.raises(Killed):
            run_recipe(recipe)
    return Path(f"{recipe.out}.checkpoints")


def state_of(folder: str | Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_mllm(folder)[0].state_dict()
    return state


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_resumed_run_with_routers_and_adapters_is_bit_equal(
    recipe: InstructionRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = state_of(run_recipe(recipe))
    recipe.out = str(tmp_path / "broken")
    run_killed_after(recipe, 3, monkeypatch)
    assert_same(state_of(run_recipe(recipe)), unbroken)


def test_last_checkpoint_exports_to_what_the_run_ends_with(
    recipe: InstructionRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.stages.shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
    finished = run_recipe(recipe)
    assert_same(state_of(export(f"{finished}.checkpoints", tmp_path / "a")), state_of(finished))
    one = checkpoints.newest_whole(Path(f"{finished}.checkpoints"))
    assert one is not None and one.name == "checkpoint-4"
    folder = export(one, tmp_path / "b")
    assert_same(state_of(folder), state_of(finished))
    _, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_exported_folder_generates_the_same_tokens(mllm_folder: Path, tmp_path: Path) -> None:
    model, processor = load_mllm(mllm_folder)
    again, processor_again = load_mllm(export(mllm_folder, tmp_path / "exported"))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}],
        add_generation_prompt=True,
    )
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    answers = [
        m.generate(**p(images=image, text=text, return_tensors="pt"), max_new_tokens=8)
        for m, p in ((model, processor), (again, processor_again))
    ]
    assert torch.equal(*answers)


def test_adapter_of_a_checkpoint_loads_with_stock_peft(
    recipe: InstructionRecipe, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_killed_after(recipe, 3, monkeypatch) / "checkpoint-2"
    exported, _ = load_mllm(export(folder, tmp_path / "exported"))
    language_model = AutoModelForCausalLM.from_pretrained(llm_folder).model
    adapted = peft.PeftModel.from_pretrained(language_model, folder / "adapters" / "llm")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = exported.model.language_model(ids).last_hidden_state
        # Measured worst: 2.3e-6 of states up to 3.3.
        torch.testing.assert_close(adapted(ids).last_hidden_state, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["optimizer.pt", "trained.safetensors", "recipe.yaml"])
def test_checkpoint_with_a_file_missing_is_refused_and_kept(
    recipe: InstructionRecipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = run_killed_after(recipe, 3, monkeypatch)
    (folder / "checkpoint-2" / name).unlink()
    for use in (lambda: run_recipe(recipe), lambda: export(folder, "unused")):
        with pytest.raises(InputError, match=rf"no checkpoint is whole \(checkpoint-2: '{name}'"):
            use()
    assert (folder / "checkpoint-2" / checkpoints.MANIFEST).is_file()
    assert not Path("unused").exists()


def test_older_checkpoint_serves_where_the_newest_is_cut_short(
    recipe: InstructionRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.keep_checkpoints = 2
    folder = run_killed_after(recipe, 4, monkeypatch)
    assert [one.name for one in checkpoints.checkpoints_in(folder)] == ["checkpoint-2"]
    recipe.steps = 6  # a run that has got as far as a second checkpoint
    folder = run_killed_after(recipe_of_its_own(recipe), 5, monkeypatch)
    assert [one.name for one in checkpoints.checkpoints_in(folder)] == [
        "checkpoint-4", "checkpoint-2",
    ]  # fmt: skip
    weights = folder / "checkpoint-4" / checkpoints.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    assert checkpoints.newest_whole(folder) == folder / "checkpoint-2"


def recipe_of_its_own(recipe: InstructionRecipe) -> InstructionRecipe:
    recipe.out += "-second"
    return recipe


def test_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
    recipe: InstructionRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.steps = 6
    save: Callable[..., None] = checkpoints.write_manifest

    def full(folder: Path) -> None:
        if folder.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", full)
    with pytest.raises(InputError, match="checkpoint-4: cannot.*No space.*checkpoint-2"):
        run_recipe(recipe)
    folder = Path(f"{recipe.out}.checkpoints")
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-2", "fingerprint.json"]
    assert not Path(recipe.out).exists()


def test_loss_that_is_no_number_stops_before_the_weights_change(
    recipe: InstructionRecipe,
) -> None:
    recipe.trainable.connector.lr = 1e30
    recipe.steps = 50
    with pytest.raises(InputError, match=r"step \d+: the (loss|gradient) is (nan|inf)"):
        run_recipe(recipe)
    assert not Path(recipe.out).exists()


def test_tensorboard_gets_the_curves(recipe: InstructionRecipe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe.log_to, recipe.steps, recipe.save_steps = "tensorboard", 2, None
    run_recipe(recipe)
    events = EventAccumulator(f"{recipe.out}.logs")
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/balance_loss", "train/router_load/vision_0/expert_3"} <= scalars
    history = json.loads((Path(recipe.out) / "training_log.json").read_text())["history"]
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([entry["loss"] for entry in history])


def test_missing_tracker_is_one_sentence(
    recipe: InstructionRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.log_to = "wandb"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install wandb"):
        run_recipe(recipe)


def test_checkpoint_holds_what_a_step_changes_beside_weights(tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        net[0].requires_grad_(False)
        net[0].register_buffer("constant", torch.ones(1), persistent=False)
        return net

    stepped, begun = model(), model()
    stepped(torch.randn(4, 2))
    content = checkpoints.TrainedWeights(stepped)
    names = content.names()
    assert set(names) == {f"1.{one}" for one in stepped[1].state_dict()}
    content.save({name: stepped.state_dict()[name] for name in names}, tmp_path)
    checkpoints.put_weights(begun, content.read(tmp_path), "here")
    for name, value in stepped.state_dict().items():
        assert torch.equal(begun.state_dict()[name], value), name
    assert begun.state_dict()["1.num_batches_tracked"] == 1
