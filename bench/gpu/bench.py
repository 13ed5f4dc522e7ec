"""Times sqz_cuda_* against the dense kernels of torch on the same device pointers, after checking results.

usage: bench.py LIBRARY OUT.json [only=PART,...] [NAME=VALUE to record ...]
PART: one, batch, blocks, maximum, grouped, int8, codes, cluster
Cold L2: 256 MiB are overwritten before every run. Time: median of runs between two events on the stream."""
import json
import math
import sys
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from squeeze_cuda import *

FLUSH = None


def timed(run, repeats=15):
    """Median and spread (10th and 90th percentile), ms."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        FLUSH.fill_(1)
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    times.sort()
    return times[len(times) // 2], times[len(times) // 10], times[-1 - len(times) // 10]


def dense_baselines(q, layer, repeats=7):
    """{name: ms} of torch's kernels, q type [T][H][D]."""
    found = {}
    query = q.permute(1, 0, 2).unsqueeze(0).contiguous()
    k, v = layer.keys.unsqueeze(0), layer.values.unsqueeze(0)
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash_attention_2", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                run = lambda: torch.nn.functional.scaled_dot_product_attention(
                    query, k, v, scale=layer.d ** -0.5, enable_gqa=layer.n_head != layer.k)
                found[name] = timed(run, repeats)[0]
        except RuntimeError as error:
            print("no", name, str(error)[:100])
    return found


def check_sample(layer, call, lists):
    """Largest error of two heads against float64 over the rows of the call's own selection (None: all)."""
    worst, g = 0, layer.n_head // layer.k
    for h in (0, layer.k - 1):
        keys, values = layer.keys[h], layer.values[h]
        if lists:
            at = (lists[h][:, None] * 8 + torch.arange(8, device="cuda")).flatten()
            keys, values = keys[at[at < layer.n]], values[at[at < layer.n]]
        p = (call.q[0, h * g:(h + 1) * g].double() @ keys.double().T * layer.d ** -0.5).softmax(1)
        worst = max(worst, float((p @ values.double() - call.out[0, h * g:(h + 1) * g].double()).abs().max()))
    return worst


def clustering(lib, rows, machine):
    """Keys in random order into 5% clusters, beside flash-kmeans where it is installed and Lloyd's iterations in torch.

    Objectives: mean squared distance to the mean of the cluster that a method's centroids give a key (ours: that it is
    in), float64, mean of two heads."""
    from cluster import Clustering, lloyd, distances
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except ImportError as error:
        batch_kmeans_Euclid = None
        print("no flash-kmeans:", error)

    def objective(x, at, n):
        x, count = x.double(), torch.bincount(at, minlength=n).clamp_min(1)
        mean = torch.zeros(n, x.shape[1], device="cuda", dtype=torch.float64).index_add_(0, at, x) / count[:, None]
        return float((x - mean[at]).square().sum(1).mean())

    for name, n in (("grouped", 131072), ("drawn", 131072), ("grouped", 524288), ("drawn", 524288)):
        n_clusters, heads = n // 20, 32
        if name == "grouped":
            keys = SyntheticLayer(heads, heads, 128, n, 0, [n_clusters], F16, 1, values=False).keys
            for h in range(heads):
                keys[h] = keys[h][torch.randperm(n, device="cuda")]
        else:  # no clusters in them at all
            keys = torch.randn(heads, n, 128, device="cuda").half()
        torch.cuda.empty_cache()
        heads_seen = (0, heads - 1)
        other, others = {}, {}
        if batch_kmeans_Euclid:
            run = lambda: batch_kmeans_Euclid(keys, n_clusters, max_iters=10, tol=-1.0)
            others["flash_kmeans"] = timed(run, 1)[0] if n < 200000 else None
            torch.cuda.synchronize()
            a, b = torch.cuda.Event(True), torch.cuda.Event(True)
            a.record()
            ids, centroids = run()[:2]
            b.record()
            b.synchronize()
            others["flash_kmeans"] = a.elapsed_time(b)
            other["flash_kmeans"] = sum(objective(keys[h], distances(keys[h].float(), centroids[h].float())[0], n_clusters)
                                        for h in heads_seen) / 2
            del ids, centroids
        x = [keys[h].float() for h in heads_seen]
        torch.backends.cuda.matmul.allow_tf32 = True
        found = [lloyd(y - y.mean(0), n_clusters, 10) for y in x]
        other["lloyd"] = sum(objective(keys[h], distances(y - y.mean(0), f[1])[0], n_clusters)
                             for h, y, f in zip(heads_seen, x, found)) / 2
        torch.backends.cuda.matmul.allow_tf32 = False
        del x, found
        best = min(other.values())
        for passes in (0, 4, 12):
            run = Clustering(lib, keys, n_clusters, passes)
            time = timed(run.run, 3)
            ours = sum(objective(keys[h], run.assignment(h), n_clusters) for h in heads_seen) / 2
            assert abs(float(run.objective[0]) - objective(keys[0], run.assignment(0), n_clusters)) < 1e-3 * ours
            row = dict(op="cluster", keys=name, tokens=n, kv_heads=heads, head_dim=128, clusters=n_clusters,
                       passes=passes or "default", ms=time[0], ms_p10=time[1], ms_p90=time[2], objective=ours,
                       workspace_gb=run.workspace.numel() / 1e9, others_ms=others, others_objective=other,
                       objective_vs_best=ours / best,
                       ratio=others["flash_kmeans"] / time[0] if others.get("flash_kmeans") else None)
            rows.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            del run
        del keys
        torch.cuda.empty_cache()


def main():
    global FLUSH
    lib = load(sys.argv[1])
    machine = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda,
                   cudnn=torch.backends.cudnn.version(), command="bench/gpu/bench.py LIB.so OUT.json")
    machine.update(x.split("=", 1) for x in sys.argv[3:])
    parts = machine.pop("only", "one,batch,blocks,maximum,grouped,int8,codes,cluster").split(",")
    FLUSH = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
    rows = []
    a = torch.empty(2 << 30, device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    copy = 2 * a.numel() / timed(lambda: b.copy_(a), 5)[0] / 1e9
    del a, b
    machine["copy_tb_s"] = copy
    print(machine, flush=True)

    def record(op, layer, queries, pruned, time, n_bytes, dense, **more):
        ms, low, high = time
        best = min(dense, key=dense.get) if dense else None
        best_ms = dense[best] if dense else None
        total = 4.0 * layer.k * layer.n * layer.d
        row = dict(op=op, queries=queries, tokens=layer.n, heads=layer.n_head, kv_heads=layer.k, head_dim=layer.d,
                   pruned=pruned, budget_read=n_bytes / total, ms=ms, ms_p10=low, ms_p90=high, best_dense=best,
                   best_dense_ms=best_ms, ratio=best_ms / ms if dense else None, gb_s=n_bytes / ms / 1e6,
                   limit_share=n_bytes / ms / 1e9 / copy, **more)
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        json.dump(dict(machine=machine, rows=rows), open(sys.argv[2], "w"), indent=1)

    def case(layer, prunings, two_levels=None, tag=""):
        row_bytes, q = 2.0 * layer.d, layer.queries(1, 11, 0.9)
        centroid_bytes = layer.k * layer.clusters[0] * (row_bytes / (2 if layer.key_mean is not None else 1) + 4)
        dense = dense_baselines(q, layer)
        for name, ms in dense.items():
            record("dense, " + name, layer, 1, 0, (ms, ms, ms), layer.k * layer.n * 2 * row_bytes, dense)
        call = Call(lib, layer, q, dense=True)
        call.attend()
        torch.cuda.synchronize()
        error = check_sample(layer, call, None)
        assert error < 0.02, error
        record("dense, squeeze", layer, 1, 0, timed(call.attend, 7), layer.k * layer.n * 2 * row_bytes, dense, error=error)
        share, grid = calibrated(lib, layer, q)
        for pruned in prunings:
            t = threshold_for(share, grid, 1 - pruned)
            call = Call(lib, layer, q, torch.full((layer.k,), t, device="cuda"))
            call.attend()
            torch.cuda.synchronize()
            lists, _ = call.lists(call.select())
            error = check_sample(layer, call, lists)
            assert error < 0.02, error
            groups = sum(len(x) for x in lists)
            n_bytes = groups * 8 * 2 * row_bytes + centroid_bytes
            record("squeezed" + tag, layer, 1, pruned, timed(call.attend), n_bytes, dense, error=error,
                   rows_read=groups * 8 / (layer.k * layer.n), least_groups=min(len(x) for x in lists),
                   most_groups=max(len(x) for x in lists))
            if pruned == prunings[0]:
                record("lookup, one level" + tag, layer, 1, pruned, timed(call.select), centroid_bytes, {})
                if len(prunings) > 1:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        call.attend()
                    record("squeezed, graph replay" + tag, layer, 1, pruned, timed(graph.replay), n_bytes, dense)
        return dense

    def batch(layer, sizes, log_threshold):
        row_bytes = 2.0 * layer.d
        t = torch.full((layer.k,), log_threshold, device="cuda")
        for n in sizes:
            q = layer.queries(n, 21, 0.9)
            together = Call(lib, layer, q, t, sequences=n)
            single = [Call(lib, layer, q[i:i + 1].contiguous(), t) for i in range(n)]
            together.attend()
            for s in single:
                s.attend()
            torch.cuda.synchronize()
            error = max(float((together.out[i] - s.out[0]).abs().max()) for i, s in enumerate(single))
            assert error < 0.02, error
            groups = int(together.n_retained.sum())
            apart = timed(lambda: [s.attend() for s in single], 7)
            shared = dense_baselines(q, layer, 5)  # every sequence's query in one dense pass over the shared context
            record("squeezed, batch", layer, n, 0.9, timed(together.attend, 7),
                   groups * 8 * 2 * row_bytes + layer.k * layer.clusters[0] * row_bytes, shared, singles_ms=apart[0],
                   error=error)

    def gathered(layer, q, dense):
        """The simplest thing that is right: the tenth of the rows that every head would retain is copied into a buffer,
        then dense attention. Without a lookup, and as many rows for every head."""
        n = layer.n // 10 // 8 * 8
        groups = torch.stack([torch.randperm(layer.n // 8, device="cuda")[:n // 8].sort().values for _ in range(layer.k)])
        at = (groups[:, :, None] * 8 + torch.arange(8, device="cuda")).flatten(1)[:, :, None].expand(-1, -1, layer.d)
        k, v = (torch.empty(layer.k, n, layer.d, device="cuda", dtype=q.dtype) for _ in range(2))
        query = q.permute(1, 0, 2).unsqueeze(0).contiguous()

        def run():
            torch.gather(layer.keys, 1, at, out=k)
            torch.gather(layer.values, 1, at, out=v)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                torch.nn.functional.scaled_dot_product_attention(query, k[None], v[None], scale=layer.d ** -0.5)
        record("gather and cudnn, no lookup", layer, q.shape[0], 0.9, timed(run, 3), layer.k * n * 4.0 * layer.d, dense)

    def bisected(layer, q, pruned):
        """A call of a block whose threshold leaves the wanted share of rows."""
        low, high = -40.0, 0.0
        call = Call(lib, layer, q, torch.zeros(layer.k, device="cuda"))
        for _ in range(14):
            middle = (low + high) / 2
            call.keep[0].fill_(middle)
            call.select()
            torch.cuda.synchronize()
            share = float(call.n_retained.sum()) * 8 / (layer.k * layer.n)
            low, high = (middle, high) if share > 1 - pruned else (low, middle)
        return call

    def maximum(layer, sizes):
        """Blocks whose scores are maxima over queries, without a tail and with one."""
        layer.struct.group = 1
        for tokens in sizes:
            q = layer.queries(tokens, 31, 0.9)
            dense = dense_baselines(q, layer, 3)
            call = bisected(layer, q, 0.9)
            call.attend()
            torch.cuda.synchronize()
            lists, _ = call.lists(call.select())
            error = check_sample(layer, call, lists)
            assert error < 0.03, error
            groups = sum(len(x) for x in lists)
            n_bytes = groups * 8 * 4.0 * layer.d + layer.k * layer.clusters[0] * 2.0 * layer.d
            more = dict(rows_read=groups * 8 / (layer.k * layer.n))
            record("squeezed, block, maximum", layer, tokens, 0.9, timed(call.attend, 5), n_bytes, dense, error=error,
                   lookup_ms=timed(call.select, 5)[0], **more)
            tail = Call(lib, layer, q, call.keep[0], tail_gain=torch.zeros(layer.k, device="cuda"))
            record("squeezed, block, maximum, tail", layer, tokens, 0.9, timed(tail.attend, 5), n_bytes, dense, **more)
        layer.struct.group = 0

    def blocks(layer, sizes, prunings):
        """Blocks of tokens that share a selection: lookup, compaction, attention."""
        row_bytes = 2.0 * layer.d
        for tokens in sizes:
            q = layer.queries(tokens, 31, 0.9)
            dense = dense_baselines(q, layer, 3)
            flops = 4.0 * tokens * layer.n_head * layer.n * layer.d
            for name, ms in dense.items():
                record("dense, " + name, layer, tokens, 0, (ms, ms, ms), layer.k * layer.n * 2 * row_bytes, dense,
                       tflop_s=flops / ms / 1e9)
            call = Call(lib, layer, q, dense=True)
            call.attend()
            torch.cuda.synchronize()
            error = check_sample(layer, call, None)
            assert error < 0.02, error
            time = timed(call.attend, 3)
            record("dense, squeeze", layer, tokens, 0, time, layer.k * layer.n * 2 * row_bytes, dense, error=error,
                   tflop_s=flops / time[0] / 1e9)
            gathered(layer, q, dense)
            for pruned in prunings:
                call = bisected(layer, q, pruned)
                call.attend()
                torch.cuda.synchronize()
                lists, _ = call.lists(call.select())
                error = check_sample(layer, call, lists)
                assert error < 0.03, error
                groups = sum(len(x) for x in lists)
                n_bytes = groups * 8 * 2 * row_bytes + layer.k * layer.clusters[0] * row_bytes
                time, lookup = timed(call.attend, 5), timed(call.select, 5)
                work = 4.0 * tokens * layer.n_head / layer.k * layer.d * groups * 8 + \
                    2.0 * tokens * layer.n_head * layer.clusters[0] * layer.d
                record("squeezed, block", layer, tokens, pruned, time, n_bytes, dense, error=error, lookup_ms=lookup[0],
                       tflop_s=work / time[0] / 1e9, rows_read=groups * 8 / (layer.k * layer.n))

    def reading(layer, call, wanted):
        """Sets the call's threshold so that about that share of the rows is read."""
        low, high = -40.0, 0.0
        for _ in range(18):
            call.keep[0].fill_((low + high) / 2)
            call.select()
            torch.cuda.synchronize()
            more = float(call.n_retained.sum()) * 8 / (layer.k * layer.n) > wanted
            low, high = ((low + high) / 2, high) if more else (low, (low + high) / 2)

    def opened_keys(layer, call, q):
        """How many keys' codes a call reads: those of clusters whose reach comes to the threshold, in F32."""
        group, scale, t, n = layer.n_head // layer.k, layer.d ** -0.5, float(call.keep[0][0]), 0
        for h in range(layer.k):
            x = q[0, h * group:(h + 1) * group].float()
            size = (layer.offset[0][h, 1:] - layer.offset[0][h, :-1]).float()
            y = scale * x @ layer.level_centroids(0, h).float().T
            known = torch.logsumexp(scale * x @ layer.keys[h, :layer.n_fixed].float().T, 1)
            z = torch.logaddexp(torch.logsumexp(y + size.log(), 1), known)[:, None]
            at = (x @ layer.codes.directions[h].float().T).square()
            deviation = scale * (at * layer.codes.spread[h]).sum(1).sqrt()[:, None]
            n += float(size[(y + 2.5 * deviation * layer.variance[0][h].sqrt() - z).amax(0) >= t].sum())
        return n

    def opening(layer, call, q, pruned, wanted):
        """Widens the reach of all clusters, more than these keys need, until about that share of the keys is opened."""
        spread, low, high = layer.codes.spread.clone(), 1.0, 256.0
        for _ in range(8):
            middle = (low * high) ** 0.5
            layer.codes.spread.copy_(spread * middle)
            reading(layer, call, 1 - pruned)
            more = opened_keys(layer, call, q) > wanted * layer.k * layer.n
            low, high = (low, middle) if more else (middle, high)

    def coded(layer, pruned):
        """Single keys by their codes beside whole clusters, at equal shares of rows that are read."""
        row_bytes, q = 2.0 * layer.d, layer.queries(1, 11, 0.9)
        centroid_bytes = layer.k * layer.clusters[0] * (layer.d + 12.0)
        dense = dense_baselines(q, layer)
        for words, tail, op in ((0, None, "squeezed, INT8 centroids"), (layer.codes.n_words, None, "squeezed, codes"),
                                (layer.codes.n_words, 0.0, "squeezed, codes, tail"),
                                (layer.codes.n_words, None, "squeezed, codes, a third opened")):
            layer.struct.codes.n_words = words
            zeros = torch.full((layer.k,), tail, device="cuda") if tail is not None else None
            call = Call(lib, layer, q, torch.zeros(layer.k, device="cuda"), tail_gain=zeros)
            if "third" in op:
                opening(layer, call, q, pruned, 1 / 3)
            reading(layer, call, 1 - pruned)
            call.attend()
            torch.cuda.synchronize()
            lists, _ = call.lists(call.select())
            error = check_sample(layer, call, lists) if tail is None else None
            assert tail is not None or error < 0.02, error
            groups = sum(len(x) for x in lists)
            opened = opened_keys(layer, call, q) if words else 0
            n_bytes = groups * 8 * 2 * row_bytes + centroid_bytes + opened * 4 * words
            more = dict(codes=words, error=error, rows_read=groups * 8 / (layer.k * layer.n),
                        keys_opened=opened / (layer.k * layer.n))
            record(op, layer, 1, pruned, timed(call.attend), n_bytes, dense, **more)
            if tail is None:
                record(op.replace("squeezed", "lookup"), layer, 1, pruned, timed(call.select),
                       centroid_bytes + opened * 4 * words, {}, **more)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call.attend()
                record(op + ", graph replay", layer, 1, pruned, timed(graph.replay), n_bytes, dense, **more)

    n = 524288
    if {"one", "batch", "blocks", "maximum"} & set(parts):
        layer = SyntheticLayer(32, 32, 128, n, 80, [26214, 5242], BF16, 1)
        two = list(layer.clusters)
        layer.struct.n_levels = 1  # one level first: the struct says how many
        q = layer.queries(1, 11, 0.9)
        share, grid = calibrated(lib, layer, q)
        t = threshold_for(share, grid, 0.1)
        if "one" in parts:
            dense = case(layer, [0.9, 0.7])
            layer.struct.n_levels = 2
            call = Call(lib, layer, q, torch.full((layer.k,), t, device="cuda"))
            call.attend()
            torch.cuda.synchronize()
            groups = int(call.n_retained.sum())
            record("lookup, two levels", layer, 1, 0.9, timed(call.select), layer.k * two[1] * 256.0, {})
            record("squeezed, two levels", layer, 1, 0.9, timed(call.attend), groups * 8 * 512.0 + layer.k * two[1] * 256.0,
                   dense, rows_read=groups * 8 / (layer.k * layer.n))
            layer.struct.n_levels = 1
        if "batch" in parts:
            batch(layer, [2, 8, 16], t)
        if "blocks" in parts:
            for tokens in (128, 512, 1024, 4096):
                try:
                    blocks(layer, [tokens], [0.9, 0.7])
                except (RuntimeError, AssertionError) as failure:  # the other rows still count
                    print("blocks of", tokens, "failed:", failure)
        if "maximum" in parts:
            maximum(layer, (128, 512, 1024, 4096))
        del layer
        torch.cuda.empty_cache()
    if "grouped" in parts:
        for n in (131072, 524288):
            layer = SyntheticLayer(32, 8, 128, n, 80, [n // 20], BF16, 2)
            case(layer, [0.9])
            del layer
            torch.cuda.empty_cache()
    if "int8" in parts:
        layer = SyntheticLayer(32, 32, 128, 131072, 80, [6553], BF16, 3, int8=True)
        case(layer, [0.9], tag=", INT8 centroids")
        del layer
        torch.cuda.empty_cache()
    if "codes" in parts:
        for heads_kv in (32, 8):
            layer = SyntheticLayer(32, heads_kv, 128, n, 80, [26214], BF16, 4, group=int(heads_kv < 32), int8=True,
                                   codes=2)
            coded(layer, 0.9)
            del layer
            torch.cuda.empty_cache()
    if "cluster" in parts:
        clustering(lib, rows, machine)
        json.dump(dict(machine=machine, rows=rows), open(sys.argv[2], "w"), indent=1)


if __name__ == "__main__":
    main()
