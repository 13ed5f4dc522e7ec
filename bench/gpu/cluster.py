"""sqz_cuda_cluster() against float64 on small problems. Exits 1 on failure.

usage: cluster.py LIBRARY"""
import sys
import torch
from squeeze_cuda import *


class Clustering:
    """One struct sqz_cuda_cluster_args with what it points to; keys type [K][N][D]."""

    def __init__(self, lib, keys, n_clusters, n_passes=0, seed=1):
        self.lib, self.keys = lib, keys
        k, n, d = keys.shape
        self.centroids = torch.full((k, n_clusters, d), float("nan"), device="cuda")
        self.variance = torch.full((k, n_clusters), float("nan"), device="cuda")
        self.offset = torch.full((k, n_clusters + 1), -1, device="cuda", dtype=torch.int32)
        self.order = torch.full((k, n), -1, device="cuda", dtype=torch.int32)
        self.objective = torch.full((k,), float("nan"), device="cuda")
        kind = F16 if keys.dtype == torch.float16 else BF16
        self.args = Cluster(kind, k, n, d, n_clusters, n_passes, seed, address(keys), address(self.centroids),
                            address(self.variance), address(self.offset), address(self.order), address(self.objective))
        size = lib.sqz_cuda_cluster_workspace_bytes(c.byref(self.args))
        if size == 0:
            raise RuntimeError("not supported")
        self.workspace = torch.full((size,), 0xff, device="cuda", dtype=torch.uint8)
        self.args.workspace, self.args.workspace_bytes = address(self.workspace), size

    def run(self):
        status = self.lib.sqz_cuda_cluster(c.byref(self.args), c.c_void_p(torch.cuda.current_stream().cuda_stream))
        if status:
            raise RuntimeError(f"sqz_cuda_cluster: status {status}")

    def assignment(self, h):
        of = torch.empty(self.keys.shape[1], device="cuda", dtype=torch.long)
        size = (self.offset[h, 1:] - self.offset[h, :-1]).long()
        of[self.order[h].long()] = torch.repeat_interleave(torch.arange(len(size), device="cuda"), size)
        return of


def distances(x, centroids, chunk=8192):
    """Nearest centroid of every row and its squared distance, by products in the precision of x."""
    at, cost = [], []
    half = centroids.square().sum(1) / 2
    for part in x.split(chunk):
        score, nearest = (part @ centroids.T - half).max(1)
        at.append(nearest)
        cost.append((part.square().sum(1) - 2 * score).clamp_min(0))
    return torch.cat(at), torch.cat(cost)


def lloyd(x, n_clusters, iterations, seed=3):
    """Lloyd's iterations from random rows, F32 [N][D] centred: mean squared distance after them, seconds not counted."""
    gen = torch.Generator(device="cuda")
    gen.manual_seed(seed)
    centroids = x[torch.randperm(len(x), device="cuda", generator=gen)[:n_clusters]].clone()
    for _ in range(iterations):
        at, _ = distances(x, centroids)
        count = torch.bincount(at, minlength=n_clusters)
        sums = torch.zeros_like(centroids).index_add_(0, at, x)
        centroids = torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], centroids)
    return float(distances(x, centroids)[1].double().mean()), centroids


def check(lib, keys, n_clusters, limit=None):
    """Structure, means, variances and the objective in float64; limit: of the objective as a share of Lloyd's."""
    run = Clustering(lib, keys, n_clusters)
    run.run()
    torch.cuda.synchronize()
    first = [x.clone() for x in (run.centroids, run.variance, run.offset, run.order, run.objective)]
    run.workspace.fill_(0x5a)
    run.run()
    torch.cuda.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(first, (run.centroids, run.variance, run.offset, run.order, run.objective))):
        return "a second call gave other bits"
    k, n, d = keys.shape
    for h in range(k):
        offset, order = run.offset[h].long(), run.order[h].long()
        if int(offset[0]) != 0 or int(offset[-1]) != n or not bool((offset[1:] > offset[:-1]).all()):
            return f"head {h}: offsets, or an empty cluster"
        if not torch.equal(order.sort().values, torch.arange(n, device="cuda")):
            return f"head {h}: order is no permutation"
        of = run.assignment(h)
        inside = torch.ones(n, device="cuda", dtype=torch.bool)
        inside[offset[:-1]] = False
        if not bool(((order[1:] > order[:-1]) | ~inside[1:]).all()):
            return f"head {h}: rows of a cluster are not ascending"
        x = keys[h].double()
        count = (offset[1:] - offset[:-1]).double()
        mean = torch.zeros(n_clusters, d, device="cuda", dtype=torch.float64).index_add_(0, of, x) / count[:, None]
        size = float(x.abs().max())
        if not float((run.centroids[h].double() - mean).abs().max()) <= 1e-5 * size:
            return f"head {h}: centroids are not means"
        away = (x - mean[of]).square().sum(1)
        variance = torch.zeros(n_clusters, device="cuda", dtype=torch.float64).index_add_(0, of, away) / count
        spread = float((x - x.mean(0)).square().sum(1).max())
        if not float((run.variance[h].double() - variance).abs().max()) <= 1e-5 * spread:
            return f"head {h}: variance off by {float((run.variance[h].double() - variance).abs().max())} of {spread}"
        if not abs(float(run.objective[h]) - float(away.mean())) <= 1e-5 * spread:
            return f"head {h}: objective {float(run.objective[h])}, wanted {float(away.mean())}"
        if limit:
            best, _ = lloyd((x - x.mean(0)).float(), n_clusters, 10)
            if not float(away.mean()) <= limit * best:
                return f"head {h}: objective {float(away.mean())}, Lloyd's {best}"
    return ""


def drawn(heads, rows, d, kind, seed, shift=0.0):
    """Keys around centres, away from 0 by `shift` in some channels, in random order."""
    gen = torch.Generator(device="cuda")
    gen.manual_seed(seed)
    out = torch.empty(heads, rows, d, device="cuda", dtype=DTYPE[kind])
    for h in range(heads):
        n = max(1, rows // 30)
        centres = 0.8 * torch.randn(n, d, device="cuda", generator=gen)
        at = torch.randint(n, (rows,), device="cuda", generator=gen)
        x = centres[at] + 0.5 * torch.randn(rows, d, device="cuda", generator=gen)
        x[:, ::7] += shift
        out[h] = x.to(out.dtype)
    return out


def checks(lib):
    failures, count = [], 0

    def note(what, keys, n_clusters, limit=None):
        nonlocal count
        count += 1
        try:
            failure = check(lib, keys, n_clusters, limit)
        except RuntimeError as error:
            failure = str(error)[:200]
        if failure:
            failures.append(f"FAIL {what}: {failure}")

    for kind in (F16, BF16):
        for d in (64, 96, 128, 256):
            note(f"type {kind}, {d}", drawn(3, 6000, d, kind, 1), 300, 1.02)
            note(f"type {kind}, {d}, away from 0", drawn(2, 5003, d, kind, 2, 12.0), 250, 1.02)
        for rows, n in [(1, 1), (2, 1), (2, 2), (100, 1), (100, 100), (127, 64), (129, 5), (1000, 999), (4097, 200)]:
            note(f"type {kind}, {rows} into {n}", drawn(2, rows, 64, kind, 3), n)
        same = torch.ones(2, 700, 64, device="cuda", dtype=DTYPE[kind])
        note(f"type {kind}, equal keys", same, 50)
        few = drawn(1, 5, 64, kind, 4)[:, torch.arange(3000, device="cuda") % 5].contiguous()
        note(f"type {kind}, five values", few, 40)
    note("many", drawn(2, 100000, 128, BF16, 5), 5000, 1.02)
    for f in failures[:30]:
        print(f)
    print(f"{count - len(failures)} of {count} clustering checks passed", flush=True)
    return failures


def main():
    lib = load(sys.argv[1])
    torch.backends.cuda.matmul.allow_tf32 = False
    return 1 if checks(lib) else 0


if __name__ == "__main__":
    sys.exit(main())
