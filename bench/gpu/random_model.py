#!/usr/bin/env python3
"""Writes a GGUF model of random weights, Q4_0, in the shape of Llama-3.1-8B, for measurements of speed.

Its vocabulary is 32,768 words of which every byte is one, so that a text of n letters has n tokens. Weights are drawn
once, 64 MiB, and repeated from a place that differs from tensor to tensor: speed does not see it.

With --window five of six layers see so many tokens alone, as Gemma 3's do; the architecture is then one whose windows are
as plain (cohere2).
"""
import argparse
import struct

import numpy as np

F32, Q4_0 = 0, 2
U32, I32, FLOAT, STRING, ARRAY = 4, 5, 6, 8, 9


def text(s):
    b = s.encode()
    return struct.pack("<Q", len(b)) + b


def entry(key, kind, value):
    pack = {U32: lambda v: struct.pack("<I", v), FLOAT: lambda v: struct.pack("<f", v), STRING: text}[kind]
    return text(key) + struct.pack("<I", kind) + pack(value)


def array(key, kind, values):
    body = b"".join(text(v) for v in values) if kind == STRING else np.array(
        values, dtype="<f4" if kind == FLOAT else "<i4").tobytes()
    return text(key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + body


def vocabulary(n):
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + [chr(c) for c in range(33, 127)]
    words += ["\u2581"] + [f"\u2581w{i}w" for i in range(n - len(words) - 1)]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (n - 259)  # unknown, control, byte, normal
    return words, [-float(i) for i in range(n)], kinds


def metadata(a):
    words, scores, kinds = vocabulary(a.vocabulary)
    name = "cohere2" if a.window else "llama"
    fields = [
        entry("general.architecture", STRING, name),
        entry("general.name", STRING, "random weights"),
        entry(name + ".block_count", U32, a.layers),
        entry(name + ".context_length", U32, a.context),
        entry(name + ".embedding_length", U32, a.width),
        entry(name + ".feed_forward_length", U32, a.inner),
        entry(name + ".attention.head_count", U32, a.heads),
        entry(name + ".attention.head_count_kv", U32, a.heads_kv),
        entry(name + ".attention.layer_norm_rms_epsilon", FLOAT, 1e-5),
        entry(name + ".rope.dimension_count", U32, a.width // a.heads),
        entry(name + ".rope.freq_base", FLOAT, 500000.0),
        entry(name + ".vocab_size", U32, a.vocabulary),
        entry("tokenizer.ggml.model", STRING, "llama"),
        array("tokenizer.ggml.tokens", STRING, words),
        array("tokenizer.ggml.scores", FLOAT, scores),
        array("tokenizer.ggml.token_type", I32, kinds),
        entry("tokenizer.ggml.bos_token_id", U32, 1),
        entry("tokenizer.ggml.eos_token_id", U32, 2),
    ]
    if a.window:
        fields += [
            entry("cohere2.attention.layer_norm_epsilon", FLOAT, 1e-5),
            entry("cohere2.logit_scale", FLOAT, 1.0),
            entry("cohere2.attention.sliding_window", U32, a.window),
            entry("cohere2.attention.sliding_window_pattern", U32, 6),
        ]
    return fields


def tensors(a):
    kv = a.width // a.heads * a.heads_kv
    yield "token_embd.weight", (a.width, a.vocabulary), Q4_0
    yield "output_norm.weight", (a.width,), F32
    if not a.window:  # else the embeddings are the output's weights, and one norm serves attention and what follows
        yield "output.weight", (a.width, a.vocabulary), Q4_0
    for i in range(a.layers):
        b = f"blk.{i}."
        yield b + "attn_norm.weight", (a.width,), F32
        if not a.window:
            yield b + "ffn_norm.weight", (a.width,), F32
        yield b + "attn_q.weight", (a.width, a.width), Q4_0
        yield b + "attn_k.weight", (a.width, kv), Q4_0
        yield b + "attn_v.weight", (a.width, kv), Q4_0
        yield b + "attn_output.weight", (a.width, a.width), Q4_0
        yield b + "ffn_gate.weight", (a.width, a.inner), Q4_0
        yield b + "ffn_up.weight", (a.width, a.inner), Q4_0
        yield b + "ffn_down.weight", (a.inner, a.width), Q4_0


def size(shape, kind):
    n = int(np.prod(shape))
    return 4 * n if kind == F32 else n // 32 * 18


def blocks(random, n, width):
    """Q4_0: a scale and 32 numbers of 4 bits, of standard deviation 4.6; the product with `width` inputs keeps theirs."""
    block = np.zeros(n, dtype=[("scale", "<f2"), ("numbers", "u1", 16)])
    block["scale"] = (random.uniform(0.8, 1.2, n) / (4.6 * width ** 0.5)).astype("<f2")
    block["numbers"] = random.integers(0, 256, (n, 16), dtype=np.uint8)
    return block.tobytes()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("output")
    for name, value in (("layers", 32), ("width", 4096), ("inner", 14336), ("heads", 32), ("heads-kv", 8),
                        ("vocabulary", 32768), ("context", 1 << 20), ("window", 0), ("seed", 1)):
        p.add_argument("--" + name, type=int, default=value)
    a = p.parse_args()
    random = np.random.default_rng(a.seed)
    fields, all_tensors = metadata(a), list(tensors(a))
    bag = blocks(random, (64 << 20) // 18, a.width)
    with open(a.output, "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, len(all_tensors), len(fields)) + b"".join(fields))
        at = 0
        for name, shape, kind in all_tensors:
            f.write(text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, at))
            at += (size(shape, kind) + 31) // 32 * 32
        f.write(bytes(-f.tell() % 32))
        for name, shape, kind in all_tensors:
            n = size(shape, kind)
            if kind == F32:
                f.write(np.ones(shape, dtype="<f4").tobytes())
            else:
                start = int(random.integers(0, len(bag) // 36)) * 18
                left = n
                while left:
                    part = min(left, len(bag) - start)
                    f.write(bag[start:start + part])
                    left, start = left - part, 0
            f.write(bytes(-n % 32))


if __name__ == "__main__":
    main()
