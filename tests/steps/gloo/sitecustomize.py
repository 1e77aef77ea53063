"""Lets accelerate divide weights among processes without GPUs; Python reads this file at start where it is on the path.

accelerate asks for a GPU before it lets FSDP2 take part, PyTorch's fully_shard itself does not: gloo has all it needs.
"""

import os

if os.environ.get("RANK") and os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from typing import Any

    from accelerate import state
    from accelerate.utils import DistributedType

    _init = state.PartialState.__init__

    def _init_as_for_gpus(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        _init(self, cpu, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = _init_as_for_gpus
