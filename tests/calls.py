"""Which of our ops run, and with what."""

from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode


class Call(NamedTuple):
    op: str
    arguments: dict[str, Any]
    result: Any


class OurCalls(TorchDispatchMode):
    """Keeps the calls of our ops, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace.startswith("widenet_kernels"):
            names = (argument.name for argument in function._schema.arguments)
            arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls.append(Call(function._opname, arguments, result))
        return result

    @property
    def ops(self) -> list[str]:
        return [call.op for call in self.calls]

    def the(self, op: str) -> Call:
        """The one call of this op."""
        (call,) = (call for call in self.calls if call.op == op)
        return call

    @property
    def asked(self) -> list[tuple[str, set[str]]]:
        """Each op, and of a backward which gradients it is to give."""
        return [
            (
                op,
                {name.removeprefix("need_") for name, value in arguments.items() if name.startswith("need_") and value},
            )
            for op, arguments, _ in self.calls
        ]
