"""Recipes: YAML and overrides in, validated dataclasses or one clear sentence out."""

from pathlib import Path

import pytest

from train.config import load_recipe, recipe_dict, save_resolved, shipped_recipes
from train.recipe import InstructionRecipe
from vision_moe import InputError

TEXT = """
kind: instruction
out: somewhere
tower: a_tower
data:
  - {name: easy_vqa, num_images: 10}
trainable:
  llm: {mode: lora, lr: 1e-4}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def instruction(path: Path, *overrides: str) -> InstructionRecipe:
    recipe = load_recipe(path, overrides)
    assert isinstance(recipe, InstructionRecipe)
    return recipe


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_fills_nested_dataclasses(recipe_file: Path) -> None:
    recipe = instruction(recipe_file)
    assert recipe.trainable.llm.mode == "lora"
    assert recipe.trainable.connector.lr == 1e-3


def test_exponent_without_a_dot_is_a_number(recipe_file: Path) -> None:
    # YAML 1.1 takes 1e-4 for a string.
    assert instruction(recipe_file).trainable.llm.lr == 1e-4


def test_override_reaches_into_dictionaries_and_lists(recipe_file: Path) -> None:
    recipe = instruction(recipe_file, "trainable.connector.lr=2e-3", "data.0.num_images=3")
    assert recipe.trainable.connector.lr == 2e-3
    assert recipe.data[0].num_images == 3


def test_override_value_is_yaml(recipe_file: Path) -> None:
    assert instruction(recipe_file, "epochs=null", "steps=7").epochs is None
    target = instruction(recipe_file, "trainable.llm.target=[q_proj, v_proj]").trainable.llm.target
    assert target == ["q_proj", "v_proj"]


def test_override_can_replace_a_null(recipe_file: Path) -> None:
    recipe = instruction(recipe_file, "trainable=null", "trainable.llm.r=4")
    assert recipe.trainable.llm.r == 4


def test_unknown_key_names_file_key_and_nearest(recipe_file: Path) -> None:
    text = message(recipe_file, "warmup_ration=0.1")
    assert str(recipe_file) in text
    assert "'warmup_ration'" in text and "'warmup_ratio'" in text


def test_unknown_nested_key_names_its_place_and_nearest(recipe_file: Path) -> None:
    text = message(recipe_file, "trainable.llm.rnak=4")
    assert "'trainable.llm.rnak'" in text and "'r'" in text


def test_unknown_key_in_a_list_item_names_nearest(recipe_file: Path) -> None:
    text = message(recipe_file, "data.0.num_imgs=4")
    assert "'data.0.num_imgs'" in text and "'num_images'" in text


def test_wrong_type_names_key_and_value(recipe_file: Path) -> None:
    text = message(recipe_file, "steps=many")
    assert "'steps'" in text and "'many'" in text and "integer" in text


def test_wrong_type_in_a_union_names_the_key(recipe_file: Path) -> None:
    assert "'trainable.llm.target'" in message(recipe_file, "trainable.llm.target=3")


def test_negative_rate_is_refused(recipe_file: Path) -> None:
    assert "'trainable.llm.lr'" in message(recipe_file, "trainable.llm.lr=-1")


def test_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("kind: instruction\nout: x\n")
    assert "'data' is missing" in message(path)


def test_unknown_kind_lists_the_known(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("kind: instructions\n")
    assert "contrastive, upcycle, instruction" in message(path)


def test_unknown_name_gives_the_nearest_shipped_recipe() -> None:
    assert "'finetune_lora'" in message("finetune_lor")


def test_missing_file_is_named() -> None:
    assert "folder/absent.yaml" in message("folder/absent.yaml")


@pytest.mark.parametrize("override", ["steps", "=3", "data.9.split=x", "out.deeper=1", "a=[1"])
def test_malformed_override_is_named(recipe_file: Path, override: str) -> None:
    assert f"'{override}'" in message(recipe_file, override)


def test_damaged_yaml_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("kind: [\n")
    assert "not YAML" in message(path)


def test_resolved_recipe_gives_the_same_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe = instruction(recipe_file, "seed=3")
    save_resolved(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_loads(name: str) -> None:
    assert recipe_dict(load_recipe(name))["kind"]


def test_recipe_over_a_base_says_only_what_differs(recipe_file: Path, tmp_path: Path) -> None:
    above = tmp_path / "above.yaml"
    above.write_text("base: mine.yaml\nout: elsewhere\ntrainable:\n  llm: {lr: 3e-4}\n")
    recipe = instruction(above)
    assert (recipe.out, recipe.tower) == ("elsewhere", "a_tower")
    assert (recipe.trainable.llm.mode, recipe.trainable.llm.lr) == ("lora", 3e-4)


def test_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    assert "leads back" in message(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["llava15_finetune", "llava15_13b_moe_qlora"])
def test_llava15_is_tuned_on_padded_pictures_apart_from_text(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, InstructionRecipe)
    assert (recipe.images, recipe.group_by_modality, recipe.global_batch) == ("pad", True, 128)
