"""Lets processes without GPUs do what a profile for GPUs says; Python reads this file at start where it is on the path.

accelerate asks for a GPU before it lets FSDP2 or DeepSpeed take part. PyTorch's fully_shard and DeepSpeed do not: gloo
has all that they need.
"""

import os

by_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"

if os.environ.get("RANK") and (by_fsdp or by_deepspeed):
    from typing import Any

    from accelerate import state
    from accelerate.utils import DistributedType

    _init, _init_accelerator = state.PartialState.__init__, state.AcceleratorState.__init__

    def _init_as_for_gpus(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        _init(self, by_fsdp, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    def _init_accelerator_as_for_gpus(
        self: Any, mixed_precision: Any = None, cpu: bool = False, *rest: Any, **kw: Any
    ) -> None:
        _init_accelerator(self, mixed_precision, by_fsdp, *rest, **kw)

    state.PartialState.__init__ = _init_as_for_gpus
    if by_deepspeed:
        state.AcceleratorState.__init__ = _init_accelerator_as_for_gpus

        def _prepare_gloo(self: Any, *_: Any, **__: Any) -> tuple[str, Any]:
            return "gloo", DistributedType.NO

        state.PartialState._prepare_backend = _prepare_gloo
