"""What a piece of eager code allocates and sends: bytes alive, and bytes received by collectives.

Works on real tensors and on FakeTensors alike, so that an estimate and a run are measured the same.
"""

import weakref
from collections import Counter
from unittest.mock import patch

import torch
from torch import distributed
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

c10d, functional = torch.ops.c10d, torch.ops._c10d_functional


def _gathered(output: torch.Tensor, part: torch.Tensor) -> int:
    return output.nbytes - part.nbytes


def _reduced(tensor: torch.Tensor, ranks: int) -> int:
    # As a ring does it: a reduce-scatter, then an all-gather.
    return 2 * tensor.nbytes * (ranks - 1) // ranks


def _c10d_size(group) -> int:
    return distributed.ProcessGroup.unbox(group).size()


def _size(name: str) -> int:
    return _resolve_process_group(name).size()


_TRAFFIC = {
    c10d._allgather_base_.default: lambda out, a: ("all_gather", _gathered(a[0], a[1])),
    c10d._reduce_scatter_base_.default: lambda out, a: ("reduce_scatter", _gathered(a[1], a[0])),
    c10d.allreduce_.default: lambda out, a: (
        "all_reduce",
        sum(_reduced(t, _c10d_size(a[1])) for t in a[0]),
    ),
    functional.all_gather_into_tensor.default: lambda out, a: ("all_gather", _gathered(out, a[0])),
    functional.reduce_scatter_tensor.default: lambda out, a: (
        "reduce_scatter",
        _gathered(a[0], out),
    ),
    functional.all_reduce.default: lambda out, a: ("all_reduce", _reduced(a[0], _size(a[2]))),
    functional.all_reduce_.default: lambda out, a: ("all_reduce", _reduced(a[0], _size(a[2]))),
    functional.all_to_all_single.default: lambda out, a: (
        "all_to_all",
        out.nbytes * (_size(a[3]) - 1) // _size(a[3]),
    ),
}
"""By op: (result, arguments) to the kind of collective and the bytes that this rank receives."""


_SHAPES = "_propagate_tensor_meta_non_cached"


class Tracker(TorchDispatchMode):
    """Follows storages made while it is active.

    Attributes:
        live: Bytes alive now, of storages that were made since it was entered.
        peak: The most there were.
        traffic: Bytes received so far, by kind of collective.
        paused: Whether what is made now is not counted.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.paused = False
        self.traffic: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._known: dict[int, weakref.ref] = {}
        self._resize = torch.UntypedStorage.resize_

    # An operation that a checkpoint repeats with its random state comes wrapped in one.
    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Yes: under other modes torch runs nothing that is compiled."""
        return True

    def __enter__(self):
        tracker, resize = self, self._resize

        def resized(storage, size):
            result = resize(storage, size)
            tracker._follow(storage, new=False)
            return result

        # FSDP frees gathered weights so.
        self._patches = [
            patch.object(torch.UntypedStorage, "resize_", resized),
            # DTensor finds out a result's shape on whole tensors, which no rank ever holds.
            patch.object(ShardingPropagator, _SHAPES, self._unseen(_SHAPES)),
        ]
        for each in self._patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        for each in self._patches:
            each.stop()
        return super().__exit__(*error)

    def _unseen(self, name: str):
        method = getattr(ShardingPropagator, name)

        def unseen(*args, **kwargs):
            self.paused = True
            try:
                return method(*args, **kwargs)
            finally:
                self.paused = False

        return unseen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Subclasses made of other tensors first: their own operations come here then.
        if any(hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self._follow(storage, new=True)
        if func in _TRAFFIC:
            kind, count = _TRAFFIC[func](result, args)
            self.traffic[kind] += count
        return result

    def _follow(self, storage: torch.UntypedStorage, new: bool) -> None:
        key = storage._cdata
        if key not in self._known:
            if not new:
                return  # from before
            self._known[key] = weakref.ref(storage, lambda _: self._drop(key))
        self.live += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self._known.pop(key, None)
        self.live -= self._sizes.pop(key, 0)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
