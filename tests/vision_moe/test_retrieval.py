import pytest
import torch
from PIL import Image

from vision_moe import CLIPMoEModel, encode_pairs, retrieval_recall


def test_matching_features_are_found() -> None:
    features = torch.eye(12)
    recall = retrieval_recall(features, 3 * features)
    assert recall == {f"{d}_r{k}": 1.0 for d in ("i2t", "t2i") for k in (1, 5, 10)}


def test_ranks_worked_out_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.9]])
    # image -> text: image 1 ranks text 2 above its own; text -> image: text 1 puts image 1 last.
    recall = retrieval_recall(images, texts, ks=(1, 2, 3))
    expected = {
        "i2t_r1": 2 / 3,
        "i2t_r2": 1.0,
        "i2t_r3": 1.0,
        "t2i_r1": 2 / 3,
        "t2i_r2": 2 / 3,
        "t2i_r3": 1.0,
    }
    assert recall == pytest.approx(expected)


def test_any_of_several_captions_counts_for_its_image() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[0.1, 1.0], [1.0, 0.1], [0.2, 1.0]])
    recall = retrieval_recall(images, texts, ks=(1,), image_of_text=torch.tensor([0, 0, 1]))
    assert recall == pytest.approx({"i2t_r1": 0.5, "t2i_r1": 2 / 3})


def test_collapsed_features_score_zero() -> None:
    ones = torch.ones(20, 4)
    assert retrieval_recall(ones, ones, ks=(1,)) == {"i2t_r1": 0.0, "t2i_r1": 0.0}


def test_blocks_of_rows_do_not_change_the_result() -> None:
    features = torch.randn(2500, 64, generator=torch.Generator().manual_seed(0))
    assert retrieval_recall(features, features, ks=(1,)) == {"i2t_r1": 1.0, "t2i_r1": 1.0}


def test_image_without_text_is_named() -> None:
    with pytest.raises(ValueError, match="image 1 has no text"):
        retrieval_recall(torch.eye(2), torch.eye(2), image_of_text=torch.tensor([0, 0]))


def test_different_numbers_need_an_assignment() -> None:
    with pytest.raises(ValueError, match="2 images, 3 texts"):
        retrieval_recall(torch.ones(2, 4), torch.ones(3, 4))


def test_encoding_does_not_depend_on_the_batch(moe_clip: CLIPMoEModel) -> None:
    pairs = [(Image.new("RGB", (40, 40), (i * 40, 9, 9)), f"a caption {'x' * i}") for i in range(5)]
    whole = encode_pairs(moe_clip, pairs, progress=False)
    parts = encode_pairs(moe_clip, pairs, batch_size=2, progress=False)
    for one, other in zip(whole, parts, strict=True):
        # Worst error measured: 7.2e-7.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_no_pairs_is_an_error(moe_clip: CLIPMoEModel) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        encode_pairs(moe_clip, [], progress=False)
