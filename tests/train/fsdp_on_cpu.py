"""``mllm`` under FSDP2 without a GPU: PyTorch shards on a CPU, but accelerate asks it to on GPUs
alone, and elsewhere copies the model (DDP) whatever the configuration says."""

from typing import Any

import interrupted
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule


def take_up_fsdp_on_a_cpu() -> None:
    original = PartialState.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def assert_blocks_are_spread(model: nn.Module) -> None:
    units = {type(one).__name__ for one in model.modules() if isinstance(one, FSDPModule)}
    assert {"FSDPLlamaDecoderLayer", "FSDPResidualAttentionBlock"} <= units, units


if __name__ == "__main__":
    take_up_fsdp_on_a_cpu()
    interrupted.run(assert_blocks_are_spread)
