"""Top-k routed feed-forward layer and its balance loss (CLIP-MoE, arXiv 2409.19291).

B batch, L tokens of a sequence, T tokens in all, D width, E experts, K top-k.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_moe.dispatch import dispatch, run_expert
from vision_moe.errors import InputError
from vision_moe.feed_forward import FFNParts, split_ffn
from vision_moe.low_rank import LowRankExperts
from vision_moe.routers import DEFAULT_ROUTER, RouterOptions, SpectralRouter


class MoEFeedForward(nn.Module):
    """Drop-in for a block's feed-forward network: E of them, of which K serve each token.

    Args:
        experts: the model's own feed-forward modules, each mapping ``(T, D)`` to ``(T, D)``, or
            low-rank experts on one of them.
        width: D.
        top_k: K, from 1 to E.
        generator: draws the router's weights; torch's global one by default.
        options: of the router.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module] | LowRankExperts,
        width: int,
        top_k: int,
        generator: torch.Generator | None = None,
        options: RouterOptions = DEFAULT_ROUTER,
    ) -> None:
        super().__init__()
        num_routed = len(experts) - options.base_gate
        if not 1 <= top_k <= num_routed:
            beside = " beside the base" if options.base_gate else ""
            raise InputError(
                f"top_k is {top_k}, it must be from 1 to the {num_routed} experts{beside}"
            )
        self.width = width
        self.top_k = top_k
        self.experts: nn.ModuleList | LowRankExperts = (
            experts if isinstance(experts, LowRankExperts) else nn.ModuleList(experts)
        )
        self.parts = _parts(experts)
        self.router: nn.Linear = (
            SpectralRouter(width, num_routed, options.rank)
            if options.kind == "spectral"
            else nn.Linear(width, num_routed, bias=False)
        )
        # nn.Linear's own distribution, drawn again so that a seed can be given. Features reach the
        # router normalised, so its logits start with a standard deviation of about 0.6.
        nn.init.uniform_(self.router.weight, -(width**-0.5), width**-0.5, generator=generator)
        self.expert_bias = nn.Parameter(torch.zeros(num_routed)) if options.expert_bias else None
        self.base_gate = nn.Linear(width, 1) if options.base_gate else None
        if self.base_gate is not None:                         # half base, half routed, to begin
            nn.init.zeros_(self.base_gate.weight)
            nn.init.zeros_(self.base_gate.bias)
        self.fixed_mixture: tuple[float, ...] | None = None
        if options.kind == "uniform":
            self.fixed_mixture = (1 / len(experts),) * len(experts)
        #: Records of the router's logits: of which thread (``None``: any), under which name.
        self.listeners: dict[Any, tuple[int | None, str]] = {}

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def __getattr__(self, name: str) -> Any:
        """Parts of the feed-forward network that was replaced are those of expert 0.

        open_clip asks a block for ``mlp.c_fc.weight.dtype`` to know its precision.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__.get("_modules", {}).get("experts")
            if experts is None:
                raise
            first = experts.base if isinstance(experts, LowRankExperts) else experts[0]
            if name in first._modules or name in first._parameters:
                return getattr(first, name)
            raise

    def forward(self, x: Tensor) -> Tensor:
        """Send each token to its top-k experts and mix their outputs.

        Args:
            x: ``(..., D)`` token features.

        Returns:
            ``(..., D)``, in the precision that an expert answers in.
        """
        logits = self._router_logits(x)                                    # (..., E)
        # What the choice is made by, whoever looks at it.
        scores = logits if self.expert_bias is None else logits + self.expert_bias.detach()
        for record, (thread, name) in list(self.listeners.items()):
            if thread is None or thread == threading.get_ident():
                record.router_logits[name] = scores
        tokens = x.reshape(-1, x.shape[-1])                                # (T, D)
        if self.fixed_mixture is None:
            weights, chosen = self.route(logits.reshape(-1, logits.shape[-1]))
            if self.base_gate is not None:
                gate = self.base_gate(tokens.to(self.base_gate.weight.dtype)).float().sigmoid()
                weights = torch.cat([gate, (1 - gate) * weights], dim=-1)  # (T, 1 + K)
                chosen = nn.functional.pad(chosen + 1, (1, 0))             # expert 0 is the base
            mixed = dispatch(self.experts, self.parts, tokens, weights, chosen)
        else:
            mixed = self._mix_fixed(tokens, self.fixed_mixture)
        return mixed.reshape(*x.shape[:-1], mixed.shape[-1])

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token.

        Args:
            logits: ``(T, E)``.

        Returns:
            fp32 weights ``(T, K)``, each row summing to one, and the experts' numbers ``(T, K)``.
        """
        probs = logits.softmax(-1, dtype=torch.float32)        # fp32: a bf16 softmax is coarse
        if self.expert_bias is None:
            weights, chosen = probs.topk(self.top_k, dim=-1)
        else:
            chosen = (logits + self.expert_bias.detach()).topk(self.top_k, dim=-1).indices
            # The bias has no gradient but zero: data parallelism waits for all parameters.
            weights = probs.gather(-1, chosen) + 0.0 * self.expert_bias[chosen]
        return weights / weights.sum(-1, keepdim=True), chosen

    @torch.no_grad()
    def balance_bias(self, logits: Tensor, rate: float, world_size: int = 1) -> None:
        """Move each expert's bias by ``rate``: up if it serves fewer tokens than the mean, down if
        more (arXiv 2408.15664).

        Args:
            logits: ``(..., E)``, as recorded.
            rate: u of the paper.
            world_size: processes whose tokens count.
        """
        assert self.expert_bias is not None
        chosen = logits.topk(self.top_k, dim=-1).indices.reshape(-1)
        load = torch.bincount(chosen, minlength=logits.shape[-1]).float()
        if world_size > 1:
            torch.distributed.all_reduce(load)
        self.expert_bias.add_((load.mean() - load).sign().to(self.expert_bias.dtype), alpha=rate)

    def _router_logits(self, x: Tensor) -> Tensor:
        # Outside autocast: in bf16 two experts often tie, and the choice would be by number.
        weight = self.router.weight
        if x.device.type == "meta":                            # which autocast does not know
            return self.router(x.to(weight.dtype))
        with torch.autocast(x.device.type, enabled=False):
            return self.router(x.to(weight.dtype) if weight.is_floating_point() else x)

    def _mix_fixed(self, x: Tensor, mixture: tuple[float, ...]) -> Tensor:
        outputs = [
            run_expert(self.experts, index, x) * weight
            for index, weight in enumerate(mixture)
            if weight
        ]
        return torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]

    def num_idle_parameters(self) -> int:
        """Parameters that one token does not pass through; of low-rank experts it always passes
        through the base, and through K changes."""
        if self.fixed_mixture is not None and all(self.fixed_mixture):
            return 0
        if isinstance(self.experts, LowRankExperts):
            changes = sum(parameter.numel() for parameter in self.experts.deltas.parameters())
            others = self.num_experts - 1
            return changes * (others - min(self.top_k, others)) // others
        total = sum(parameter.numel() for parameter in self.experts.parameters())
        num_idle = self.num_experts - self.top_k - (self.base_gate is not None)
        return total * num_idle // self.num_experts

    def extra_repr(self) -> str:
        return f"width={self.width}, num_experts={self.num_experts}, top_k={self.top_k}"


def _parts(experts: Sequence[nn.Module] | LowRankExperts) -> FFNParts | None:
    if isinstance(experts, LowRankExperts):
        return experts.parts
    try:
        return split_ffn(experts[0])
    except InputError:                                     # then each expert runs as one module
        return None


def load_balancing_loss(router_logits: Iterable[Tensor], world_size: int = 1) -> Tensor:
    """``mean over blocks of E * sum_j f_j * P_j``: exactly 1 under uniform routing, E at worst.

    f_j is the share of a block's tokens whose first choice is expert j (a count: no gradient), P_j
    the mean router probability of expert j. Blocks are balanced one by one, never pooled: two
    blocks that each use one expert alone would look balanced together.

    Args:
        router_logits: one ``(..., E)`` tensor for each MoE block.
        world_size: processes whose counts f_j are pooled.

    Returns:
        A scalar in fp32; its mean over the processes, each with as many tokens, is the loss of all
        tokens together, and so are the gradients.
    """
    losses = []
    for logits in router_logits:
        num_experts = logits.shape[-1]
        probs = logits.reshape(-1, num_experts).softmax(-1, dtype=torch.float32)      # (T, E)
        first = probs.detach().argmax(-1)
        experts = torch.arange(num_experts, device=first.device).unsqueeze(1)
        share = (first == experts).sum(1).to(probs.dtype) / probs.shape[0]  # no bincount: it syncs
        if world_size > 1:
            torch.distributed.all_reduce(share)
            share = share / world_size
        losses.append(num_experts * (share * probs.mean(0)).sum())
    if not losses:
        raise ValueError("load_balancing_loss: no router logits; has the model MoE blocks?")
    return torch.stack(losses).mean()
