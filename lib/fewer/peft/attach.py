"""Attach a few trained parameters to a frozen model, and take them off again.

Every method of this folder is a *wrapper*: a small module that stands in the place of one module of
the model, calls it (as `self.base`) and adds something of its own. This file knows nothing of any
method; no method knows another:

    def wrap(module):                       # from a module of the model to what takes its place
        return LoRALinear(module, rank=8)

    attached = attach(model, {name: wrap for name in linear_layers(model) if "q_proj" in name})
    train(attached.parameters())            # only the wrappers' own parameters have gradients
    attached.save("era.safetensors")        # only those go to disk
    attached.detach()                       # the model is what it was, bit for bit

The model's own parameters are frozen and never written to, so there is nothing to restore: to
detach is to put the modules back. That is also why several attachments can share a base and take
turns (`detach`, `attach_again`).

A part that is to be trained as it is (a new head; all of the model, for full fine-tuning) is
wrapped by `copy.deepcopy`: the copy is trained, the original put aside.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

Wrap = Callable[[nn.Module], nn.Module]


class Attachment:
    """What `attach` returns: the wrappers in a model, by the dotted names of what they replace."""

    def __init__(self, model: nn.Module, wraps: Mapping[str, Wrap]) -> None:
        known = dict(model.named_modules())
        for name in wraps:
            if name not in known or not name:
                raise ValueError(f"wraps must name modules of the model, got {name!r}")
            inside = next((n for n in wraps if name.startswith(n + ".")), None)
            if inside is not None:
                raise ValueError(f"wraps must not overlap, got {inside!r} and {name!r} inside it")
        self.model = model
        self.originals = {name: known[name] for name in wraps}
        self.wrappers = {name: wrap(known[name]) for name, wrap in wraps.items()}
        # Collected before anything is frozen: what a wrapper has besides its base is trained.
        self.trained = {
            f"{name}.{own}": parameter
            for name, wrapper in self.wrappers.items()
            for own, parameter in wrapper.named_parameters()
            if not own.startswith("base.")
        }
        self._required_grad: dict[nn.Parameter, bool] = {}
        self.attach_again()

    def attach_again(self) -> None:
        """Put the wrappers (back) into the model and freeze all but their own parameters.

        Raises:
            RuntimeError: other modules than at the beginning are in the model: another attachment
                has to be detached first.
        """
        for name, original in self.originals.items():
            if self.model.get_submodule(name) is not original:
                raise RuntimeError(
                    f"{name} is not the module that was wrapped: detach or unmerge first"
                )
        self._required_grad = {p: p.requires_grad for p in self.model.parameters()}
        self.model.requires_grad_(False)
        for wrapper in self.wrappers.values():
            wrapper.train(self.model.training)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self._put(self.wrappers)

    def detach(self) -> None:
        """Take the wrappers off, with what they learned: the model is what it was, bit for bit."""
        self._put(self.originals)
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)
        self._required_grad = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters, for an optimizer."""
        return iter(self.trained.values())

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def merge(self) -> None:
        """Replace each wrapper by a module of the original's kind with the change folded in.

        It then costs nothing more than the original. `unmerge` puts the wrappers back, exactly: the
        original weights were never touched.

        Raises:
            TypeError: a wrapper has no method `merged`: its method cannot be folded. (A part that
                is trained as it is has nothing to fold, and stays.)
        """
        merged = {}
        for name, wrapper in self.wrappers.items():
            fold = getattr(wrapper, "merged", None)
            if fold is None and hasattr(wrapper, "base"):
                raise TypeError(f"{type(wrapper).__name__} ({name}) cannot be merged")
            merged[name] = fold() if fold else wrapper  # a copy trained as it is has no more to it
        self._put(merged)

    def unmerge(self) -> None:
        """Put the wrappers back after `merge`."""
        self._put(self.wrappers)

    def save(self, path: str | Path) -> None:
        """Write the trained parameters, and nothing else, to a safetensors file."""
        save_file({name: p.detach().contiguous() for name, p in self.trained.items()}, str(path))

    def load(self, path: str | Path) -> None:
        """Read trained parameters that `save` wrote, from an attachment of the same kind.

        Raises:
            ValueError: the file holds other names or shapes than this attachment trains. Nothing is
                changed then.
        """
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wanted = {name: tuple(p.shape) for name, p in self.trained.items()}
        got = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if wanted != got:
            odd = sorted(name for name in wanted.keys() | got if wanted.get(name) != got.get(name))
            raise ValueError(
                f"path must hold the parameters that this attachment trains; {len(odd)} differ, "
                f"such as {odd[0]}: wanted {wanted.get(odd[0])}, got {got.get(odd[0])}"
            )
        for name, parameter in self.trained.items():
            parameter.data.copy_(found[name])

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, module)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach(model: nn.Module, wraps: Mapping[str, Wrap]) -> Attachment:
    """Put a wrapper in the place of each named module, and freeze everything but the wrappers' own.

    Args:
        model: any module. Its parameters are not written to, now or later.
        wraps: by dotted name, a function from the module to its wrapper. The wrapper keeps the
            module as its attribute `base` and is called as the module was. Its parameters outside
            of `base` are trained. It may have a method `merged()` that returns a module of the
            original's kind with the change folded in, leaving the original as it is.

    Returns:
        The attachment; usable in a `with` statement, which detaches at the end.

    Raises:
        ValueError: a name that is no module of the model, or one inside another.

    Example:
        >>> import copy, torch
        >>> from fewer.models import tiny_llama
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with attach(model, {"layers.0.mlp.up_proj": copy.deepcopy}) as attached:
        ...     print(attached.count(), list(attached.trained))
        ...     attached.trained["layers.0.mlp.up_proj.weight"].data.zero_()[0, 0].item()
        ...     changed = model(tokens)
        384 ['layers.0.mlp.up_proj.weight']
        0.0
        >>> torch.equal(changed, before), torch.equal(model(tokens), before)
        (False, True)
    """
    return Attachment(model, wraps)
