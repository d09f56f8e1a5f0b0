"""What is compared: ways from one dense CLIP to another CLIP, at the same number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import nearest_name
from vision_moe import InputError

LanguageModel = Literal["stand_in", "pretrained"]

#: Who sees with a tower -> what stands behind the names of what it finds.
LANGUAGE_MODELS: dict[LanguageModel, str] = {"stand_in": "", "pretrained": "_pretrained"}


@dataclass(frozen=True)
class Method:
    """A way to make a CLIP.

    Attributes:
        title: For tables.
        overrides: ``key=value`` over the recipe ``evidence_clip_moe``.
        stages_of: Another method whose trained stages are taken.
        trains: It runs that recipe.
    """

    title: str
    overrides: tuple[str, ...] = ()
    stages_of: str | None = None
    trains: bool = True


# Muon's steps are of full rank, whatever the gradient's: it is not for factors of low rank.
_CHANGES_TRAIN = ("experts=low_rank", "stage.optimizer=adamw", "stage.lr=3.0e-3")

#: The methods of the claims. Direct fine-tuning has the best of the rates that were tried on
#: validation scenes, sparse upcycling that of the same networks; all others have DMU's.
METHODS: dict[str, Method] = {
    "dense": Method("dense base", trains=False),
    "direct": Method("direct fine-tuning, all parameters", ("method=direct", "stage.lr=5.0e-4")),
    "direct_ffn": Method(
        "direct fine-tuning, FFN",
        ("method=direct", "direct_parameters=ffn", "stage.lr=2.0e-3"),
    ),
    "sparse": Method("sparse upcycling", ("method=sparse", "stage.lr=2.0e-3")),
    "seeds": Method("experts that differ in their seeds", ("method=seeds",)),
    "shuffled_labels": Method("DMU, labels shuffled", ("method=shuffled_labels",)),
    "dmu": Method("CLIP-MoE (DMU)"),
    "as_trained": Method(
        "DMU, put together as in the paper",
        ("expert_spread=1", "router.global_share=1"),
        stages_of="dmu",
    ),
    "random_batches": Method(
        "DMU, routers tuned on random batches", ("router.global_share=1",), stages_of="dmu"
    ),
    "average": Method("weight average of DMU's experts", stages_of="dmu", trains=False),
    "random_routing": Method(
        "DMU, routers as drawn", ("router.kind=random",), stages_of="dmu"
    ),
    "uniform": Method("DMU, all experts evenly", ("router.kind=uniform",), stages_of="dmu"),
    "top_4": Method("CLIP-MoE (DMU), top-4", ("top_k=4",), stages_of="dmu"),
    "low_rank": Method(
        "CLIP-MoE, low-rank experts", ("experts=truncated", "rank=32"), stages_of="dmu"
    ),
}  # fmt: skip

#: One thing of DMU changed at a time; the steps of all stages together stay the same.
ABLATIONS: dict[str, Method] = {
    "experts_2": Method("2 experts", ("num_experts=2", "stage.steps=360")),
    "experts_8": Method("8 experts", ("num_experts=8", "stage.steps=51")),
    "top_1": Method("top-1", ("top_k=1",), stages_of="dmu"),
    "clusters_2": Method("K = 2", ("num_clusters=2",)),
    "clusters_3": Method("K = 3", ("num_clusters=3",)),
    "stage_init_base": Method("stages start from the base", ("stage_init=base",)),
    "global_share_0": Method("in-cluster batches alone", ("global_share=0",)),
    "spread_25": Method("spread 0.25", ("expert_spread=0.25",), stages_of="dmu"),
    "spread_75": Method("spread 0.75", ("expert_spread=0.75",), stages_of="dmu"),
    "base_share_20": Method("a fifth of the base in each", ("base_share=0.2",), stages_of="dmu"),
    "attention": Method("attention trains, too, at 5e-4", ("attention_lr=5.0e-4",)),
    "second_half": Method(
        "second half of the blocks", ("vision_blocks=second_half", "text_blocks=second_half")
    ),
    "rank_8": Method("low-rank experts, rank 8", ("experts=truncated", "rank=8"), stages_of="dmu"),
    "rank_64_trained": Method(
        "low-rank changes that train, rank 64", (*_CHANGES_TRAIN, "rank=64")
    ),
    "router_lr_low": Method("router lr / 3", ("router.lr=1.0e-3",), stages_of="dmu"),
    "no_balance": Method("no balance loss", ("router.balance=0",), stages_of="dmu"),
}

_NO_PATCH_LOSS = ("stage.patch_loss=0", "router.patch_loss=0")
_NO_EARLIER_PAIRS = ("stage.earlier_pairs=0", "router.earlier_pairs=0")

#: Both sides of the question with CLIP's loss alone, as the paper trains (no loss on patch tokens,
#: no negatives but the batch's): what of the difference is the mixture's, what the losses'. On
#: validation scenes direct fine-tuning's rates are best with it, too. Then DMU without either.
FEWER_LOSSES: dict[str, Method] = {
    f"{name}_clip_loss": Method(
        f"{METHODS[name].title}, CLIP's loss alone",
        (*METHODS[name].overrides, *_NO_PATCH_LOSS, *_NO_EARLIER_PAIRS),
    )
    for name in ("direct", "direct_ffn", "dmu")
} | {
    "patch_loss_0": Method("CLIP-MoE (DMU), no loss on patch tokens", _NO_PATCH_LOSS),
    "earlier_pairs_0": Method("CLIP-MoE (DMU), no pairs of earlier batches", _NO_EARLIER_PAIRS),
}

_FEW_PAIRS = "data.num_pairs=4000"

#: A quarter of the pairs in as many steps, six epochs: where detailed captions are scarce. Direct
#: fine-tuning has the best of three rates on validation scenes, DMU its own.
FEWER_PAIRS: dict[str, Method] = {
    f"{name}_few_pairs": Method(
        f"{METHODS[name].title}, 4,000 pairs", (*METHODS[name].overrides, _FEW_PAIRS, *rate)
    )
    for name, rate in (
        ("direct", ("stage.lr=2.5e-4",)),
        ("direct_ffn", ("stage.lr=5.0e-4",)),
        ("dmu", ()),
    )
}

_ATTENTION = ("attention_lr=5.0e-4", "stage.lr=2.0e-3", "stage.patch_loss=1")

#: For an MLLM's sake: attention trains beside the networks, patch tokens count as much as the class
#: token, and half of a stage's pairs come at random, so that the main object is not forgotten.
ATTENTION: dict[str, Method] = {
    "direct_ffn_attention": Method(
        "direct fine-tuning, FFN and attention",
        ("method=direct", "direct_parameters=ffn", *_ATTENTION),
    ),
    "dmu_attention": Method(
        "CLIP-MoE (DMU), attention too",
        (*_ATTENTION, "global_share=0.5", "router.patch_loss=1"),
    ),
}

#: Asked for by name alone. So that what clusters do not ask for is not forgotten, the experts train
#: on with their routers, on random pairs and in more than half of the steps, after short stages all
#: of whose pairs are of clusters; attention as above.
TUNED_ON: dict[str, Method] = {
    "dmu_tuned_on": Method(
        "CLIP-MoE (DMU), attention too, experts tuned on",
        (
            *_ATTENTION, "stage.steps=53", "global_share=0", "router.steps=251",
            "router.experts_lr=1.0e-3", "router.optimizer=muon", "router.lr=1.0e-3",
            "router.weight_decay=0", "router.global_share=1", "router.patch_loss=2",
        ),
    ),
}  # fmt: skip

ALL = {**METHODS, **FEWER_LOSSES, **FEWER_PAIRS, **ATTENTION, **TUNED_ON, **ABLATIONS}


def in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """The methods with those whose stages they take, each after what it needs.

    Raises:
        InputError: There is no such method; the nearest one is named.
    """
    for name in names:
        if name not in ALL:
            nearest = nearest_name(name, list(ALL))
            raise InputError(f"there is no method '{name}'; the nearest known one is '{nearest}'")
    needed = {*names, "dense", *(ALL[name].stages_of for name in names)}
    return tuple(name for name in ALL if name in needed)
