"""Recipes as dataclasses: the only schema of what a YAML recipe may say.

Light to import. Counts start with ``num_``; learning rates are peaks; paths are as the user typed
them.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen, Predicate

Positive = Annotated[int, Gt(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["cosine", "linear", "constant"]
Blocks = (
    Literal["all", "none", "every_second", "second_half", "odd_second_half"]
    | Annotated[str, Predicate(lambda name: re.fullmatch(r"last_[1-9]\d*", name) is not None)]
    | list[Annotated[int, Ge(0)]]
)
LogTo = Literal["none", "tensorboard", "trackio", "wandb"]


class Strict:
    """Validated by pydantic: a key that the dataclass does not have is an error."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(kw_only=True)
class Recipe(Strict):
    """What every recipe says."""

    out: str
    """Folder that is written."""
    seed: Annotated[int, Ge(0)] = 0


@dataclass(kw_only=True)
class ImageTextData(Strict):
    """Image-text pairs for contrastive training."""

    name: Literal["scenes", "jsonl", "csv", "llava_json", "webdataset", "datasets"] = "scenes"
    path: str | None = None
    """``jsonl``, ``csv``: the file, or a folder with one. ``llava_json``: the file; a picture's
    first answer is its caption. ``webdataset``: a tar shard, a folder or a pattern. ``datasets``:
    a saved data set, a folder of Parquet files, or a name on the hub."""
    image_folder: str | None = None
    """Where the pictures' paths start; the file's own folder by default."""
    image_field: str = "image"
    """``jsonl``, ``csv``, ``datasets``: the field or column of the picture."""
    caption_field: str = "caption"
    """``jsonl``, ``csv``, ``datasets``, JSON in ``webdataset``: that of the caption."""
    dataset_split: str = "train"
    """``datasets``."""
    num_pairs: Positive | None = None
    """The first so many; of files all by default, of scenes 4,000."""
    split: Literal["train", "validation", "test", "compositional"] = "train"
    """``scenes``."""
    caption: Literal["coarse", "detailed"] = "coarse"
    """``scenes``: the main object as the web names it, or every factor."""
    detail_probability: Share = 0.1
    """``scenes``: how often a coarse caption tells each fact beyond the main object."""
    coarse_share: Share = 0.0
    """``scenes`` with ``detailed`` captions: share of pairs that have a coarse one instead, so that
    short captions are not forgotten."""
    world: dict[str, Any] = field(default_factory=dict)
    """``scenes``: keyword arguments of ``mllm.scenes.SceneWorld``."""


@dataclass(kw_only=True)
class ContrastiveTraining(Strict):
    """One contrastive training run: linear warm-up, cosine to zero."""

    steps: Positive
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: Muon for the matrices inside the blocks, AdamW for the rest, at one rate."""
    batch_size: Annotated[int, Ge(2)] = 256
    lr: PositiveFloat
    weight_decay: NonNegative = 0.2
    warmup_steps: Annotated[int, Ge(0)] = 50
    label_smoothing: Share = 0.0
    logit_scale: PositiveFloat | None = None
    """Fixed inverse temperature; the model's own, trained where all parameters train, if null."""
    patch_loss: NonNegative = 0.0
    """Weight of the same loss with the mean of each picture's patch tokens in the class token's
    place. CLIP's own asks nothing of them after the last attention, and an MLLM reads them."""
    patch_layer: int = -2
    """Whose output these tokens are: an MLLM's ``vision_feature_layer``."""
    earlier_pairs: Annotated[int, Ge(0)] = 0
    """Pairs of the batches before whose features, as they were then, are negatives too
    (cross-batch memory, arXiv 1912.06798)."""


@dataclass(kw_only=True)
class RouterTraining(ContrastiveTraining):
    """Tuning the routers, with the balance loss of every block."""

    kind: Literal["trained", "training_free", "uniform", "random"] = "trained"
    """``training_free``: routed by the leading singular vectors of the experts' weights (after
    SSMoE), ``uniform``: all experts mixed evenly, ``random``: routers as they are drawn; none of
    them with a step of training, but for a base gate's."""
    global_share: Share = 1.0
    """Share of the pairs in ordinary random batches; the others come from the last stage's
    clusters, where there are any, so that routers learn from pairs that are alike. 1 is the paper's
    way."""
    spectral_rank: Positive = 8
    """``training_free``: how many vectors of each expert."""
    balance: NonNegative = 0.01
    """Weight of the balance loss."""
    z: NonNegative = 0.0
    """Weight of the z-loss, ``mean(logsumexp(logits)²)`` (CuMo: 0.01)."""
    bias_rate: NonNegative = 0.0
    """Balancing without a loss (arXiv 2408.15664: 0.001): after each step the bias that an expert
    is chosen by moves by so much, towards an even load."""
    experts_lr: PositiveFloat | None = None
    """Train the experts with the routers, at this rate, and where stages train the attention, that,
    too, at as large a share of it as there. Frozen, the paper's way, if null."""
    base_gate: bool = False
    """Keep the base's network always on, beside ``top_k`` of the others, with a share that is
    learnt for each token (CLIP-FMoE)."""


@dataclass(kw_only=True)
class ContrastiveRecipe(Recipe):
    """A dense CLIP, trained from scratch or from pretrained weights."""

    kind: Literal["contrastive"] = "contrastive"
    model: dict[str, Any] | str
    """A CLIP folder, a name of open_clip's, or a configuration as in its ``model_configs``."""
    pretrained: str | None = None
    """open_clip's tag of the weights to start from; random weights without."""
    data: ImageTextData = field(default_factory=ImageTextData)
    training: ContrastiveTraining
    precision: Precision = "auto"
    save_steps: Positive | None = None
    """Write a checkpoint every so many steps, until the stage is done."""


@dataclass(kw_only=True)
class UpcycleRecipe(Recipe):
    """Diversified multiplet upcycling (arXiv 2409.19291): a dense CLIP becomes a CLIP-MoE; and the
    baselines that show what it is good for, at the same number of steps."""

    kind: Literal["upcycle"] = "upcycle"
    method: Literal["dmu", "shuffled_labels", "seeds", "sparse", "direct"] = "dmu"
    """``shuffled_labels``: DMU, its clusters' pairs exchanged at random; ``seeds``: stages from the
    base on random batches, which differ in their seed alone; ``sparse``: sparse upcycling, copies
    of the base that train together with the router, in as many steps as all stages and the router;
    ``direct``: the dense CLIP, fine-tuned in as many steps, and dense it stays."""
    direct_parameters: Literal["all", "ffn"] = "all"
    """``direct``: what trains; ``ffn`` is what a stage trains."""
    model: dict[str, Any] | str
    """A CLIP folder, a name that open_clip knows, or an open_clip configuration."""
    pretrained: str | None = None
    text_context: Positive | None = None
    """Stretch the text tower's positions to so many, for long captions (Long-CLIP: 248); as the
    model has them by default."""
    data: ImageTextData = field(default_factory=lambda: ImageTextData(caption="detailed"))
    num_experts: Annotated[int, Ge(2)] = 4
    """The base and one expert for each stage."""
    top_k: Positive = 2
    vision_blocks: Blocks = "all"
    """Blocks of the image tower whose feed-forward networks become experts, and train in the
    stages: ``all``, ``none``, ``last_2`` (or another number), ``every_second``, ``second_half``,
    ``odd_second_half`` (CLIP-FMoE), or their numbers from 0."""
    text_blocks: Blocks = "all"
    """Of the text tower."""
    num_clusters: Annotated[int, Ge(2)] = 3
    """K, for each modality and stage."""
    cluster_modality: Literal["both", "image", "text"] = "both"
    """Whose features are clustered."""
    features: Literal["pass", "training"] = "training"
    """What is clustered before a stage. ``training``: the features that the model of the stage
    before had of each pair when it last trained on it, which cost a pass over those pairs alone
    that it did not see. Before the first stage: the base's features of one pair in 32, but at least
    some hundreds and at most 16,384; to their clusters the other pairs go by the words of their
    captions. ``pass``: the features of the model of the stage before, or the base, in a pass over
    all pairs before each stage, as in the paper."""
    clusters: Literal["sequential", "parallel"] = "sequential"
    """``sequential``: each stage clusters anew and refines the clusters before. ``parallel``
    (CLIP-FMoE): the base's features are clustered once, in one modality, and each stage trains on
    one of the clusters alone, from the base; there are as many clusters as stages. Other pairs fill
    up the batches of a cluster that is smaller than a batch."""
    experts: Literal["full", "low_rank", "truncated"] = "full"
    """``low_rank``: a stage trains a change of low rank of the base's frozen networks, and the
    experts share the base. ``truncated``: a stage trains whole networks, and put together each is
    cut to a change of low rank of their mean, which takes the base's place; the router is tuned for
    these."""
    rank: Positive = 32
    """Of the changes of ``low_rank`` and ``truncated`` experts."""
    expert_spread: Share = 1.0
    """How far the experts stay from their mean when they are put together: 1, as they were trained
    (the paper's way), 0.5 half as far, 0 all alike. Below 1 expert 0 is no longer the base."""
    base_share: Share = 0.0
    """How much of the base goes into every expert when they are put together, against forgetting
    (WiSE-FT): 0 is the paper's way."""
    stage_init: Literal["base", "previous"] = "previous"
    """Where a stage's networks start: the paper says ``previous``, its code ``base``."""
    attention_lr: PositiveFloat | None = None
    """Train the attention beside the networks, too, at this rate: in the stages, each of which goes
    on from the one before, and the CLIP-MoE has the last one's; in direct fine-tuning and sparse
    upcycling all along. Frozen, the paper's way, if null (direct fine-tuning of all parameters:
    at ``stage.lr``)."""
    global_share: Share = 0.0
    """Share of a stage's pairs in ordinary random batches."""
    stage: ContrastiveTraining
    router: RouterTraining
    precision: Precision = "auto"
    save_steps: Positive | None = None
    """Write a checkpoint every so many steps, until the stage is done."""


@dataclass(kw_only=True)
class InstructionSource(Strict):
    """Pictures with what is said, or asked and answered, about them."""

    name: Literal[
        "scenes_captions",
        "scenes_questions",
        "easy_vqa",
        "llava_json",
        "jsonl",
        "parquet",
        "webdataset",
        "datasets",
    ]
    """Records of ``llava_json`` (a list), ``jsonl``, ``parquet``, ``webdataset`` and ``datasets``
    are LLaVA's ``conversations`` or Hugging Face's chat ``messages``."""
    path: str | None = None
    """Of records: the file; with ``*`` or ``{00..12}`` several. ``datasets``: the data set's name
    or folder. ``easy_vqa``: a folder instead of the installed package's."""
    image_folder: str | None = None
    """Of records: where relative picture paths start; the file's own folder by default."""
    allow_outside: bool = False
    """Of records: pictures may lie outside of that folder."""
    weight: PositiveFloat = 1.0
    """How often each sample occurs in an epoch: 2 shows it twice, 0.5 draws half of them, and the
    other half in the next epoch."""
    split: str = "train"
    num_images: Positive | None = None
    """Drawn with the seed; all of them by default. Of ``parquet`` and ``datasets`` the first so
    many records, of other files so many records. Scenes are made to order: it must be given."""
    questions_per_image: Positive | None = None
    """Drawn with the seed; all of them by default."""
    categories: list[str] | None = None
    """``easy_vqa``: only questions of these categories; all by default."""
    balance_answers: bool = False
    """``easy_vqa``: leave questions out until no answer is likely from the words alone."""
    image_size: Positive = 64
    """``scenes_*``: side in pixels."""
    world: dict[str, Any] = field(default_factory=dict)
    """``scenes_*``: keyword arguments of ``mllm.scenes.SceneWorld``."""


@dataclass(kw_only=True)
class PartTraining(Strict):
    """How a part of the MLLM trains: not at all, by low-rank adapters, or all of it."""

    mode: Literal["frozen", "lora", "full"] = "frozen"
    lr: PositiveFloat = 2e-4
    r: Positive = 16
    """LoRA: rank."""
    alpha: PositiveFloat = 32.0
    """LoRA: the update is scaled by ``alpha / r``."""
    dropout: Annotated[float, Ge(0), Le(0.9)] = 0.0
    target: Literal["all-linear"] | Annotated[list[str], MinLen(1)] = "all-linear"
    """LoRA: names of the layers that get an adapter."""


@dataclass(kw_only=True)
class ConnectorTraining(PartTraining):
    mode: Literal["frozen", "lora", "full"] = "full"
    lr: PositiveFloat = 1e-3


@dataclass(kw_only=True)
class LLMTraining(PartTraining):
    pass


@dataclass(kw_only=True)
class TowerTraining(PartTraining):
    """``lr``: CuMo's for a tower that trains with all else."""

    lr: PositiveFloat = 2e-6


@dataclass(kw_only=True)
class RouterPartTraining(PartTraining):
    lr: PositiveFloat = 1e-4


@dataclass(kw_only=True)
class Trainable(Strict):
    """What trains; the parts do not overlap, and a part that is not named is frozen.

    Where a part of the tower trains, the tower runs in every step; otherwise its features are
    computed once and kept.
    """

    connector: ConnectorTraining = field(default_factory=ConnectorTraining)
    """All between tower and language model, with routers and experts of its own if it has any."""
    llm: LLMTraining = field(default_factory=LLMTraining)
    """The language model with its head, without the routers of one that is a mixture."""
    llm_router: RouterPartTraining = field(default_factory=RouterPartTraining)
    vision: TowerTraining = field(default_factory=TowerTraining)
    """The tower without its routers and experts; all of a dense tower."""
    router: RouterPartTraining = field(default_factory=RouterPartTraining)
    experts: TowerTraining = field(default_factory=TowerTraining)

    @property
    def tower_trains(self) -> bool:
        return any(part.mode != "frozen" for part in (self.vision, self.router, self.experts))

    @property
    def adapted_parts(self) -> list[str]:
        names = ("connector", "llm", "llm_router", "vision", "router", "experts")
        return [name for name in names if getattr(self, name).mode == "lora"]


@dataclass(kw_only=True)
class InstructionRecipe(Recipe):
    """An MLLM: connector pretraining on captions, or instruction tuning."""

    kind: Literal["instruction"] = "instruction"
    llm: str = "embedded"
    """``embedded`` (SmolLM2-135M-Instruct), a folder, or a name on the model hub."""
    llm_quantization: Literal["none", "nf4"] = "none"
    """``nf4``: the language model's linear layers in four bits (QLoRA); tower, connector and head
    stay as they are."""
    frozen_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights that do not train; those that do are fp32."""
    tower: str | None = None
    """CLIP-MoE folder, or any vision tower's folder or name on the model hub; with ``init_from`` it
    replaces that model's tower."""
    init_from: str | None = None
    """An MLLM folder to go on from; ``llm`` and ``connector_start`` are then unused."""
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """``full``: the connector reads the CLS token too, ``default``: the patches alone."""
    images: Literal["square", "pad", "tiles"] | None = None
    """How pictures become square: ``square`` resizes and crops the middle, ``pad`` (LLaVA-1.5's
    tuning) pads with the mean color, ``tiles`` (LLaVA-NeXT) cuts a larger one up and shows the
    whole beside it. As the tower or ``init_from`` has it by default."""
    image_grid: list[tuple[Positive, Positive]] = field(
        default_factory=lambda: [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    )
    """``tiles``: rows and columns that may be chosen from."""
    image_size: Positive | None = None
    """Side of the tower's input; position embeddings are interpolated to a larger one."""
    connector: dict[str, Any] | None = None
    """``{name: ..., option: ...}`` of ``mllm.connectors``; LLaVA's ``mlp2x_gelu`` by default. With
    ``init_from`` only ``moe_mlp``: that model's MLP is upcycled to experts."""
    connector_start: Literal["words", "random"] = "random"
    """``words``: taught each picture's words before the language model takes part."""
    connector_start_data: list[InstructionSource] = field(default_factory=list)
    """Pictures and answers for that start; those of ``data`` by default."""

    template: Literal["chat", "plain"] = "chat"
    """``plain`` (LLaVA pretraining): picture, then answer; questions are discarded."""
    chat_template: Literal["v1", "llama2", "llama3", "chatml"] | None = None
    """A published format instead of the language model's own; ``v1`` is Vicuna's."""
    max_length: Positive | None = None
    """Most tokens of one conversation, pictures included; the language model's context at most."""
    data: Annotated[list[InstructionSource], MinLen(1)]

    trainable: Trainable = field(default_factory=Trainable)
    balance: NonNegative = 0.01
    """Weight of the balance loss of tower and connector blocks that are mixtures and train."""
    router_z: NonNegative = 0.0
    """Weight of their routers' z-loss, ``mean(logsumexp(logits)²)``."""
    llm_balance: NonNegative | None = None
    """Weight of a mixture language model's own balance loss; what its config says by default."""
    batch_rows: Positive = 16
    """At most so many pictures in a batch of one process."""
    max_tokens_per_batch: Positive = 4096
    """At most so many tokens, padding included, in a batch of one process."""
    group_by_modality: bool = False
    """Batches, and as far as they go round optimiser steps, of samples with pictures and of text
    alone apart (LLaVA-1.5's tuning)."""
    gradient_accumulation: Positive = 1
    """Batches of one process for an optimiser step."""
    global_batch: Positive | None = None
    """Rows of an optimiser step: sets ``gradient_accumulation`` by ``batch_rows`` and the number of
    processes, so that the same recipe does the same on one and on several."""
    epochs: PositiveFloat | None = 1.0
    steps: Positive | None = None
    """Optimiser steps; takes precedence over ``epochs``."""
    schedule: Schedule = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: NonNegative = 0.0
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    """Compute the language model's blocks a second time in the backward pass instead of keeping
    what they made: a third more work, and a fraction of the memory."""
    precision: Precision = "auto"
    """``auto``: bf16 autocast where the processor computes it natively, fp32 elsewhere."""
    int8_products: bool = False
    """On a CPU in bf16, with a language model of Llama's or Qwen2's kind that is frozen or has
    adapters: its own weights of gate and up are multiplied in whole numbers of 8 bits, and so is
    every gradient with its own weights (:mod:`train.int8_products`). What is saved are its weights
    as they were. Elsewhere nothing changes."""
    tower_precision: Precision | None = None
    """Of a frozen tower's features; that of the training by default."""

    log_steps: Positive = 5
    log_to: LogTo = "none"
    """Curves for TensorBoard (``OUT.logs``), trackio or Weights & Biases."""
    save_steps: Positive | None = None
    """Write a checkpoint every so many steps and after the last, beside ``out``, until the run is
    done."""
    keep_checkpoints: Positive = 1
    """So many of the newest."""
    resume: Literal["auto", "never"] = "auto"
    """``auto``: go on from the newest whole checkpoint of this recipe."""


RECIPE_KINDS: dict[str, type[Recipe]] = {
    "contrastive": ContrastiveRecipe,
    "upcycle": UpcycleRecipe,
    "instruction": InstructionRecipe,
}
