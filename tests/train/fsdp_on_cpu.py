"""``mllm`` under FSDP2 without a GPU: PyTorch shards on a CPU, but accelerate asks it to on GPUs
alone, and elsewhere copies the model (DDP) whatever the configuration says.

``STOP_AFTER_STEPS`` ends a run early, as a signal would.
"""

import os
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from mllm.cli import main
from train.engine import WholeCheckpointTrainer


def take_up_fsdp_on_a_cpu() -> None:
    original = PartialState.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def stop_early(steps: int) -> None:
    original = WholeCheckpointTrainer._save_checkpoint

    def save(self: Any, *arguments: Any) -> None:
        units = {type(one).__name__ for one in self.model.modules() if isinstance(one, FSDPModule)}
        assert {"FSDPLlamaDecoderLayer", "FSDPResidualAttentionBlock"} <= units, units
        original(self, *arguments)
        if self.state.global_step == steps:
            raise KeyboardInterrupt

    WholeCheckpointTrainer._save_checkpoint = save  # type: ignore[method-assign]


if __name__ == "__main__":
    take_up_fsdp_on_a_cpu()
    if "STOP_AFTER_STEPS" in os.environ:
        stop_early(int(os.environ["STOP_AFTER_STEPS"]))
    main(sys.argv[1:])
