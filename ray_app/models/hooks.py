"""Reading and changing the inputs of chosen modules while a model runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["edit_inputs", "read_inputs"]

Key = TypeVar("Key")


@contextmanager
def read_inputs(
    modules: Mapping[Key, nn.Module], on_input: Callable[[Key, Tensor], None]
) -> Iterator[None]:
    """Call ``on_input(key, z)`` with the first input of each module whenever it runs.

    The hooks are detached when the block ends, however it ends. `on_input` gets the very tensor
    that the model goes on with: it must not change it, and must copy what it wants to keep.

    Args:
        modules: modules to read, by a key of the caller's choice.
        on_input: called in the forward pass, on the thread that runs it.
    """

    def reader(key: Key) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: on_input(key, inputs[0])

    with _hooked(modules, reader):
        yield


@contextmanager
def edit_inputs(
    modules: Mapping[Key, nn.Module], edit: Callable[[Key, Tensor], Tensor]
) -> Iterator[None]:
    """Let each module run on ``edit(key, z)`` in place of its first input z.

    The hooks are detached when the block ends, however it ends. Hooks run in the order in which
    they were attached: a `read_inputs` inside the block sees what the module runs on.

    Args:
        modules: modules whose inputs are changed, by a key of the caller's choice.
        edit: called in the forward pass, on the thread that runs it; it must not change z itself,
            which the model may use elsewhere.
    """

    def editor(key: Key) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda module, inputs: (edit(key, inputs[0]), *inputs[1:])

    with _hooked(modules, editor):
        yield


@contextmanager
def _hooked(
    modules: Mapping[Key, nn.Module],
    hook_of: Callable[[Key], Callable[[nn.Module, tuple[Any, ...]], Any]],
) -> Iterator[None]:
    with ExitStack() as stack:
        for key, module in modules.items():
            handle = module.register_forward_pre_hook(hook_of(key))
            stack.callback(handle.remove)
        yield
