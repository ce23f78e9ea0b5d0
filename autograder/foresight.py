"""What the checks will ask and what is right, worked out once for a whole class.

The inputs of a check do not depend on the submission. So a `Plan` has the calls that a check makes
when the answers are right, packed and ready to be sent, and the right answers as they would arrive.
A candidate's answers to one set of inputs are then

    all right    frames equal to the reference's, byte for byte: a property is a function of inputs
                 and answers, so what it says then is known after it was asked once;
    seen before  in another submission: likewise, as long as no further call was made;
    new          the property runs, on a `Replay` of the answers.

Of an exception a property may look at the kinds and not at the words (test_foresight.py holds all
exercises to it): a refusal is right in whatever words. What is remembered are outcomes of
properties under answers, never what became of a candidate: a verdict does not depend on who was
judged before.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from autograder import wire
from autograder.battery import Drawn, battery
from autograder.candidate import Call, Candidate, Judged, Local, fresh
from autograder.compare import CandidateError
from autograder.exercise import Check, Exercise

PATIENCE = 0.5  # seconds of processor time that any call may take before it counts as endless
SLOWER = 200.0  # ... or so many times what the slowest call of the reference took
REMEMBERED = 64 << 20  # bytes of outcomes
USUAL = 1 << 10  # bytes of an outcome and its key
SMALL = 16 << 10  # bytes of answers with which a failure is remembered
TEXT_WEIGHT = 40  # what a byte of JSON may take as Python objects


T = TypeVar("T")


class Answer(NamedTuple):
    """A candidate's answer to one foreseen call.

    Attributes:
        frame: as it arrived.
        value: what is in it, an exception as CandidateError; None if it equals the reference's.
        right: whether it is the reference's answer, or an exception of the same kinds.
    """

    frame: bytes
    value: Any
    right: bool

    @property
    def weight(self) -> int:
        """Bytes that the answer may take in memory."""
        return len(self.frame) + TEXT_WEIGHT * wire.LENGTHS.unpack_from(self.frame)[0]


@dataclass(frozen=True)
class Part:
    """The foreseen calls on one set of inputs.

    Attributes:
        start, end: numbers of its first call among those of the plan, and of the next one's.
        models: what the reference answers, an exception as CandidateError.
    """

    drawn: Drawn
    start: int
    end: int
    calls: list[Call]
    models: list[Any]


class Plan:
    """The foreseen calls of one check for one seed. Nothing is computed before it is needed."""

    def __init__(self, exercise: Exercise, check: Check, seed: int) -> None:
        self.exercise = exercise
        self.check = check
        self.seed = seed

    @functools.cached_property
    def parts(self) -> list[Part]:
        parts: list[Part] = []
        reference = Local(self.exercise.reference)
        for drawn in battery(self.check, self.seed):
            judged = Judged(reference, self.exercise.reference)
            self.check.property(judged, **fresh(drawn))
            models = [call.value if call.error is None else call.error for call in judged.calls]
            start = parts[-1].end if parts else 0
            parts.append(Part(drawn, start, start + len(models), judged.calls, models))
        return parts

    @functools.cached_property
    def frames(self) -> list[bytes]:
        """All calls of the plan, packed."""
        return [wire.pack((call.args, call.kwargs)) for part in self.parts for call in part.calls]

    @functools.cached_property
    def key(self) -> str:
        """Names the calls by their content."""
        return _digest(self.frames).hex()

    @property
    def right(self) -> list[bytes]:
        """The frames in which a child would send the reference's answers."""
        return self._answered[0]

    @functools.cached_property
    def kinds(self) -> list[list[str]]:
        """Of each call: the kinds of the exception that is right; empty for an answer."""
        models = [model for part in self.parts for model in part.models]
        return [m.kinds if isinstance(m, CandidateError) else [] for m in models]

    def refuses(self, number: int) -> bool:
        """Whether all that is right on one set of inputs is an exception."""
        return self._refuses[number]

    @functools.cached_property
    def _refuses(self) -> list[bool]:
        return [all(self.kinds[part.start : part.end]) for part in self.parts]

    @property
    def patience(self) -> float:
        """Seconds of processor time that no honest solution takes for a call."""
        return max(PATIENCE, SLOWER * self._answered[1])

    @functools.cached_property
    def _answered(self) -> tuple[list[bytes], float]:
        """The reference's answers, and the seconds that it took for the slowest."""
        answers, slowest = [], 0.0
        for frame in self.frames:
            args, kwargs = wire.unpack(frame)
            began = time.process_time()
            try:
                answer = {"value": self.exercise.reference(*args, **kwargs)}
            except Exception as error:
                answer = {"error": (CandidateError.of(error).kinds, "", "")}
            slowest = max(slowest, time.process_time() - began)
            answers.append(wire.pack(answer))
        return answers, slowest


@functools.lru_cache(maxsize=1024)
def planned(exercise: Exercise, check: Check, seed: int) -> Plan:
    """The plan of a check for a seed, shared by all that are judged in this process."""
    return Plan(exercise, check, seed)


def named(answers: Sequence[Answer]) -> bytes:
    """Names the answers to one set of inputs. Where all are right, the words of exceptions make no
    difference."""
    if all(answer.right for answer in answers):
        return b"right"
    return _digest([answer.frame for answer in answers])


def _digest(frames: Sequence[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for frame in frames:
        digest.update(len(frame).to_bytes(8, "little") + frame)
    return digest.digest()


class Memory(Generic[T]):
    """What was found out under a key, as long as there is room: the oldest goes first."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[T, int]] = {}
        self._weight = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Any) -> T | None:
        found = self._kept.get(key)
        return found[0] if found else None

    def put(self, key: Any, value: T, weight: int) -> None:
        """Keep ``value``, which takes ``weight`` bytes beyond the usual, if that is not much."""
        if weight > SMALL:
            return
        weight += USUAL
        self._kept[key] = value, weight
        self._weight += weight
        while self._weight > REMEMBERED:
            self._weight -= self._kept.pop(next(iter(self._kept)))[1]


class Replay:
    """A candidate that gives the fetched answers to foreseen calls, each once, and passes other
    calls on.

    Attributes:
        live: how many calls were passed on.
    """

    def __init__(
        self, plan: Plan, part: Part, answers: Sequence[Answer], candidate: Candidate
    ) -> None:
        self.candidate = candidate
        self.live = 0
        self._plan = plan
        self._part = part
        self._answers = answers
        self._waiting: dict[bytes, deque[int]] = defaultdict(deque)
        for i, frame in enumerate(plan.frames[part.start : part.end]):
            self._waiting[frame].append(i)
        self._last: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        waiting = self._waiting.get(wire.pack((args, kwargs)))
        if not waiting:
            self._last = None
            self.live += 1
            return self.candidate(*args, **kwargs)
        self._last = waiting.popleft()
        answer = self._answers[self._last]
        if isinstance(answer.value, CandidateError):
            raise answer.value.with_traceback(None)
        return wire.unpack(answer.frame)["value"]

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """What the reference answers to the last call."""
        if self._last is None:
            return Local(self._plan.exercise.reference)(*args, **kwargs)
        model = self._part.models[self._last]
        if isinstance(model, CandidateError):
            raise model.with_traceback(None)
        return model
