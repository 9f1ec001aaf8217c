"""A pretend device that computes: its tensors live on `pretend:0`, hold a CPU tensor, and refuse
what a GPU refuses.

Code that only a GPU runs is run here without one: `with pretend_device():` and then
`.to("pretend:0")`, `torch.zeros(2, device="pretend")` or `Trainer(**ON_PRETEND)`. A tensor that was
left on the CPU raises as CUDA does; so do a CPU generator, `.numpy()`, and what writes into the
CPU. Results are the CPU's, as every operation is computed there. Only fused attention differs,
which PyTorch replaces by its parts here.

Uses PyTorch's own place for devices written in Python (torch/utils/backend_registration.py); see
also its test, test_privateuseone_python_backend.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
aten = torch.ops.aten

CROSSINGS = {
    aten.copy_.default,
    aten._to_copy.default,
    aten._copy_from.default,
}  # may read one device and write another
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
# Elsewhere a number on the CPU (a tensor without dimensions) may stand beside tensors of a GPU, but
# not in these.
NO_NUMBERS = {
    "cat",
    "stack",
    "gather",
    "index_select",
    "scatter",
    "scatter_",
    "embedding",
    "mm",
    "bmm",
    "addmm",
    "convolution",
    "native_layer_norm",
}
# A tensor may only be marked as conjugate or negative, and its kernels must know: the wrapper would
# hide the mark.
UNMARKED = {
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}


# What was read back from the device: before each, a GPU would finish all that it has to do.
READ_BACK: list[str] = []


class PretendTensor(Tensor):
    """A tensor of the pretend device; `held` is where its numbers are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> PretendTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        self.held = held
        return self

    def __repr__(self, **_) -> str:
        return f"{self.held!r} on {NAME}:0"

    def __deepcopy__(self, memo: dict) -> PretendTensor:
        if id(self) not in memo:
            memo[id(self)] = copied = PretendTensor(self.held.clone(), self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(
            protocol
        )  # a file holds numbers; Lightning reads them onto the CPU, those of a GPU too

    def tolist(self) -> list:
        READ_BACK.append("tolist")
        return self.held.tolist()

    def numpy(self, **_):
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy the"
            " tensor to host memory first."
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args: tuple, kwargs: dict):
    """One operation, on what its tensors hold. Raises RuntimeError where a GPU would."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(
            f"{func} changes a tensor's shape in place, which a pretend tensor cannot"
        )
    check_places(func, args, kwargs)
    here: dict[int, PretendTensor] = {}
    args, kwargs = held(args, here), {name: held(value, here) for name, value in kwargs.items()}
    to = kwargs.get("device")
    if to is not None:
        kwargs["device"] = torch.device("cpu")
    if here and (to is not None and to.type != NAME or func is aten._local_scalar_dense.default):
        READ_BACK.append(str(func))
    if to is not None and to.type != NAME:
        return func(*args, **kwargs)
    func = UNMARKED.get(func, func)
    with own_stream() if torch.Tag.nondeterministic_seeded in func.tags else nullcontext():
        return wrapped(func(*args, **kwargs), here)


def held(tree, here: dict[int, PretendTensor] | None = None):
    """What pretend tensors hold, in the arguments of an operation; `here` gets them by it."""
    if isinstance(tree, PretendTensor):
        if here is not None:
            here[id(tree.held)] = tree
        return tree.held
    return type(tree)(held(x, here) for x in tree) if isinstance(tree, (tuple, list)) else tree


def wrapped(tree, here: dict[int, PretendTensor]):
    """Results on the pretend device. What was changed in place is returned as it came."""
    if isinstance(tree, Tensor):
        if (changed := here.get(id(tree))) is None:
            return PretendTensor(tree)
        if changed.shape != tree.shape:
            raise NotImplementedError("a pretend tensor cannot change its shape in place")
        return changed
    return type(tree)(wrapped(x, here) for x in tree) if isinstance(tree, (tuple, list)) else tree


def check_places(func, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError for tensors on two devices, and for a generator of the CPU, as CUDA's
    kernels do.
    """
    if func in CROSSINGS:
        return
    names = _arguments(func)
    for (name, written), value in [
        *zip(names, args),
        *((pair, kwargs[pair[0]]) for pair in names[len(args) :] if pair[0] in kwargs),
    ]:
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
        if func in INDEXING and name == "indices" and isinstance(args[0], PretendTensor):
            continue
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if (
                isinstance(x, Tensor)
                and not isinstance(x, PretendTensor)
                and (x.ndim or written or func.overloadpacket.__name__ in NO_NUMBERS)
            ):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two"
                    f" devices, {NAME}:0 and cpu! ({func}, {name})"
                )


@functools.cache
def _arguments(func) -> list[tuple[str, bool]]:
    """The names of an operation's arguments, and whether it writes into them."""
    return [
        (argument.name, argument.alias_info is not None and argument.alias_info.is_write)
        for argument in func._schema.arguments
    ]


# ------------------------------------------------------------------ the device's own random numbers
_generator = torch.Generator()


class _Module(_DummyBackendModule):
    """`torch.pretend`."""

    on = False

    def is_available(self) -> bool:
        return self.on

    def manual_seed_all(self, seed: int) -> None:
        _generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device=None) -> Tensor:
        return _generator.get_state()

    def set_rng_state(self, state: Tensor, device=None) -> None:
        _generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@contextmanager
def own_stream() -> Iterator[None]:
    """Random numbers of the device's stream and not the CPU's."""
    cpu = torch.get_rng_state()
    torch.set_rng_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(torch.get_rng_state())
        torch.set_rng_state(cpu)


# ---------------------------------------------------------------------------- PyTorch and Lightning
class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _module.on


_module = _Module()


@functools.cache
def _register() -> tuple[torch.library.Library, ...]:
    """Tell PyTorch of the device, and how its tensors are made from nothing. Cannot be undone: the
    device stays, and is unavailable.
    """
    _setup_privateuseone_for_python_backend(NAME, backend_module=_module, hook=_Hook())
    library, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    library.impl(
        "empty.memory_format", functools.partial(_make, aten.empty.memory_format), "PrivateUse1"
    )
    library.impl(
        "empty_strided", functools.partial(_make, aten.empty_strided.default), "PrivateUse1"
    )
    # these make an empty tensor first, and change its shape
    for made in (aten.arange, aten.arange.start, aten.arange.start_step, aten.eye, aten.eye.m):
        made = made.default if isinstance(made, torch._ops.OpOverloadPacket) else made
        name = made._schema.name + f".{made._schema.overload_name}".rstrip(".")
        library.impl(name, functools.partial(_make, made), "PrivateUse1")
    library.impl(
        "_copy_from", _copy_from, "PrivateUse1"
    )  # of torch.tensor(..., device=), which passes by __torch_dispatch__
    every.fallback(
        torch.library.fallthrough_kernel, "AutocastPrivateUse1"
    )  # autocast casts nothing here
    return library, every


def _make(func, *args, device=None, pin_memory=None, layout=None, **kwargs) -> PretendTensor:
    return PretendTensor(func(*args, **kwargs, device="cpu"))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    held(target).copy_(held(source))
    return target


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The device is available inside. `module.to` swaps the tensors of its parameters there, as
    tensors cannot change their kind.
    """
    _register()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    _module.on = True
    try:
        with torch.autograd.set_multithreading_enabled(
            False
        ):  # autograd has no thread for a device that came late
            yield torch.device(NAME, 0)
    finally:
        _module.on = False
        torch.__future__.set_swap_module_params_on_conversion(swap)


class PretendAccelerator(Accelerator):
    """What Lightning asks about a device."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device) -> dict:
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class PretendStrategy(SingleDeviceStrategy):
    """A single device's; Lightning would put it on the CPU."""

    def __init__(self, accelerator: Accelerator | None = None, **plugins):
        super().__init__(torch.device(NAME, 0), accelerator, **plugins)


ON_PRETEND = {
    "accelerator": NAME,
    "strategy": NAME,
}  # what a Trainer takes, also on the command line
AcceleratorRegistry.register(NAME, PretendAccelerator)
StrategyRegistry.register(NAME, PretendStrategy)
