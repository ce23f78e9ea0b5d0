"""Which program touched which byte of memory, and whether a GPU would have forgiven it.

A launch runs its programs in no order that one could rely on, and several at a time. Two that
touch the same element, one of them to store, need something that orders them. Between launches that
is the launch itself. Within one it is an atomic operation of both on one element: what a program
did before an atomic with release, another may see after its own with acquire (both are Triton's
default). This is the happens-before relation of Lamport 1978, "Time, clocks, and the ordering of
events in a distributed system" (CACM 21). One clock is enough here, since the interpreter runs the
programs one after the other.

A program is itself many threads, and an atomic on a single element is done by the first of them. So
what a whole tile did is released only if there is a `tl.debug_barrier()` before the atomic. (Triton
3.9 puts one there by itself, 3.6 does not.)
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

NOBODY, SEVERAL = -1, -2


class OutOfBounds(IndexError):
    """A program loads or stores outside of the tensors that its kernel was given."""


class Race(RuntimeError):
    """Two programs touch the same element, one to store, and nothing says which comes first."""


class Trace:
    """Which program touched which element, of one or more launches.

    Programs are counted as the grid counts them, in whatever order they run: the last axis fastest,
    and those of the next launch from where the last one's ended.

    Attributes:
        programs: how many the launches had.
        loaded, stored: bytes that all programs together loaded and stored (an atomic does both).
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.programs = 0
        self.loaded = self.stored = 0
        self._tensors = dict(tensors)
        self._addresses = {name: element_addresses(x) for name, x in tensors.items()}
        # Every element once, whatever tensors share it. A place is an index into these.
        flat = [np.empty(0, np.uint64), *(a.ravel() for a in self._addresses.values())]
        sizes = [np.full(x.numel(), x.element_size(), np.uint64) for x in tensors.values()]
        self._known, first = np.unique(np.concatenate(flat), return_index=True)
        self._size = np.concatenate([np.empty(0, np.uint64), *sizes])[first]
        n = len(self._known)
        self._loads, self._stores = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self._reader, self._writer = np.full(n, NOBODY), np.full(n, NOBODY)
        self._written_at = np.zeros(n, np.int64)
        self._now = 0
        self.launch((0, 1, 1))

    def loads(self, name: str) -> Int[Tensor, "*shape"]:
        """How many times each element of the tensor called `name` was loaded."""
        return self._of(self._loads, name)

    def stores(self, name: str) -> Int[Tensor, "*shape"]:
        """How many times each element was stored."""
        return self._of(self._stores, name)

    def writer(self, name: str) -> Int[Tensor, "*shape"]:
        """The number of the program that stored each element last (atomics aside); -1: nobody."""
        return self._of(self._writer, name)

    def reader(self, name: str) -> Int[Tensor, "*shape"]:
        """The number of the program that loaded each element; -1: nobody did, -2: several did."""
        return self._of(self._reader, name)

    def _of(self, values: np.ndarray, name: str) -> Tensor:
        places = np.searchsorted(self._known, self._addresses[name])
        return torch.from_numpy(values[places])

    def launch(self, grid: tuple[int, int, int]) -> None:
        """Another launch begins; all that was done before comes before it."""
        self._grid = grid
        self._first, self.programs = self.programs, self.programs + math.prod(grid)
        self._reads: list[tuple[int, int, np.ndarray]] = []  # program, when, places
        # By place: whether, and when, each program last changed it by an atomic; and what whoever
        # acquires it learns: of each program the time up to which its doings can be seen.
        self._atomic = np.zeros(len(self._known), bool)
        self._changed_at: dict[int, np.ndarray] = {}
        self._released: dict[int, np.ndarray] = {}

    def begin(self, program: int) -> None:
        """The program of this number, counted within the launch, begins."""
        self._program = program
        self._seen = np.zeros(math.prod(self._grid), np.int64)
        self._seen[program] = np.iinfo(np.int64).max
        self.barrier()

    def barrier(self) -> None:
        """All threads of the program have done what they did so far."""
        self._now += 1
        self._synced = self._now

    def load(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """The program loads elements of `size` bytes."""
        addresses = _active(pointers, mask)
        places = self._places(addresses, size, "loads")
        self._forbid_races(places, "loads")
        self._reads.append((self._program, self._tick(pointers), places))
        reader, me = self._reader[places], self._first + self._program
        self._reader[places] = np.where((reader == NOBODY) | (reader == me), me, SEVERAL)
        np.add.at(self._loads, places, 1)
        self.loaded += size * len(addresses)

    def store(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """The program stores elements of `size` bytes."""
        addresses = _active(pointers, mask)
        places = self._places(addresses, size, "stores")
        _, first, times = np.unique(addresses, return_index=True, return_counts=True)
        if (times > 1).any():
            element = self._element(int(places[first[times.argmax()]]))
            raise Race(
                f"program {self._cell(self._program)} stores {element} twice or more in one "
                "tl.store: nothing says which of the numbers stays"
            )
        self._forbid_races(places, "stores")
        self._writer[places] = self._first + self._program
        self._written_at[places] = self._tick(pointers)
        np.add.at(self._stores, places, 1)
        self.stored += size * len(addresses)

    def atomic(
        self, pointers: np.ndarray, mask: np.ndarray, size: int, acquire: bool, release: bool
    ) -> None:
        """The program loads and stores elements of `size` bytes, each in one step."""
        addresses = _active(pointers, mask)
        places = self._places(addresses, size, "changes")
        if acquire:
            for place in places.tolist():
                np.maximum(self._seen, self._released.get(place, 0), out=self._seen)
        self._forbid_races(places, "changes")
        when = self._tick(pointers)
        self._atomic[places] = True
        for place in places.tolist():
            changed = self._changed_at.setdefault(place, np.zeros_like(self._seen))
            changed[self._program] = when
            if release:
                released = self._released.setdefault(place, np.zeros_like(self._seen))
                known = self._seen.copy()
                known[self._program] = self._synced
                np.maximum(released, known, out=released)
        np.add.at(self._loads, places, 1)
        np.add.at(self._stores, places, 1)
        self.loaded += size * len(addresses)
        self.stored += size * len(addresses)

    def _tick(self, pointers: np.ndarray) -> int:
        """When something is done. A single element is the first thread's, who needs no barrier."""
        self._now += 1
        return self._now if pointers.size > 1 else self._synced

    def _places(self, addresses: np.ndarray, size: int, does: str) -> np.ndarray:
        """Of the elements that are at these addresses; of each one several, if it spans several."""
        step = min(size, int(self._size.min(initial=size)))
        parts = addresses[:, None] + np.arange(0, size, step, dtype=np.uint64)
        places = np.searchsorted(self._known, parts, side="right") - 1
        inside = places >= 0
        at = places[inside]
        inside[inside] = parts[inside] + np.uint64(step) <= self._known[at] + self._size[at]
        if not inside.all():
            wrong = int((~inside).any(axis=1).sum())
            raise OutOfBounds(
                f"program {self._cell(self._program)} {does} {wrong} of {len(parts)} elements "
                f"outside of its tensors, {self._describe(int(parts[~inside][0]))}"
            )
        return places[np.diff(places, axis=1, prepend=-1) != 0]

    def _forbid_races(self, places: np.ndarray, does: str) -> None:
        """What this program does to these elements must not clash with what others did."""
        writer = self._writer[places] - self._first
        clash = (writer >= 0) & (writer != self._program)
        clash[clash] = self._written_at[places[clash]] > self._seen[writer[clash]]
        if clash.any():
            self._race(int(places[clash][0]), does, int(writer[clash][0]), "stores")
        if does != "changes":
            for place in places[self._atomic[places]].tolist():
                changed = np.flatnonzero(self._changed_at[place] > self._seen)
                if len(changed):
                    self._race(place, does, int(changed[0]), "changes")
        if does == "loads":
            return
        reader = self._reader[places]
        read = places[(reader != NOBODY) & (reader != self._first + self._program)]
        for program, when, loaded in self._reads if len(read) else []:
            if when > self._seen[program]:
                shared = read[np.isin(read, loaded)]
                if len(shared):
                    self._race(int(shared[0]), does, program, "loads")

    def _race(self, place: int, does: str, other: int, did: str) -> None:
        hint = "on a GPU, nothing says which of them comes first"
        if self._seen[other]:
            hint = "it must do that before its atomic, with a tl.debug_barrier() between the two"
        raise Race(
            f"program {self._cell(self._program)} {does} {self._element(place)}, "
            f"which program {self._cell(other)} {did}: {hint}"
        )

    def _cell(self, program: int) -> str:
        """Where in the grid a program is: a number, or one for each axis that the grid has."""
        axes = max((axis for axis in range(3) if self._grid[axis] > 1), default=0) + 1
        cell = [int(i) for i in np.unravel_index(program, self._grid)]
        return str(cell[0] if axes == 1 else tuple(cell[:axes]))

    def _element(self, place: int) -> str:
        for name, addresses in self._addresses.items():
            found = np.argwhere(addresses == self._known[place])
            if len(found):
                return f"{name}[{', '.join(map(str, found[0]))}]"
        raise AssertionError("a place belongs to a tensor")

    def _describe(self, address: int) -> str:
        """Where an address is, seen from the tensor that is nearest to it."""

        def distance(name: str) -> int:
            a = self._addresses[name]
            return max(int(a.min()) - address, address - int(a.max()), 0)

        names = [name for name, a in self._addresses.items() if a.size]
        if not names:
            return "which have no elements"
        name = min(names, key=distance)
        a, x = self._addresses[name], self._tensors[name]
        size = x.element_size()
        if address < int(a.min()):
            ahead = -(-(int(a.min()) - address) // size)
            return f"such as the one {ahead} before the first of {name}"
        if address >= int(a.max()) + size:
            behind = (address - int(a.max())) // size
            return f"such as the one {behind} behind the last of {name} {tuple(x.shape)}"
        return f"such as one between the elements of {name} (strides {x.stride()})"


def element_addresses(x: Tensor) -> np.ndarray:
    """The address of every element, uint64, in the shape of x."""
    addresses = np.full(tuple(x.shape), x.data_ptr(), np.uint64)
    for dim, (length, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        steps = np.arange(length, dtype=np.uint64) * np.uint64(stride * x.element_size())
        addresses += steps.reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    return addresses


def _active(pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The pointers that the mask lets through, in one row."""
    pointers, mask = np.broadcast_arrays(pointers, mask)
    return pointers[mask].astype(np.uint64)
