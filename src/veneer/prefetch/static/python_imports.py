"""What a Python source imports when it is imported or run: statements outside of functions, read as data.

Nothing is executed, and no byte code is looked at. Conditions are decided where that is easy: the platform,
the version, type checking, and what runs in the main program alone. Source that this interpreter cannot
parse counts as one that imports nothing.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["MAX_SOURCE", "Alternatives", "Import", "Statement", "imports_of"]

#: Parsing takes some 100 bytes of memory a byte; the largest module of the standard library has 230 KB.
MAX_SOURCE: Final = 512 << 10
_IMPORTERS: Final = frozenset({"import_module", "__import__"})
_COMPARISONS: Final[Mapping[type[ast.cmpop], Callable[[Any, Any], Any]]] = {
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
    ast.LtE: operator.le,
    ast.Lt: operator.lt,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True, slots=True)
class Import:
    """One import.

    Args:
        module: its name; "" in ``from . import x``.
        level: dots in front of it.
        names: what is taken from it, which may be modules, too; () for ``import x``.
    """

    module: str
    level: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Imports that are tried, and those that happen when something in the first ones is missing."""

    first: "tuple[Statement, ...]"
    otherwise: "tuple[Statement, ...]"


Statement = Import | Alternatives


def imports_of(source: bytes, version: tuple[int, int], *, main: bool = False) -> tuple[Statement, ...]:
    """The imports of a source, in order.

    Args:
        source: of the module; () comes of what cannot be parsed, or has more than :data:`MAX_SOURCE` bytes.
        version: of the Python that runs it.
        main: it is the main program.
    """
    if len(source) > MAX_SOURCE:
        return ()
    try:
        tree = ast.parse(source)
        return tuple(_Reader(version, main=main).statements(tree.body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()


class _Reader:
    def __init__(self, version: tuple[int, int], *, main: bool) -> None:
        self._version = version
        self._main = main

    def statements(self, body: Sequence[ast.stmt]) -> Iterator[Statement]:
        for one in body:
            match one:
                case ast.Import(names):
                    yield from (Import(name.name) for name in names)
                case ast.ImportFrom(module, names, level):
                    yield Import(module or "", level or 0, tuple(name.name for name in names))
                case ast.If(test, then, otherwise):
                    truth = self._truth(test)
                    yield from self.statements(then) if truth is not False else ()
                    yield from self.statements(otherwise) if truth is not True else ()
                case ast.Try(first, handlers, otherwise, last):
                    caught = [statement for handler in handlers for statement in self.statements(handler.body)]
                    yield Alternatives(tuple(self.statements([*first, *otherwise])), tuple(caught))
                    yield from self.statements(last)
                case ast.With(_, inner) | ast.ClassDef(body=inner):
                    yield from self.statements(inner)
                case ast.For(body=inner) | ast.While(body=inner):
                    yield from self.statements(inner)
                case ast.Expr(value) | ast.Assign(value=value):
                    yield from _called(value)

    def _truth(self, test: ast.expr) -> bool | None:
        """Whether a condition holds; None for those that nobody can tell."""
        match test:
            case ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"):
                return False
            case ast.Constant(value):
                return bool(value)
            case ast.UnaryOp(ast.Not(), operand):
                truth = self._truth(operand)
                return None if truth is None else not truth
            case ast.BoolOp(joint, values):
                return self._several([self._truth(value) for value in values], isinstance(joint, ast.And))
            case ast.Call(
                ast.Attribute(ast.Attribute(ast.Name("sys"), "platform"), "startswith"),
                [ast.Constant(str(word))],
            ):
                return "linux".startswith(word)
            case ast.Compare(left, [comparison], [right]):
                return self._compared(left, comparison, right)
        return None

    def _several(self, truths: Sequence[bool | None], every: bool) -> bool | None:
        if (not every) in truths:
            return not every
        return None if None in truths else every

    def _compared(self, left: ast.expr, comparison: ast.cmpop, right: ast.expr) -> bool | None:
        if (compare := _COMPARISONS.get(type(comparison))) is None:
            return None
        match left, right:
            case ast.Name("__name__"), ast.Constant("__main__"):
                return bool(compare(self._main, True))
            case ast.Attribute(ast.Name("sys"), "platform"), ast.Constant(str(word)):
                return bool(compare("linux", word))
            case ast.Attribute(ast.Name("os"), "name"), ast.Constant(str(word)):
                return bool(compare("posix", word))
            case ast.Attribute(ast.Name("sys"), "version_info"), ast.Tuple(parts):
                wanted = tuple(part.value for part in parts if isinstance(part, ast.Constant))
                if len(wanted) == len(parts) and all(type(one) is int for one in wanted):
                    # Further parts of the version do not matter to what is asked in practice.
                    return bool(compare((*self._version, 1)[: max(2, len(wanted))], wanted))
        return None


def _called(value: ast.expr) -> Iterator[Import]:
    match value:
        case ast.Call(ast.Name(name) | ast.Attribute(attr=name), [ast.Constant(str(module)), *_]):
            if name in _IMPORTERS and not module.startswith("."):
                yield Import(module)
