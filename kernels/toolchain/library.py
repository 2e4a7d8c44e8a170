"""A compiled library, loaded, and its functions on parameter structs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernels.toolchain.sources import HOST
from stoker.errors import Refusal

#: What ``int stoker_abi_version(void)`` of a library must return: it changes with the meaning of any parameter struct.
ABI_VERSION = 1

Params = ctypes.Structure


class NativeError(RuntimeError):
    """A function of a library returned an error `code`; its outputs are not to be used."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Library:
    """The functions of one shared library: ``int name(const Params*, ...)``, 0 for success.

    For each struct the library has ``int64_t sizeof_Params(void)``, so that one which Python and C++ see differently is
    refused, not read. ``const char* stoker_error_text(int)`` may explain codes.

    Refusal if the file cannot be loaded or speaks another ABI version.
    """

    def __init__(self, path: Path, target: str) -> None:
        self.path = path
        self.target = target
        try:
            self._loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise Refusal(
                f"{path}: cannot be loaded ({error}); on a file system mounted noexec or built on a newer system, set "
                "STOKER_CACHE to a folder of this machine; STOKER_NATIVE=0 runs without compiled kernels"
            ) from None
        version = self._symbol("stoker_abi_version")()
        if version != ABI_VERSION:
            raise Refusal(
                f"{path}: ABI version {version}, where this Stoker speaks {ABI_VERSION}: its sources and its Python "
                "files are of different releases; install Stoker anew"
            )

    @property
    def isa(self) -> str | None:
        """Of a host library the instruction set, which its functions have behind their names."""
        kind, _, isa = self.target.partition("_")
        return isa if kind == HOST else None

    def has(self, name: str) -> bool:
        """Whether it has the function `name`: not every architecture has all."""
        return hasattr(self._loaded, name)

    def function(self, name: str, params: type[Params], *more: type[Any]) -> Callable[..., None]:
        """The function `name`, called with a `params` and with arguments of the ctypes in `more`.

        It raises NativeError for a code other than 0, and lets other Python threads run meanwhile.
        """
        call = self._checked(name, params, more, ctypes.c_int)

        def run(values: Params, *others: Any) -> None:
            code = call(ctypes.byref(values), *others)
            if code != 0:
                raise NativeError(f"{name}: error {code}{self._explanation(code)} in {self.path.name}", code)

        return run

    def query(self, name: str, params: type[Params], *more: type[Any]) -> Callable[..., int]:
        """``int64_t name(const Params*, ...)``: a number that follows from the parameters, as bytes of workspace."""
        call = self._checked(name, params, more, ctypes.c_int64)
        return lambda values, *others: int(call(ctypes.byref(values), *others))

    def _checked(self, name: str, params: type[Params], more: Sequence[type[Any]], result: type[Any]) -> Any:
        call = self._symbol(name, result, [ctypes.POINTER(params), *more])
        size = self._symbol(f"sizeof_{params.__name__}", ctypes.c_int64)()
        if size != ctypes.sizeof(params):
            raise Refusal(
                f"{self.path}: {params.__name__} has {size} bytes in C++ and {ctypes.sizeof(params)} in Python: "
                "make its fields the same"
            )
        return call

    def _symbol(self, name: str, result: type[Any] = ctypes.c_int, arguments: list[Any] | None = None) -> Any:
        try:
            symbol = self._loaded[name]  # unlike an attribute, a new object each time: types set on it are its own
        except AttributeError:
            raise Refusal(f"{self.path}: has no function {name}; it must be exported with extern C linkage") from None
        symbol.restype, symbol.argtypes = result, arguments or []
        return symbol

    def _explanation(self, code: int) -> str:
        if not self.has("stoker_error_text"):
            return ""
        text = self._symbol("stoker_error_text", ctypes.c_char_p, [ctypes.c_int])(code)
        return f" ({text.decode(errors='replace')})" if text else ""
