"""A device apart from the host, without one: tensors that say they are on `meta` and hold their values on the CPU.

What a GPU refuses is refused: an operation on tensors of both sides (but for single numbers, and places on the host into a
tensor of the device), and giving values as NumPy arrays.  So a whole run can be tried for what it leaves on the wrong side.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APART = torch.device("meta")
MOVES = ("_to_copy", "copy_", "set_")
TAKES_PLACES = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Apart(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=APART,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __repr__(self):
        return f"Apart({self.held})"


def _held(value):
    return value.held if isinstance(value, Apart) else value


def _is_apart(device) -> bool:
    return device is not None and torch.device(device).type == APART.type


def _run(function, args, kwargs):
    name, asked_for = function.overloadpacket.__name__, kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    apart = [x for x in tensors if isinstance(x, Apart)]
    here = [tuple(x.shape) for x in tensors if not isinstance(x, Apart) and x.ndim]
    if apart and here and name not in MOVES and not (name in TAKES_PLACES and isinstance(args[0], Apart)):
        raise RuntimeError(f"{name}: {here} of the host and {[tuple(x.shape) for x in apart]} of the device")
    given = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if asked_for is not None:
        given["device"] = torch.device("cpu")
    result = function(*tree_map(_held, args), **tree_map(_held, given))
    there = _is_apart(asked_for) or (asked_for is None and bool(apart))
    if name == "copy_":
        there = isinstance(args[0], Apart)
    same = {id(_held(x)): x for x in tensors}

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return same.get(id(value)) if id(value) in same else Apart(value) if there else value

    return tree_map(wrapped, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_apart(kwargs.get("device")) or any(isinstance(x, Apart) for x in tree_leaves((args, kwargs))):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


@contextlib.contextmanager
def device_apart():
    """Within it, `APART` is a device to move to and to make tensors on."""
    tensor, tolist, enabled, autocast = torch.tensor, torch.Tensor.tolist, torch.is_autocast_enabled, torch.autocast

    def made(data, *args, device=None, **more):
        found = tensor(data, *args, **more)
        return Apart(found) if _is_apart(device) else found

    patches = [
        mock.patch.object(torch, "tensor", made),
        mock.patch.object(torch.Tensor, "tolist", lambda self: tolist(_held(self))),
        mock.patch.object(
            torch, "is_autocast_enabled", lambda kind=None: kind != APART.type and enabled(kind or "cpu")
        ),
        mock.patch.object(
            torch, "autocast", lambda kind, *a, **k: autocast("cpu" if _is_apart(kind) else kind, *a, **k)
        ),
        mock.patch.object(torch, "inference_mode", torch.no_grad),  # in inference mode moves are not seen
    ]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(_Mode())
        yield APART
