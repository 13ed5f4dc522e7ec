#!/usr/bin/env python3
"""A variant of a GGUF model, for tests: make_model.py SOURCE TARGET [CHANGE...]   (Python's standard library only)

  KEY=TYPE:VALUE      sets a key of the metadata; TYPE: string, u16, u32, f32
  -KEY                drops one
  --layers N          keeps the first N layers
  --architecture NAME names the architecture, and its keys with it
  --without PART      drops tensors that have PART in their names
  --f16               random numbers in F16 in place of every quantised tensor, so that products are about the same wherever
                      they are computed
  --factors NAME=X    adds the tensor NAME, 32 numbers X in F32 (LongRoPE's factors of a head of 64)
  --shards N          writes TARGET-00001-of-0000N.gguf and so on

Tensors are copied byte for byte otherwise.
"""
import math
import random
import struct
import sys

FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
TYPES = {"u16": (2, "<H", int), "u32": (4, "<I", int), "f32": (6, "<f", float)}
ALIGNMENT = 32


class Reader:
    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = file.read()
        self.at = 4
        version, n_tensors, n_keys = self.take("<IQQ")
        assert self.data[:4] == b"GGUF" and version == 3
        self.keys = {}
        for _ in range(n_keys):
            name = self.string()
            (kind,) = self.take("<I")
            start = self.at
            self.skip(kind)
            self.keys[name] = (kind, self.data[start:self.at])
        infos = []
        for _ in range(n_tensors):
            name = self.string()
            (n_dims,) = self.take("<I")
            dims = self.take("<%dQ" % n_dims)
            infos.append((name, dims, *self.take("<IQ")))
        base = -(-self.at // ALIGNMENT) * ALIGNMENT
        ends = sorted(info[3] for info in infos)[1:] + [len(self.data) - base]
        starts = sorted(info[3] for info in infos)
        end_of = dict(zip(starts, ends))
        self.tensors = [(name, dims, kind, self.data[base + at:base + end_of[at]]) for name, dims, kind, at in infos]

    def take(self, form):
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def string(self):
        (n,) = self.take("<Q")
        self.at += n
        return self.data[self.at - n:self.at].decode()

    def skip(self, kind):
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            inner, n = self.take("<IQ")
            if inner in FIXED:
                self.at += n * FIXED[inner]
            else:
                for _ in range(n):
                    self.skip(inner)
        else:
            self.at += FIXED[kind]


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def padded(data):
    return data + bytes(-len(data) % ALIGNMENT)


def write(path, keys, tensors):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, (kind, value) in keys.items():
        head += text(name) + struct.pack("<I", kind) + value
    at = 0
    for name, dims, kind, data in tensors:
        head += text(name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims, kind, at)
        at += len(padded(data))
    with open(path, "wb") as file:
        file.write(padded(head))
        for tensor in tensors:
            file.write(padded(tensor[3]))


def random_f16(dims, seed):
    """As bytes: of either sign, magnitudes up to a factor of 2 apart, so that a product keeps its inputs' size."""
    n = math.prod(dims)
    exponent = 15 - round(math.log2(1.5 * dims[0] ** 0.5))
    bits = int.from_bytes(random.Random(seed).randbytes(2 * n), "little")
    bits &= int.from_bytes(b"\xff\x83" * n, "little")
    bits |= int.from_bytes(struct.pack("<H", exponent << 10) * n, "little")
    return bits.to_bytes(2 * n, "little")


def main(source, target, *changes):
    model = Reader(source)
    keys, tensors, shards = model.keys, model.tensors, 0
    changes = list(changes)
    while changes:
        change = changes.pop(0)
        if change == "--layers":
            n = int(changes.pop(0))
            keys["llama.block_count"] = (4, struct.pack("<I", n))
            tensors = [t for t in tensors if not t[0].startswith("blk.") or int(t[0].split(".")[1]) < n]
        elif change == "--architecture":
            name = changes.pop(0)
            old = keys["general.architecture"][1][8:].decode()
            keys = {key.replace(old + ".", name + ".") if key.startswith(old + ".") else key: value
                    for key, value in keys.items()}
            keys["general.architecture"] = (STRING, text(name))
        elif change == "--f16":
            tensors = [t if t[2] < 2 else (t[0], t[1], 1, random_f16(t[1], i)) for i, t in enumerate(tensors)]
        elif change == "--without":
            part = changes.pop(0)
            tensors = [t for t in tensors if part not in t[0]]
        elif change == "--factors":
            name, factor = changes.pop(0).split("=")
            tensors = tensors + [(name, (32,), 0, struct.pack("<f", float(factor)) * 32)]
        elif change == "--shards":
            shards = int(changes.pop(0))
        elif change.startswith("-"):
            del keys[change[1:]]
        else:
            key, value = change.split("=", 1)
            kind, value = value.split(":", 1)
            if kind == "string":
                keys[key] = (STRING, text(value))
            else:
                number, form, convert = TYPES[kind]
                keys[key] = (number, struct.pack(form, convert(value)))
    if not shards:
        return write(target, keys, tensors)
    for i in range(shards):
        part = dict(keys) if i == 0 else {}
        part["split.no"] = (2, struct.pack("<H", i))
        part["split.count"] = (2, struct.pack("<H", shards))
        part["split.tensors.count"] = (5, struct.pack("<i", len(tensors)))
        some = tensors[len(tensors) * i // shards:len(tensors) * (i + 1) // shards]
        write("%s-%05d-of-%05d.gguf" % (target, i + 1, shards), part, some)


main(*sys.argv[1:])
