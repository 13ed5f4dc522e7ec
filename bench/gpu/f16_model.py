#!/usr/bin/env python3
"""Writes a GGUF model with its quantised weights (Q4_0, Q4_1, Q8_0) as F16: f16_model.py SOURCE TARGET

The CPU rounds what it multiplies with quantised weights to 8 bits, a card does not, so a quantised model's distributions
differ between the two before any attention does. Those of the same weights in F16 do not: what is left between CPU and
card is squeeze's own (`squeeze compare --against-cpu`).
"""
import struct
import sys

import numpy as np

F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of metadata values
STRING, ARRAY, ALIGNMENT = 8, 9, 32


class Reader:
    def __init__(self, path):
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.at = 4
        version, self.n_tensors, self.n_keys = self.take("<IQQ")
        assert bytes(self.data[:4]) == b"GGUF" and version == 3
        self.keys_begin = self.at
        for _ in range(self.n_keys):
            self.string()
            self.skip(self.take("<I")[0])
        self.keys = bytes(self.data[self.keys_begin:self.at])
        self.tensors = []
        for _ in range(self.n_tensors):
            name = self.string()
            dims = self.take("<%dQ" % self.take("<I")[0])
            self.tensors.append((name, dims, *self.take("<IQ")))
        self.base = -(-self.at // ALIGNMENT) * ALIGNMENT

    def take(self, form):
        n = struct.calcsize(form)
        values = struct.unpack(form, bytes(self.data[self.at:self.at + n]))
        self.at += n
        return values

    def string(self):
        (n,) = self.take("<Q")
        self.at += n
        return bytes(self.data[self.at - n:self.at])

    def skip(self, kind):
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            inner, n = self.take("<IQ")
            if inner in SIZES:
                self.at += n * SIZES[inner]
            else:
                for _ in range(n):
                    self.skip(inner)
        else:
            self.at += SIZES[kind]

    def block(self, at, n, fields):
        return np.frombuffer(self.data, dtype=np.dtype(fields), count=n, offset=self.base + at)


def numbers(model, kind, at, n):
    """A tensor's data, F32 as it is, all else as F16."""
    if kind in (F32, F16):
        return model.block(at, n, [("x", "<f4" if kind == F32 else "<f2")])["x"]
    if kind == Q8_0:
        b = model.block(at, n // 32, [("d", "<f2"), ("q", "i1", 32)])
        return (b["d"].astype("f4")[:, None] * b["q"]).astype("<f2").ravel()
    if kind not in (Q4_0, Q4_1):
        sys.exit("tensors of type %d: known are F32, F16, Q4_0, Q4_1 and Q8_0" % kind)
    b = model.block(at, n // 32, [("d", "<f2")] + ([("m", "<f2")] if kind == Q4_1 else []) + [("q", "u1", 16)])
    q = np.concatenate([b["q"] & 15, b["q"] >> 4], axis=1).astype("f4")
    low = b["m"].astype("f4") if kind == Q4_1 else -8 * b["d"].astype("f4")
    return (b["d"].astype("f4")[:, None] * q + low[:, None]).astype("<f2").ravel()


def main(source, target):
    model = Reader(source)
    padded = lambda n: -(-n // ALIGNMENT) * ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, model.n_tensors, model.n_keys) + model.keys
    at = 0
    for name, dims, kind, _ in model.tensors:
        to = F32 if kind == F32 else F16
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims, to, at)
        at += padded(int(np.prod(dims)) * (4 if to == F32 else 2))
    with open(target, "wb") as out:
        out.write(head + bytes(padded(len(head)) - len(head)))
        for _, dims, kind, begin in model.tensors:
            data = numbers(model, kind, begin, int(np.prod(dims))).tobytes()
            out.write(data + bytes(padded(len(data)) - len(data)))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.split("\n")[0])
    main(*sys.argv[1:])
