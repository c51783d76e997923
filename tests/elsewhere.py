"""A device that every machine has: tensors that say they are on "meta", with numbers on the CPU.

What a GPU refuses is refused here too: an operation on tensors of both devices, unless the other
one is a single number. So whatever makes a tensor without saying where fails here as it would
there, and one operation gives the CPU's numbers. What is read back to the host is counted.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["DEVICE", "Elsewhere", "back", "elsewhere"]

DEVICE = torch.device("meta")
_aten = torch.ops.aten
# Between devices; the host is asked for a number.
_TRANSFERS = {_aten._to_copy.default, _aten.copy_.default}
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}


class _There(Tensor):
    """A tensor on the device.

    Attributes:
        here: its numbers.
    """

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor):
        there = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        there.here = here
        return there

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        msg = f"{func} on a tensor of the device that lives within `with Elsewhere()`"
        raise RuntimeError(msg)


class Elsewhere(TorchDispatchMode):
    """The device is there within this mode.

    Attributes:
        reads: how often the host has waited for a number.
        float64: whether it has float64, which Apple's GPUs have not.
    """

    def __init__(self, float64: bool = True):
        super().__init__()
        self.reads, self.float64 = 0, float64

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is _aten._efficientzerotensor.default:
            # It has no memory, and what knows of that is above this mode.
            func = _aten.zeros.default
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, _There)]
        strays = [x for x in tensors if not isinstance(x, _There) and x.ndim]
        if there and strays and func not in _TRANSFERS:
            msg = (
                f"{func} was given tensors of {[tuple(x.shape) for x in there]} on the device, and "
                f"of {[tuple(x.shape) for x in strays]} on the CPU"
            )
            raise RuntimeError(msg)
        self.reads += func in _READS and bool(there)
        device = kwargs.get("device")
        target = bool(there) if device is None else torch.device(device) == DEVICE
        if target and device is not None:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map_only(_There, lambda x: x.here, (args, kwargs))
        found = func(*inner_args, **inner_kwargs)
        if not target:
            return found
        for x in tree_flatten(found)[0]:
            if isinstance(x, Tensor) and x.dtype == torch.float64 and not self.float64:
                msg = f"{func} makes float64 numbers, which the device has not"
                raise TypeError(msg)
        found = tree_map_only(Tensor, _There, found)
        if not there or func in _TRANSFERS:
            return args[0] if func is _aten.copy_.default else found
        return return_and_correct_aliasing(func, args, kwargs, found)


def elsewhere(tree):
    """A tree with its tensors on the device."""
    leaves, structure = tree_flatten(tree)
    moved = [_There(x.detach().clone()) if isinstance(x, Tensor) else x for x in leaves]
    return tree_unflatten(moved, structure)


def back(tree):
    """A tree with its tensors on the CPU, none of which may have been there already."""
    leaves, structure = tree_flatten(tree)
    strays = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, _There)]
    assert not strays, f"on the CPU: {[(tuple(x.shape), x.dtype) for x in strays]}"
    return tree_unflatten([x.here if isinstance(x, Tensor) else x for x in leaves], structure)
