"""What a GPU would be asked for while answers are written, read off a CPU: kernels launched, waits for the device."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from models import sampling

# Operations that wait for the device, and those that bring numbers to it from the host or back.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim",
           "bincount"}
WAITING_CALLS = {"item", "tolist", "numpy", "cpu", "cuda", "tensor", "as_tensor", "from_numpy", "pin_memory",
                 "__bool__", "__int__", "__float__", "__index__", "__array__", "allclose"}
ONE_KERNEL = {"rms_norm"}  # torch takes it apart on a CPU, and has one kernel for it on a GPU


@dataclass
class Token:
    """The work of one token after the first."""

    anew: bool  # of other shapes than the token before, or on other memory
    operations: list[tuple] = field(default_factory=list)  # name, and of each input: shape, strides, dtype, place
    launches: int = 0


class Trace(TorchDispatchMode):
    """The operations of every token, and what waits anywhere.

    An operation launches a kernel unless all that it gives lies in memory of what it takes, unchanged: a view.
    """

    def __init__(self):
        super().__init__()
        self.tokens, self.waits, self.looks = [], [], 0
        self._token, self._made = None, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.partition("::")[2], kwargs or {}
        if name not in ONE_KERNEL and function._can_decompose():
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        leaves, shape = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        by_bools = name in ("index", "index_put", "index_put_") and any(each.dtype == torch.bool for each in inputs[1:])
        if name in WAITING or by_bools:
            self.waits.append(name)
        seen = (name, str(shape), *(self._seen(leaf) for leaf in leaves))
        result = function(*args, **kwargs)
        if self._token is not None:
            self._token.operations.append(seen)
            held = {each.untyped_storage()._cdata for each in inputs}
            given = [each.untyped_storage()._cdata for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            changes = function._schema.is_mutable
            self._token.launches += "empty" not in name and (changes or not held.issuperset(given))
            self._made.update({each: len(self._token.operations) for each in given if each not in held})
        return result

    def _seen(self, leaf):
        """A number as it is; of a tensor what a recorded launch relies on, and which operation of the token made it."""
        if not isinstance(leaf, torch.Tensor):
            return str(leaf)
        made = self._made.get(leaf.untyped_storage()._cdata)
        place = leaf.data_ptr() if made is None else ("made by", made, leaf.storage_offset())
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, place

    def of_token(self, token, work):
        """Trace the work of a token."""
        self.tokens.append(token)
        self._token, self._made = token, {}
        work()
        self._token = None


class Calls(TorchFunctionMode):
    """What is called by Python and waits: some of it never becomes an operation on a CPU."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in WAITING_CALLS:
            self.waits.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def traced():
    """Trace what writes answers inside of the block, the prompts' pass not among it."""
    trace = Trace()
    stock = {owner: dict(vars(owner)) for owner in (sampling.Drawing, sampling.Repeated)}
    write = sampling.write

    def look(drawing, products):
        before = len(trace.waits)
        unfinished = stock[sampling.Drawing]["unfinished"](drawing, products)
        del trace.waits[before:]
        trace.looks += 1
        return unfinished

    def token(repeated):
        trace.of_token(Token(not repeated.seen), lambda: stock[sampling.Repeated]["__call__"](repeated))
        repeated.seen = True

    def begin_anew(repeated):
        repeated.seen = False
        stock[sampling.Repeated]["begin_anew"](repeated)

    def end(drawing):
        kept = list(trace.waits)
        generation = stock[sampling.Drawing]["generation"](drawing)
        trace.waits[:] = kept
        return generation

    def traced_write(*args, **options):
        with trace, Calls(trace.waits):
            return write(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.Drawing, "unfinished", look)
        patch.setattr(sampling.Drawing, "generation", end)
        patch.setattr(sampling.Repeated, "__call__", token)
        patch.setattr(sampling.Repeated, "begin_anew", begin_anew)
        patch.setattr("models.policy.write", traced_write)
        yield trace
