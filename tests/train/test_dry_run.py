"""`mllm upcycle --dry-run` and the choice of blocks."""

from pathlib import Path
from typing import Any

import pytest

from train.blocks import chosen_blocks, expert_sites
from train.config import load_recipe
from train.contrastive import start_model
from train.dry_run import describe_upcycling
from train.recipe import UpcycleRecipe
from vision_moe import InputError

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 6, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}


def recipe_with(*overrides: str) -> UpcycleRecipe:
    recipe = load_recipe("quickstart_clip_moe", overrides)
    assert isinstance(recipe, UpcycleRecipe)
    return recipe


def test_dry_run_of_the_papers_model_gives_the_papers_counts() -> None:
    table = describe_upcycling(recipe_with("model=ViT-L-14-336", "pretrained=openai"))
    rows = {line[:11].strip(): line.split()[-4:] for line in table.splitlines()[-3:]}
    # The paper: 304 M, 908 M in all, 505 M active; both towers 1.20 B and 0.69 B.
    dense, total, active, _ = rows["image tower"]
    assert [n[:7] for n in (dense, total, active)] == ["304,293", "908,740", "505,841"]
    assert rows["both"][1:3] == ["1,202,435,328", "686,198,016"]
    assert table.count("4 experts, top-2") == 24 + 12


def test_dry_run_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.create_model", None)
    table = describe_upcycling(recipe_with("model=ViT-bigG-14", "pretrained=laion2b_s39b_b160k"))
    assert table.count("4 experts, top-2") == 48 + 32


def test_dry_run_says_which_tower_stays_dense() -> None:
    table = describe_upcycling(recipe_with("model=RN50", "text_blocks=last_2"))
    assert "image tower (ModifiedResNet): no feed-forward network of one shape" in table
    assert (table.count("experts, top-2"), table.count("stays dense")) == (2, 10 + 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=ViT-Z", "open_clip knows no model named 'ViT-Z'"),
        ("model={embed_dim: 4, vision_cfg: {}, text_cfg: {depth: 2}}", "no CLIP can be built"),
        ("vision_blocks=[12]", r"block\(s\) \[12\] have no feed-forward network"),
        ("top_k=5", "'top_k' is 5, but there are 4 experts"),
        ("vision_blocks=last_", "'vision_blocks' is 'last_'"),
    ],
)
def test_what_cannot_be_upcycled_is_told(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe_upcycling(recipe_with("model=ViT-B-32", override))


def test_nothing_chosen_names_both_towers() -> None:
    with pytest.raises(InputError, match="has 0, TextTransformer .* 12"):
        describe_upcycling(recipe_with("model=RN50", "text_blocks=none"))


def test_folder_without_a_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a CLIP-MoE folder"):
        describe_upcycling(recipe_with(f"model={tmp_path}"))


@pytest.mark.parametrize(
    ("choice", "blocks"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("none", []),
        ("last_2", [4, 5]),
        ("last_9", [0, 1, 2, 3, 4, 5]),
        ("every_second", [1, 3, 5]),
        ("second_half", [3, 4, 5]),
        ("odd_second_half", [3, 5]),
        ([5, 0, 5], [0, 5]),
    ],
)
def test_blocks_can_be_named(choice: Any, blocks: list[int]) -> None:
    assert chosen_blocks(choice, start_model(MODEL, None, 0).visual) == blocks


def test_only_chosen_blocks_train() -> None:
    recipe = recipe_with("vision_blocks=odd_second_half", "text_blocks=[0]")
    names = [site.name for site in expert_sites(recipe, start_model(MODEL, None, 0))]
    assert names == [
        "visual.transformer.resblocks.3.mlp",
        "visual.transformer.resblocks.5.mlp",
        "text.transformer.resblocks.0.mlp",
    ]
