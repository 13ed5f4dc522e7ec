#!/usr/bin/env python3
"""How far distributions of bench/gpu/distributions.c are from each other: divergence.py VOCABULARY REFERENCE OTHER...

Prints one object of JSON a pair: the mean over tokens of KL(reference || other), its 99th percentile, and how often both
have the same likeliest token.
"""
import json
import sys

import numpy as np


def load(path, n_vocab):
    return np.fromfile(path, dtype=np.float16).reshape(-1, n_vocab).astype(np.float64)


def main():
    n_vocab, paths = int(sys.argv[1]), sys.argv[2:]
    reference = load(paths[0], n_vocab)
    for path in paths[1:]:
        other = load(path, n_vocab)
        kl = (np.exp(reference) * (reference - other)).sum(axis=1)
        print(json.dumps({"reference": paths[0], "other": path, "kl_mean": kl.mean(), "kl_p99": np.quantile(kl, 0.99),
                          "top1": (reference.argmax(1) == other.argmax(1)).mean(), "tokens": len(kl)}))


if __name__ == "__main__":
    main()
