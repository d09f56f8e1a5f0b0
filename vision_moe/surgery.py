"""Finding a model's feed-forward networks by structure, and replacing them by MoE layers.

Nothing here knows an architecture by name: a feed-forward network is a child of a residual block
(an item of a ``ModuleList`` or ``Sequential``) whose linear layers map width -> hidden -> width.
open_clip's own transformers, timm's ViT family and Hugging Face's encoders all have this shape.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vision_moe.errors import InputError
from vision_moe.feed_forward import split_ffn
from vision_moe.low_rank import LowRankExperts
from vision_moe.moe import MoEFeedForward
from vision_moe.routers import DEFAULT_ROUTER, RouterOptions, SpectralRouter

if TYPE_CHECKING:
    from vision_moe.modeling import CLIPMoEModel


@dataclass(frozen=True)
class FFNSite:
    """A feed-forward network in its tower.

    ``name`` is qualified from the module that was searched; ``layer_index`` counts the blocks that
    have a feed-forward network (dense or MoE) from 0.
    """

    name: str
    module: nn.Module
    layer_index: int

    @property
    def width(self) -> int:
        """Features in and out."""
        return _linears(self.module)[-1].out_features

    @property
    def hidden_size(self) -> int:
        """Features between."""
        return _linears(self.module)[-1].in_features


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _is_ffn(module: nn.Module) -> bool:
    """Whether every linear layer but the last maps W -> H (or 2H, gate and value packed), and the
    last H -> W; with nothing inside that mixes tokens, since tokens are routed one by one."""
    if any(
        hasattr(part, "num_heads")
        or isinstance(part, (nn.MultiheadAttention, MoEFeedForward, nn.modules.conv._ConvNd))
        for part in module.modules()
    ):
        return False
    linears = _linears(module)
    if len(linears) < 2:
        return False
    *ups, down = linears
    width, hidden = down.out_features, down.in_features
    has_shape = all(
        up.in_features == width and up.out_features in (hidden, 2 * hidden) for up in ups
    )
    # An attention's projections have this shape, too, where hidden features are as many as width.
    return has_shape and (hidden != width or _runs_in_order(module))


def _runs_in_order(module: nn.Module) -> bool:
    try:
        split_ffn(module)
    except InputError:
        return False
    return True


def find_ffns(tower: nn.Module) -> list[FFNSite]:
    """The dense feed-forward networks of a tower (or of a whole model), first block first."""
    sites: list[FFNSite] = []
    num_layers = 0
    inside_moe: list[str] = []
    for container_name, container in tower.named_modules():
        if any(container_name.startswith(prefix) for prefix in inside_moe):
            continue
        if isinstance(container, MoEFeedForward):
            inside_moe.append(f"{container_name}.")
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        for block_name, block in container.named_children():
            for child_name, child in block.named_children():
                if isinstance(child, MoEFeedForward):
                    num_layers += 1
                elif _is_ffn(child):
                    parts = (container_name, block_name, child_name)
                    sites.append(FFNSite(".".join(filter(None, parts)), child, num_layers))
                    num_layers += 1
    return sites


def attention_beside(model: nn.Module, site: FFNSite) -> dict[str, nn.Module]:
    """The attention of the block that a feed-forward network stands in, by its name.

    Args:
        model: What ``site`` is named from.
        site: The network.
    """
    block = site.name.rpartition(".")[0]
    return {
        f"{block}.{name}": child
        for name, child in model.get_submodule(block).named_children()
        if any(hasattr(part, "num_heads") for part in child.modules())
    }


def block_classes(tower: nn.Module) -> set[str]:
    """Names of the classes of the blocks that hold a feed-forward network, dense or not."""
    return {
        type(block).__name__
        for container in tower.modules()
        if isinstance(container, (nn.ModuleList, nn.Sequential))
        for block in container.children()
        if any(isinstance(child, MoEFeedForward) or _is_ffn(child) for child in block.children())
    }


def ffn_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights of every dense feed-forward network, by qualified name: one expert."""
    return {
        f"{site.name}.{key}": value.detach().clone()
        for site in find_ffns(model)
        for key, value in site.module.state_dict().items()
    }


def load_ffn_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of an expert into the dense feed-forward networks of ``model``."""
    for site in find_ffns(model):
        site.module.load_state_dict(_of_site(state_dict, site.name, "expert weights"))


def insert_moe(
    tower: nn.Module,
    layers: Collection[int],
    num_experts: int,
    top_k: int,
    generator: torch.Generator | None = None,
    ranks: Sequence[int] | None = None,
    router: RouterOptions = DEFAULT_ROUTER,
) -> list[str]:
    """Replace the feed-forward networks of the given layers by MoE layers of identical experts.

    Args:
        tower: changed in place.
        layers: layer indices, as ``find_ffns`` numbers them.
        num_experts: E; every expert starts as a copy of the network that it replaces.
        top_k: K.
        generator: draws the routers' weights.
        ranks: for low-rank experts, the rank in each of ``layers``.
        router: its options.

    Returns:
        The names of the replaced networks, first block first.
    """
    sites = {site.layer_index: site for site in find_ffns(tower)}
    if ranks is not None and len(ranks) != len(layers):
        raise InputError(f"{len(ranks)} ranks for {len(layers)} MoE layers")
    rank_of = dict(zip(layers, ranks, strict=True)) if ranks is not None else {}
    names = []
    for index in _check_layers(layers, sites, tower):
        site = sites[index]
        first = next(site.module.parameters())
        rank = rank_of.get(index)
        experts: LowRankExperts | list[nn.Module] = (
            [copy.deepcopy(site.module) for _ in range(num_experts)]
            if rank is None
            else LowRankExperts.empty(site.module, num_experts, rank)
        )
        moe = MoEFeedForward(experts, site.width, top_k, generator, router)
        moe.to(first.device, first.dtype)
        moe.train(site.module.training)
        tower.set_submodule(site.name, moe)
        names.append(site.name)
    return names


def upcycle(
    model: "CLIPMoEModel",
    expert_state_dicts: Sequence[Mapping[str, Tensor]],
    top_k: int = 2,
    vision_layers: Sequence[int] | None = None,
    text_layers: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    rank: int | None = None,
    router: RouterOptions = DEFAULT_ROUTER,
) -> "CLIPMoEModel":
    """Turn a dense CLIP into a CLIP-MoE: expert j has the feed-forward weights of stage j.

    Args:
        model: dense; changed in place, its configuration too.
        expert_state_dicts: E results of ``ffn_state_dict``, the base's first.
        top_k: K (the paper: 2 of 4).
        vision_layers: which vision blocks become MoE; all by default.
        text_layers: which text blocks become MoE; all by default.
        generator: draws the routers' weights.
        rank: makes low-rank experts: the base's state dict is then followed by those of the others'
            changes, ``<network>.`` before the names of :attr:`LowRankFFN.deltas`.
        router: its options; a spectral one takes its directions from the experts.

    Returns:
        ``model``.
    """
    if model.config.moe is not None:
        raise InputError("this CLIP is a mixture of experts already; only a dense one is upcycled")
    num_experts = len(expert_state_dicts)
    num_routed = num_experts - router.base_gate
    if not 1 <= top_k <= num_routed:
        raise InputError(f"top_k is {top_k}, it must be from 1 to the {num_routed} experts")
    towers = {"visual": (model.visual, vision_layers), "text": (model.text, text_layers)}
    layers: dict[str, list[int]] = {}
    weights: dict[str, list[dict[str, Tensor]]] = {}
    # What the input can get wrong is checked before the model is touched.
    for prefix, (tower, wanted) in towers.items():
        names = {site.layer_index: f"{prefix}.{site.name}" for site in find_ffns(tower)}
        layers[prefix] = _check_layers(names if wanted is None else wanted, names, tower)
        for index in layers[prefix]:
            weights[names[index]] = [
                _of_site(state, names[index], f"expert {j}")
                for j, state in enumerate(expert_state_dicts)
            ]
    if not weights:
        raise InputError("no feed-forward network was found or chosen: nothing to upcycle")
    for prefix, (tower, _) in towers.items():
        ranks = None if rank is None else [rank] * len(layers[prefix])
        for name in insert_moe(tower, layers[prefix], num_experts, top_k, generator, ranks, router):
            moe = tower.get_submodule(name)
            assert isinstance(moe, MoEFeedForward)
            states = weights[f"{prefix}.{name}"]
            if isinstance(moe.experts, LowRankExperts):
                moe.experts.base.load_state_dict(states[0])
                for index, change in enumerate(states[1:]):
                    moe.experts.fill(index, change)
            else:
                for expert, state in zip(moe.experts, states, strict=True):
                    expert.load_state_dict(state)
            if isinstance(moe.router, SpectralRouter):
                moe.router.fit(moe.experts)  # type: ignore[arg-type]
    model.config.moe = {
        "num_experts": num_experts,
        "top_k": top_k,
        "vision_layers": layers["visual"],
        "text_layers": layers["text"],
    }
    if router != DEFAULT_ROUTER:
        model.config.moe["router"] = asdict(router)
    if rank is not None:
        for tower_name, prefix in (("vision", "visual"), ("text", "text")):
            model.config.moe[f"{tower_name}_ranks"] = [rank] * len(layers[prefix])
    return model


def _check_layers(
    layers: Iterable[int], sites: Collection[int], tower: nn.Module
) -> list[int]:
    wanted = sorted(set(layers))
    if unknown := [index for index in wanted if index not in sites]:
        raise InputError(
            f"no dense feed-forward network in layer(s) {unknown} of {type(tower).__name__}: "
            f"it has them in {sorted(sites)}"
        )
    return wanted


def _of_site(state_dict: Mapping[str, Tensor], name: str, what: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not part:
        raise InputError(f"{what}: no weights for {name}")
    return part
