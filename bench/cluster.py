#!/usr/bin/env python3
"""Clustering beside FAISS and SuperKMeans, on the same numbers with the same threads.

    bench/cluster.py --squeeze build/squeeze --context book.sqz.gguf --out bench/results/cluster-<machine>.json

Data, 64 numbers a key:
  clustered  100,000 drawn keys, a mixture of 2,000 elongated groups (squeeze bench cluster --write-keys)
  real       100,000 keys of a prepared context: all heads of as many middle layers as it takes, each head without
             its always-retained rows and centred on its mean, pooled, a random choice of them in random order
  head       the keys of one head of the middle layer, 5% clusters: what preparing a document clusters

FAISS compares all points with all centroids, 10 iterations from random seeds. SuperKMeans runs with its defaults
(which sample 30% of the points), on all points, hierarchically (its choice above 100,000 points), and so with three
refinements. The runs take turns, so that a machine whose speed drifts treats them alike; a row has the fastest and
the median of them. FAISS and SuperKMeans give centroids and are not charged for assigning the points to them; ours
gives the assignment.

Objectives are computed here, in float64: of centroids, every point with the nearest one; of our assignment, every
point with the mean of its cluster, whether or not that is the nearest. Euclidean: mean squared distance. Cosine:
mean cosine (keys are set to length 1 first). objective_vs_faiss is this over FAISS's, mean over the seeds.

Both packages and numpy are installed into a virtual environment beside the program (--venv), never elsewhere.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

PACKAGES = ["faiss-cpu==1.15.1", "superkmeans==0.2.0", "numpy==2.4.6", "gguf==0.19.0"]


def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--squeeze", default="build/squeeze", help="the program (build/squeeze)")
    p.add_argument("--context", help="prepared context with head dimension 64 (without: drawn keys alone)")
    p.add_argument("--count", type=int, default=100000, help="keys of 'clustered' and 'real' (100000)")
    p.add_argument("--clusters", type=int, default=5000, help="their clusters (5000)")
    p.add_argument("--threads", type=int, default=2, help="threads of every program (2)")
    p.add_argument("--rounds", type=int, default=5, help="times every program runs, in turn (5)")
    p.add_argument("--venv", help="virtual environment (bench-venv beside the program)")
    p.add_argument("--out", help="JSON file (standard output)")
    return p.parse_args()


def enter_venv(args):
    """Runs this script again inside the virtual environment, which is made when it is not there."""
    venv = os.path.abspath(args.venv or os.path.join(os.path.dirname(os.path.abspath(args.squeeze)), "bench-venv"))
    python = os.path.join(venv, "bin", "python")
    if os.path.realpath(sys.prefix) == os.path.realpath(venv):
        return
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"] + PACKAGES, check=True)
    os.execv(python, [python, os.path.abspath(__file__)] + sys.argv[1:])


args = parse()
enter_venv(args)

import faiss  # noqa: E402  (only the virtual environment has them)
import gguf  # noqa: E402
import numpy as np  # noqa: E402
import superkmeans  # noqa: E402


def squeeze(options):
    out = subprocess.run([args.squeeze, "bench", "cluster", "--json"] + options, check=True, capture_output=True)
    return json.loads(out.stdout)


def read_heads(path):
    """Layer by layer: the clusterable keys of each head, centred, in order of position, float32."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}

    def field(name):
        return reader.fields[name].contents()

    layers = []
    for layer in range(field("squeeze.layer_count")):
        if field("squeeze.layer.level_count")[layer] == 0:
            continue
        d, n_heads = field("squeeze.layer.head_dim")[layer], field("squeeze.layer.head_count_kv")[layer]
        fixed = field("squeeze.layer.fixed_count")[layer]
        keys = np.array(tensors[f"blk.{layer}.key"].data).reshape(n_heads, -1, d)[:, fixed:].astype(np.float32)
        order = np.argsort(np.array(tensors[f"blk.{layer}.position"].data).reshape(n_heads, -1)[:, fixed:], axis=1)
        heads = [keys[h][order[h]] for h in range(n_heads)]
        layers.append([x - x.mean(0) for x in heads])
    return layers


def pool(layers, count):
    """All heads of layers around the middle one until there are enough keys."""
    middle, chosen, n = len(layers) // 2, [], 0
    for i in sorted(range(len(layers)), key=lambda i: abs(i - middle)):
        chosen.append(i)
        n += sum(len(x) for x in layers[i])
        if n >= count:
            break
    x = np.concatenate([head for i in sorted(chosen) for head in layers[i]])
    return np.ascontiguousarray(x[np.random.default_rng(1).permutation(len(x))[:count]]), len(chosen)


def centroid_objective(x, centroids, cosine):
    """Every point with its nearest centroid, float64."""
    c = centroids.astype(np.float64)
    if cosine:
        c /= np.maximum(np.linalg.norm(c, axis=1, keepdims=True), 1e-300)
    half, total = 0.5 * (c * c).sum(1), 0.0
    for i in range(0, len(x), 2000):
        rows = x[i:i + 2000].astype(np.float64)
        nearest = c[np.argmax(rows @ c.T - (0 if cosine else half), axis=1)]
        total += (rows * nearest).sum() if cosine else ((rows - nearest) ** 2).sum()
    return total / len(x)


def means(x, assignment, k):
    order = np.argsort(assignment, kind="stable")
    size = np.bincount(assignment, minlength=k)
    if len(size) != k or size.min() == 0:
        sys.exit("a cluster without a point, or more clusters than asked for")
    first = np.concatenate([[0], np.cumsum(size)[:-1]])
    return np.add.reduceat(x[order].astype(np.float64), first, axis=0) / size[:, None]


def assignment_objective(x, assignment, c, cosine):
    own = c / np.maximum(np.linalg.norm(c, axis=1, keepdims=True), 1e-300) if cosine else c
    rows, own = x.astype(np.float64), own[assignment]
    return ((rows * own).sum() if cosine else ((rows - own) ** 2).sum()) / len(x)


def timed(train):
    since = time.perf_counter()
    centroids = train()
    return time.perf_counter() - since, centroids


def contenders(x, path, k, cosine, folder):
    """name -> function of the seed: seconds, objective, objective with every point at its nearest centroid."""
    d = x.shape[1]

    def run_faiss(seed):
        km = faiss.Kmeans(d, k, niter=10, seed=seed, spherical=cosine, max_points_per_centroid=10 ** 9,
                          min_points_per_centroid=1)

        def train():
            km.train(x)
            return km.centroids

        seconds, c = timed(train)
        value = centroid_objective(x, c, cosine)
        return seconds, value, value

    def superkmeans_with(**options):
        def run(seed):
            km = superkmeans.SuperKMeans(k, d, n_threads=args.threads, seed=seed, angular=cosine, **options)
            seconds, c = timed(lambda: km.train(x))
            value = centroid_objective(x, np.asarray(c), cosine)
            return seconds, value, value
        return run

    def squeeze_with(threads):
        def run(seed):
            file = os.path.join(folder, "assignment.u32")
            result = squeeze(["--keys", path, "--dim", str(d), "--clusters", str(k), "--iterations", "10", "--threads",
                              str(threads), "--metric", "cosine" if cosine else "euclidean", "--seed", str(seed),
                              "--repeats", "1", "--write-assignment", file])
            assignment = np.fromfile(file, dtype=np.uint32)
            os.remove(file)
            c = means(x, assignment, k)
            return result["seconds"], assignment_objective(x, assignment, c, cosine), centroid_objective(x, c, cosine)
        return run

    return {
        "faiss": run_faiss,
        "superkmeans": superkmeans_with(),
        "superkmeans all points": superkmeans_with(sampling_fraction=1.0),
        "superkmeans hierarchical": superkmeans_with(hierarchical=True),
        "superkmeans hierarchical, 3 refinements": superkmeans_with(hierarchical=True, iters_refinement=3),
        "squeeze": squeeze_with(args.threads),
        "squeeze, 1 thread": squeeze_with(1),
    }


def compare(name, x, k, cosine, folder):
    path = os.path.join(folder, "keys.f32")
    x.tofile(path)
    runs = {}
    for seed in range(1, args.rounds + 1):
        for tool, run in contenders(x, path, k, cosine, folder).items():
            runs.setdefault(tool, []).append(run(seed))
            print(f"{name}, {'cosine' if cosine else 'euclidean'}, round {seed}: {tool} {runs[tool][-1][0]:.3f} s, "
                  f"objective {runs[tool][-1][1]:.6g}", file=sys.stderr)
    least = {tool: min(r[0] for r in run) for tool, run in runs.items()}
    objective = {tool: float(np.mean([r[1] for r in run])) for tool, run in runs.items()}

    def near_faiss(tool):
        ratio = objective[tool] / objective["faiss"]
        return ratio >= 0.99 if cosine else ratio <= 1.01

    equal = [least[tool] for tool in least if tool.startswith("superkmeans") and near_faiss(tool)]
    rows = []
    for tool, run in runs.items():
        rows.append({
            "op": "cluster", "tool": tool, "data": name, "n": len(x), "d": x.shape[1], "k": k,
            "metric": "cosine" if cosine else "euclidean",
            "threads": 1 if tool == "squeeze, 1 thread" else args.threads,
            "seconds": least[tool], "seconds_median": float(np.median([r[0] for r in run])),
            "objective": objective[tool], "objective_nearest": float(np.mean([r[2] for r in run])),
            "vs_faiss": least["faiss"] / least[tool],
            "vs_superkmeans": least["superkmeans"] / least[tool],
            "vs_superkmeans_within_1_percent": min(equal) / least[tool] if equal else None,
            "objective_vs_faiss": objective[tool] / objective["faiss"],
            "within_1_percent_of_faiss": bool(near_faiss(tool)),
        })
    return rows


def main():
    faiss.omp_set_num_threads(args.threads)
    rows, notes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        drawn = os.path.join(folder, "drawn.f32")
        machine = squeeze(["--count", str(args.count), "--dim", "64", "--groups", "2000", "--repeats", "1", "--threads",
                           str(args.threads), "--write-keys", drawn])
        clustered = np.fromfile(drawn, dtype=np.float32).reshape(-1, 64)
        rows += compare("clustered", clustered, args.clusters, False, folder)
        if args.context:
            layers = read_heads(args.context)
            real, n_layers = pool(layers, args.count)
            notes["real"] = f"{len(real)} keys of all heads of the {n_layers} middle layers of {len(layers)}, centred"
            rows += compare("real", real, args.clusters, False, folder)
            unit = real / np.linalg.norm(real, axis=1, keepdims=True)
            rows += compare("real", np.ascontiguousarray(unit), args.clusters, True, folder)
            head = np.ascontiguousarray(layers[len(layers) // 2][0])
            notes["head"] = "one head of the middle layer"
            rows += compare("head", head, (len(head) + 19) // 20, False, folder)
    result = {
        "rows": rows,
        "data": notes,
        "rounds": args.rounds,
        "machine": machine["machine"],
        "versions": {"squeeze": machine["version"], "faiss-cpu": faiss.__version__,
                     "superkmeans": superkmeans.__version__, "numpy": np.__version__,
                     "python": platform.python_version()},
        "command": "bench/cluster.py " + " ".join(os.path.basename(a) if os.sep in a else a for a in sys.argv[1:]),
    }
    text = json.dumps(result, indent=2) + "\n"
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        sys.stdout.write(text)
    for row in rows:
        print(f"{row['data']:10s} {row['metric']:9s} {row['tool']:40s} {row['seconds']:8.3f} s  "
              f"{row['vs_faiss']:6.1f}x FAISS  objective {row['objective_vs_faiss']:.4f} of FAISS's", file=sys.stderr)


main()
