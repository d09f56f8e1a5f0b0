"""Full experts as low-rank changes of one network: truncated singular value decomposition.

D width, H hidden features, E experts, R rank.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vision_moe.checkpoint import load, save
from vision_moe.errors import InputError
from vision_moe.expert_spread import spread_experts
from vision_moe.feed_forward import FFNParts, split_ffn
from vision_moe.low_rank import LowRankExperts
from vision_moe.modeling import CLIPMoEModel
from vision_moe.moe import MoEFeedForward
from vision_moe.routing import moe_layers

#: What the experts are changes of.
Center = Literal["expert_0", "mean"]


@dataclass(frozen=True)
class BlockError:
    """What a block has lost.

    Attributes:
        name: of the MoE layer.
        rank: R.
        change_error: ``|change - its approximation| / |change|`` over all experts (Frobenius).
        output_error: the same of the layer's output on random tokens.
    """

    name: str
    rank: int
    change_error: float
    output_error: float


def convert_low_rank(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    energy: float = 0.9,
    rank: int | None = None,
    center: Center = "expert_0",
) -> list[BlockError]:
    """Read a CLIP-MoE folder of full experts and write one of low-rank experts.

    Args:
        source: the folder.
        out: the new folder.
        energy: see :func:`to_low_rank`.
        rank: see :func:`to_low_rank`.
        center: see :func:`to_low_rank`.
    """
    if Path(source).resolve() == Path(out).resolve():
        raise InputError(f"{out}: the folder that is read cannot be the one that is written")
    model = load(source)
    errors = to_low_rank(model, energy, rank, center)
    save(model, out)
    return errors


@torch.no_grad()
def to_low_rank(
    model: CLIPMoEModel,
    energy: float = 0.9,
    rank: int | None = None,
    center: Center = "expert_0",
) -> list[BlockError]:
    """Replace the full experts of every block by low-rank ones on one network, in place.

    Args:
        model: a CLIP-MoE of full experts.
        energy: share of the squared singular values that the rank of a block keeps in each of its
            experts' changes, above 0 and up to 1.
        rank: the same rank for all blocks instead.
        center: that network: expert 0, which stays as it is, or the mean of all, which takes its
            place: what is common to all then costs no rank.

    Returns:
        What each block has lost, in the order of the modules.
    """
    if not 0 < energy <= 1:
        raise InputError(f"energy is {energy}, it must be above 0 and at most 1")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, it must be at least 1")
    layers = moe_layers(model)
    if not layers or model.config.moe is None or model.config.moe["num_experts"] < 2:
        raise InputError("this CLIP is dense: it has no experts to convert")
    if any(isinstance(layer.experts, LowRankExperts) for layer in layers.values()):
        raise InputError("the experts of this CLIP are of low rank already")
    # Everything that can be wrong is found before the model is touched.
    anatomy = {name: _check(name, layer) for name, layer in layers.items()}
    errors = []
    for name, layer in tqdm(layers.items(), desc="decomposing", unit="block", delay=2):
        errors.append(_convert(name, layer, anatomy[name], energy, rank, center))
    ranks: dict[str, list[int]] = {"visual": [], "text": []}
    for error in errors:
        ranks[error.name.partition(".")[0]].append(error.rank)
    model.config.moe["vision_ranks"] = ranks["visual"]
    model.config.moe["text_ranks"] = ranks["text"]
    return errors


def _check(name: str, layer: MoEFeedForward) -> FFNParts:
    assert isinstance(layer.experts, nn.ModuleList)
    parts = split_ffn(layer.experts[0])
    own = [_between(parts, expert) for expert in layer.experts]
    for index, values in enumerate(own):
        if any(not torch.equal(value, own[0][key]) for key, value in values.items()):
            raise InputError(
                f"{name}: expert {index} has a normalisation of its own, which low-rank experts"
                " share"
            )
    return parts


def _between(parts: FFNParts, expert: nn.Module) -> dict[str, Tensor]:
    linears = tuple(f"{name}." for name in parts.linears)
    return {k: v for k, v in expert.state_dict().items() if not k.startswith(linears)}


def _convert(
    name: str,
    layer: MoEFeedForward,
    parts: FFNParts,
    energy: float,
    rank: int | None,
    center: Center,
) -> BlockError:
    assert isinstance(layer.experts, nn.ModuleList)
    base, *others = layer.experts
    if center == "mean":
        base = copy.deepcopy(base)
        base.load_state_dict(spread_experts([one.state_dict() for one in layer.experts], 0)[0])
    spectra = [
        {key: _decompose(_weight(other, key) - _weight(base, key)) for key in parts.linears}
        for other in others
    ]
    all_values = [values for spectrum in spectra for values, _, _ in spectrum.values()]
    if rank is None:
        rank = max((_rank_for(values, energy) for values in all_values), default=1)
    rank = min(rank, max(len(values) for values in all_values))
    total = sum(float(values.sum()) for values in all_values)
    lost = sum(float(values[rank:].sum()) for values in all_values)
    changes = []
    for other, spectrum in zip(others, spectra, strict=True):
        change: dict[str, Tensor] = {}
        for key, (_, left, right) in spectrum.items():
            change[f"{key}.a"], change[f"{key}.b"] = right[:rank], left[:, :rank]
            ours, theirs = base.get_submodule(key).bias, other.get_submodule(key).bias
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                change[f"{key}.bias"] = theirs - ours
        changes.append(change)
    x = _tokens(layer)
    before = layer(x)
    layer.experts = LowRankExperts(copy.deepcopy(base), changes)
    after = layer(x)
    return BlockError(
        name,
        rank,
        change_error=(lost / total) ** 0.5 if total else 0.0,
        output_error=float((after - before).norm() / before.norm()),
    )


def _weight(ffn: nn.Module, name: str) -> Tensor:
    weight = ffn.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.double()


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``matrix = left @ right``, ordered by what each rank adds.

    By the eigenvectors of the smaller Gram matrix in fp64: several times quicker than the
    decomposition itself, and its small singular values are what is thrown away.

    Returns:
        Squared singular values ``(N,)``, left ``(out, N)``, right ``(N, in)``.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if wide:
        return values, vectors, vectors.T @ matrix
    return values, matrix @ vectors, vectors.T


def _rank_for(squares: Tensor, energy: float) -> int:
    """Ranks that keep this share of the squared singular values; 1 at least."""
    if not float(squares.sum()):
        return 1
    kept = squares.cumsum(0) / squares.sum()
    return min(int((kept < energy - 1e-12).sum()) + 1, len(squares))


def _tokens(layer: MoEFeedForward, num_tokens: int = 256) -> Tensor:
    """``(T, D)`` with the statistics of a layer norm's output."""
    weight = layer.router.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, layer.width, generator=generator)
    return x.to(weight.device, weight.dtype)


def error_table(errors: Sequence[BlockError]) -> str:
    """The errors as lines of text."""
    width = max(len(error.name) for error in errors)
    lines = [f"{'block':<{width}}  {'rank':>5}  {'change lost':>11}  {'output error':>12}"]
    lines += [
        f"{e.name:<{width}}  {e.rank:>5}  {e.change_error:>11.2%}  {e.output_error:>12.2%}"
        for e in errors
    ]
    return "\n".join(lines)
