"""Weights shared out among processes (FSDP2, Zhao et al., 2023), for full fine-tuning of models
that do not fit on one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(modules: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Share out the weights of each module over a mesh, in place. A block is put together only
    while it computes.
    """
    for module in modules:
        for block in _blocks(module):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)  # what is in no block


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The items of a module's outermost lists: a UNet's levels, a text encoder's layers."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def whole(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, those that are shared out put together: every process takes all of
    them, in this order.
    """
    for name, value in tensors.items():
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def is_sharded(module: nn.Module) -> bool:
    """Whether any weight of a module is shared out among processes."""
    return any(isinstance(p, DTensor) for p in module.parameters())
