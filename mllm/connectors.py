"""Connectors: image tokens of a tower -> input embeddings of a language model.

    linear         one layer
    mlpNx_gelu     N layers with GELU between them; LLaVA-1.5's is mlp2x_gelu
    pixel_shuffle  squares of r x r patches become one token, then a two-layer MLP (InternVL)
    resampler      a fixed number of learned queries reads all patches (Perceiver, Qwen-VL)
    moe_mlp        a router sends each token to K of E MLPs (CuMo, arXiv 2405.05949)
    groups         consecutive groups of tokens, each with a connector of its own

``any_length``: it takes any number of tokens and keeps it.

B pictures, N tokens of each, V width of the tower, D width of the language model, M tokens out,
Q queries, E experts, K top-k.

This file imports no other of the toolkit: it is loaded as soon as transformers is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STOCK = "mlp2x_gelu"


class Linear(nn.Module):
    """One layer; ``(B, N, V) -> (B, N, D)``."""

    any_length = True

    def __init__(self, width_in: int, width_out: int, num_tokens: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        self.num_output_tokens = num_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.linear(tokens)
        return projected


class MLP(nn.Module):
    """``num_layers`` layers with GELU between them; ``(B, N, V) -> (B, N, D)``.

    The layers have the names of the stock two-layer projector's.
    """

    any_length = True

    def __init__(self, width_in: int, width_out: int, num_tokens: int, num_layers: int = 2) -> None:
        super().__init__()
        self.num_layers = num_layers
        for number in range(num_layers):
            layer = nn.Linear(width_out if number else width_in, width_out)
            self.add_module(f"linear_{number + 1}", layer)
        self.num_output_tokens = num_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.get_submodule("linear_1")(tokens)
        for number in range(2, self.num_layers + 1):
            hidden = self.get_submodule(f"linear_{number}")(F.gelu(hidden))
        return hidden


class PixelShuffle(nn.Module):
    """``(B, h*w, V) -> (B, h*w/r², D)``: neighbouring patches side by side in the channels."""

    any_length = False

    def __init__(self, width_in: int, width_out: int, num_tokens: int, factor: int = 2) -> None:
        super().__init__()
        side = math.isqrt(num_tokens)
        if side * side != num_tokens or side % factor:
            raise ValueError(
                f"connector 'pixel_shuffle': {num_tokens} tokens are no square of patches whose"
                f" side is a multiple of the factor {factor} (a CLS token must be left out)"
            )
        self.factor = factor
        self.side = side
        self.norm = nn.LayerNorm(width_in * factor**2)
        self.linear_1 = nn.Linear(width_in * factor**2, width_out)
        self.linear_2 = nn.Linear(width_out, width_out)
        self.num_output_tokens = (side // factor) ** 2

    def forward(self, tokens: Tensor) -> Tensor:
        few, factor = self.side // self.factor, self.factor
        squares = tokens.unflatten(1, (few, factor, few, factor))  # (B, h', r, w', r, V)
        merged = squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        hidden = F.gelu(self.linear_1(self.norm(merged)))  # (B, M, D)
        projected: Tensor = self.linear_2(hidden)
        return projected


class Resampler(nn.Module):
    """``(B, N, V) -> (B, Q, D)``: learned queries that read the picture layer by layer."""

    any_length = False

    def __init__(
        self,
        width_in: int,
        width_out: int,
        num_tokens: int,
        num_queries: int = 64,
        num_layers: int = 1,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        # 64 channels a head, where the width allows.
        heads = num_heads or math.gcd(width_out, max(1, width_out // 64))
        self.queries = nn.Parameter(torch.randn(num_queries, width_out) * 0.02)
        self.positions = nn.Parameter(torch.randn(num_tokens, width_out) * 0.02)
        self.project = nn.Linear(width_in, width_out)
        self.norm_tokens = nn.LayerNorm(width_out)
        self.layers = nn.ModuleList(_ResamplerLayer(width_out, heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width_out)
        self.num_output_tokens = num_queries

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.norm_tokens(self.project(tokens))  # (B, N, D)
        keys = values + self.positions
        queries = self.queries.expand(len(tokens), -1, -1)  # (B, Q, D)
        for layer in self.layers:
            queries = layer(queries, keys, values)
        read: Tensor = self.norm_out(queries)
        return read


class _ResamplerLayer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        normed = self.norm_attention(queries)
        queries = queries + self.attention(normed, keys, values, need_weights=False)[0]
        hidden = F.gelu(self.linear_1(self.norm_mlp(queries)))
        out: Tensor = queries + self.linear_2(hidden)
        return out


class MoEMLP(nn.Module):
    """``(B, N, V) -> (B, N, D)``: each token through K of E MLPs, weights renormalised."""

    any_length = True

    def __init__(
        self,
        width_in: int,
        width_out: int,
        num_tokens: int,
        num_experts: int = 4,
        top_k: int = 2,
        num_layers: int = 2,
    ) -> None:
        from vision_moe import MoEFeedForward  # registered as a MoE layer: losses, loads, plots

        super().__init__()
        experts = [MLP(width_in, width_out, num_tokens, num_layers) for _ in range(num_experts)]
        self.moe = MoEFeedForward(experts, width_in, top_k)
        self.num_output_tokens = num_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.moe(tokens)
        return mixed


class TokenGroups(nn.Module):
    """Consecutive groups of tokens, each with a connector of its own, laid end to end again.

    The CLS token and the patches, or the towers of a model that has several.
    """

    any_length = False

    def __init__(
        self, width_in: int, width_out: int, num_tokens: int, groups: list[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.sizes = [int(group["num_tokens"]) for group in groups]
        if sum(self.sizes) != num_tokens:
            raise ValueError(
                f"connector 'groups': its groups have {self.sizes} tokens, the tower {num_tokens}"
            )
        self.connectors = nn.ModuleList(
            build_connector(
                {key: value for key, value in group.items() if key != "num_tokens"},
                width_in, width_out, int(group["num_tokens"]),
            )
            for group in groups
        )  # fmt: skip
        self.num_output_tokens = sum(num_output_tokens(one, 0) for one in self.connectors)

    def forward(self, tokens: Tensor) -> Tensor:
        groups = zip(self.connectors, tokens.split(self.sizes, dim=1), strict=True)
        return torch.cat([connector(group) for connector, group in groups], dim=1)


CONNECTORS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "mlp": MLP,  # named mlpNx_gelu, N its layers
    "pixel_shuffle": PixelShuffle,
    "resampler": Resampler,
    "moe_mlp": MoEMLP,
    "groups": TokenGroups,
}


def build_connector(
    settings: Mapping[str, Any], width_in: int, width_out: int, num_tokens: int
) -> nn.Module:
    """A connector by its name and options.

    Args:
        settings: ``{"name": ...}`` and the class's own keyword arguments.
        width_in: V.
        width_out: D.
        num_tokens: N.

    Raises:
        ValueError: There is no such connector or option, or it does not fit the tower.
    """
    options = dict(settings)
    name = str(options.pop("name", STOCK))
    kind = name
    if match := re.fullmatch(r"mlp([1-9]\d?)x_gelu", name):
        kind, options["num_layers"] = "mlp", int(match.group(1))
    if kind not in CONNECTORS or name == "mlp":
        known = ", ".join("mlpNx_gelu" if one == "mlp" else one for one in CONNECTORS)
        raise ValueError(f"there is no connector '{name}', only {known}")
    try:
        return CONNECTORS[kind](width_in, width_out, num_tokens, **options)
    except TypeError as error:
        raise ValueError(f"connector '{name}': {str(error).partition(') ')[2] or error}") from error


def num_output_tokens(connector: nn.Module, num_tokens: int) -> int:
    """M: of a connector of ours; the stock projector keeps the tower's N."""
    return int(getattr(connector, "num_output_tokens", num_tokens))


@torch.no_grad()
def upcycled_experts(mlp: nn.Module, connector: MoEMLP) -> None:
    """Make each expert a copy of a trained MLP, stock or ours; the router stays as it is.

    While the experts are equal the mixture computes what the MLP did, whatever the router says.

    Args:
        mlp: ``linear_1``, ``linear_2``, ...
        connector: Of the same widths and number of layers.
    """
    weights = {name: tensor for name, tensor in mlp.state_dict().items() if "linear" in name}
    experts: Any = connector.moe.experts
    for expert in experts:
        expert.load_state_dict(weights)
