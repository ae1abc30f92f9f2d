"""The part of `ctypes` that system calls need, made straight from its C half: importing the whole takes as long as a container's mounts.

Names and behaviour are those of `ctypes`; objects of both kinds go together. `PyDLL` keeps the interpreter's lock during a call.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import (
        Array,
        PyDLL,
        Structure,
        addressof,
        byref,
        c_char,
        c_char_p,
        c_int,
        c_long,
        c_size_t,
        c_uint,
        c_uint16,
        c_uint32,
        c_uint64,
        c_ulong,
        c_void_p,
        create_string_buffer,
        get_errno,
        pythonapi,
        sizeof,
    )
else:
    from _ctypes import (
        FUNCFLAG_CDECL,
        FUNCFLAG_PYTHONAPI,
        FUNCFLAG_USE_ERRNO,
        Array,
        CFuncPtr,
        Structure,
        _SimpleCData,
        addressof,
        byref,
        dlopen,
        get_errno,
        sizeof,
    )

    def simple(name, code):
        """A plain C type by its letter in struct's alphabet."""
        return type(_SimpleCData)(name, (_SimpleCData,), {"_type_": code, "__module__": __name__})

    c_char, c_char_p, c_void_p = simple("c_char", "c"), simple("c_char_p", "z"), simple("c_void_p", "P")
    c_int, c_uint, c_long, c_ulong = (
        simple("c_int", "i"),
        simple("c_uint", "I"),
        simple("c_long", "l"),
        simple("c_ulong", "L"),
    )
    c_uint16, c_uint32, c_uint64, c_size_t = simple("c_uint16", "H"), c_uint, c_ulong, c_ulong

    class PyDLL:
        """A library whose functions return int unless their `restype` says otherwise."""

        def __init__(self, name, use_errno=False):
            flags = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI | (FUNCFLAG_USE_ERRNO if use_errno else 0)
            self._handle = dlopen(name, 0)
            self._function = type(CFuncPtr)("Function", (CFuncPtr,), {"_flags_": flags, "_restype_": c_int})

        def __getitem__(self, name):
            """A function of one's own, for argument types of one's own."""
            return self._function((name, self))

        def __getattr__(self, name):
            function = self[name]
            setattr(self, name, function)
            return function

    pythonapi = PyDLL(None)

    def create_string_buffer(data, size=None):
        """A mutable array of bytes, with a zero at the end unless the size is given."""
        buffer = (c_char * (len(data) + 1 if size is None else size))()
        buffer.raw = data if size is not None else data + b"\0"
        return buffer


__all__ = [
    "Array",
    "PyDLL",
    "Structure",
    "addressof",
    "byref",
    "c_char",
    "c_char_p",
    "c_int",
    "c_long",
    "c_size_t",
    "c_uint",
    "c_uint16",
    "c_uint32",
    "c_uint64",
    "c_ulong",
    "c_void_p",
    "create_string_buffer",
    "get_errno",
    "pythonapi",
    "sizeof",
]
