#!/usr/bin/env python3
"""Holds structs.py against the headers: sizes, offsets and enums as the C compiler has them."""
import ctypes
import os
import subprocess
import sys
import tempfile

from structs import ENUMS, STRUCTS

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")


def wanted():
    """What both sides print: one line a struct, a field and an enum."""
    for name, struct in STRUCTS.items():
        yield f"{name}: {ctypes.sizeof(struct)} bytes"
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            yield f"{name}.{field}: {at.size} bytes at {at.offset}"
    for name, value in ENUMS.items():
        yield f"{name} = {value}"


def program():
    yield '#include "squeeze_cuda.h"\n#include <stdio.h>\nint main(void)\n{'
    for name, struct in STRUCTS.items():
        yield f'printf("{name}: %zu bytes\\n", sizeof(struct {name}));'
        for field, *_ in struct._fields_:
            yield f'printf("{name}.{field}: %zu bytes at %zu\\n", sizeof(((struct {name} *)0)->{field}), ' \
                  f'offsetof(struct {name}, {field}));'
    for name in ENUMS:
        yield f'printf("{name} = %d\\n", (int){name});'
    yield "return 0;\n}"


with tempfile.TemporaryDirectory() as folder:
    binary = os.path.join(folder, "structs")
    subprocess.run([os.environ.get("CC", "cc"), "-std=c11", f"-I{SOURCE}/include", "-x", "c", "-", "-o", binary],
                   input="\n".join(program()), text=True, check=True)
    found = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.splitlines()
differing = [f"structs.py has {a}, C has {b}" for a, b in zip(wanted(), found) if a != b]
print("\n".join(differing) if differing else f"{len(found)} sizes, offsets and enums agree")
sys.exit(bool(differing))
