"""Blocks of tokens: checks sqz_cuda_attend() against float64, then times it against torch's dense kernels.

usage: block.py LIBRARY OUT.json [check]     check: no timing"""
import json
import math
import sys
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from squeeze_cuda import *


def reference(layer, q, user, n_user, keep_share, lists=None):
    """q [T][H][D]: (log threshold [K], groups of each head, out, lse, whether a lookup's list may differ)."""
    t, g, scale, d = q.shape[0], layer.n_head // layer.k, layer.d ** -0.5, layer.d
    out = torch.empty(t, layer.n_head, d, device="cuda", dtype=torch.float64)
    lse = torch.empty(t, layer.n_head, device="cuda", dtype=torch.float64)
    limits, found = [], []
    for h in range(layer.k):
        x = q[:, h * g:(h + 1) * g].reshape(t * g, d).double()
        keys, values = layer.keys[h].double(), layer.values[h].double()
        token = torch.arange(t, device="cuda").repeat_interleave(g)
        own = []
        if n_user:
            own = [(scale * x @ user[0][0, h, :n_user].double().T).masked_fill(
                torch.arange(n_user, device="cuda")[None] > (n_user - t + token)[:, None], -math.inf)]
        if keep_share is not None:
            exact = torch.cat([scale * x @ keys[:layer.n_fixed].T] + own, 1)
            y = scale * x @ layer.level_centroids(0, h).T
            size = layer.offset[0][h].long()
            size = (size[1:] - size[:-1])
            z = torch.logsumexp(y + size.double().log(), 1)
            if layer.rule == 0 and exact.shape[1]:
                z = torch.logaddexp(z, torch.logsumexp(exact, 1))
            s = (y - z[:, None]).exp().mean(0)
            ordered = s.sort(descending=True).values
            n = min(max(int(len(s) * keep_share), 1), len(s) - 1) if len(s) > 1 else 0
            limit = math.sqrt(float(ordered[n - 1]) * float(ordered[n])) if n else float(ordered[0]) * 0.5
            limits.append(math.log(limit))
            rows = torch.zeros((layer.n + 7) // 8 * 8, device="cuda", dtype=torch.bool)
            rows[:layer.n_fixed] = True
            rows[layer.n_fixed:layer.n] = torch.repeat_interleave(s >= limit, size)
            mine = rows.view(-1, 8).any(1).nonzero()[:, 0]
        else:
            mine = torch.arange((layer.n + 7) // 8, device="cuda")
        found.append(mine)
        use = mine if lists is None else lists[h]
        at = (use[:, None] * 8 + torch.arange(8, device="cuda")).flatten()
        at = at[at < layer.n]
        logits = torch.cat([scale * x @ keys[at].T] + own, 1)
        v = torch.cat([values[at]] + ([user[1][0, h, :n_user].double()] if n_user else []))
        out[:, h * g:(h + 1) * g] = (logits.softmax(1) @ v).view(t, g, d)
        lse[:, h * g:(h + 1) * g] = torch.logsumexp(logits, 1).view(t, g)
    return limits, found, out, lse


def check(lib, layer, t, keep_share, n_user, seed):
    q = layer.queries(t, seed, 0.7)
    user = None
    if n_user:
        user = tuple(torch.randn(1, layer.k, n_user + 3, layer.d, device="cuda").to(q.dtype) for _ in range(2))
        for u in user:
            u[:, :, n_user:] = float("nan")
    limits, found, out, lse = reference(layer, q, user, n_user, keep_share)
    log_threshold = torch.tensor(limits, device="cuda") if limits else None
    call = Call(lib, layer, q, log_threshold, keep_share is None, 1, user, n_user)
    if not call.supported:
        return "not supported"
    call.attend()
    torch.cuda.synchronize()
    failure = []
    if keep_share is not None:
        first = call.out.clone()
        lists, _ = call.lists(call.select())
        for h in range(layer.k):
            if lists[h].shape != found[h].shape or not bool((lists[h] == found[h]).all()):
                a, b = set(lists[h].tolist()), set(found[h].tolist())
                if len(a ^ b) > (16 if layer.key_mean is not None else 8):  # clusters at the limit; INT8 ones are rounded to type
                    failure.append(f"head {h}: {len(a)} groups, wanted {len(b)}, {len(a ^ b)} differ")
        call.attend()
        torch.cuda.synchronize()
        if not torch.equal(first, call.out):
            failure.append("a second call gave other bits")
        _, _, out, lse = reference(layer, q, user, n_user, keep_share, lists)
    eps = 2 ** -9 if layer.kind == F16 else 2 ** -6  # weights are rounded to 16 bits too
    error, size = float((call.out.double() - out).abs().max()), max(1.0, float(out.abs().max()))
    if not error <= eps * size:
        failure.append(f"output off by {error} of {size}")
    error = float((call.lse.double() - lse).abs().max())
    if not error <= 2e-3:
        failure.append(f"lse off by {error}")
    return "; ".join(failure)


def checks(lib):
    failures, count = [], 0
    for heads, kv, d in [(2, 2, 128), (4, 2, 128), (2, 2, 64), (6, 2, 96), (2, 1, 256), (5, 1, 64)]:
        for kind in (F16, BF16):
            for rows, fixed, clusters, int8 in [(3003, 80, 150, False), (2000, 0, 97, True), (81, 80, 1, False)]:
                layer = SyntheticLayer(heads, kv, d, rows, fixed, [clusters], kind, 7, int8=int8)
                for t, share, n_user in [(128, 0.2, 0), (65, 0.1, 70), (200, None, 0), (2, 0.3, 2), (333, 0.5, 333)]:
                    what = f"{heads}:{kv} x {d}, type {kind}, rows {rows}, int8 {int8}, T {t}, share {share}, user {n_user}"
                    count += 1
                    try:
                        failure = check(lib, layer, t, share, n_user, 5)
                    except RuntimeError as error:
                        failure = str(error)[:200]
                    if failure:
                        failures.append(f"FAIL {what}: {failure}")
    for f in failures[:30]:
        print(f)
    print(f"{count - len(failures)} of {count} checks passed", flush=True)
    return failures


def timed(run, repeats):
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    times.sort()
    return times[len(times) // 2]


def dense_times(q, layer, repeats):
    found, query = {}, q.permute(1, 0, 2).unsqueeze(0).contiguous()
    k, v = layer.keys.unsqueeze(0), layer.values.unsqueeze(0)
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash_attention_2", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                found[name] = timed(lambda: torch.nn.functional.scaled_dot_product_attention(query, k, v), repeats)
        except RuntimeError as error:
            print("no", name, str(error)[:100])
    return found


def main():
    lib = load(sys.argv[1])
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    failures = checks(lib)
    if len(sys.argv) > 3:
        return 1 if failures else 0
    layer = SyntheticLayer(32, 32, 128, 524288, 80, [26214], BF16, 1)
    rows = []
    for t in (128, 512, 1024, 4096):
        q = layer.queries(t, 11, 0.9)
        low, high = -30.0, 0.0
        limit = torch.empty(layer.k, device="cuda")
        call = Call(lib, layer, q, limit)
        for _ in range(11):  # one threshold for all heads that retains a tenth of the rows
            middle = 0.5 * (low + high)
            limit.fill_(middle)
            call.select()
            torch.cuda.synchronize()
            share = float(call.n_retained.double().mean()) * 8 / layer.n
            low, high = (middle, high) if share > 0.1 else (low, middle)
        call.attend()
        lists, _ = call.lists(call.select())
        call.attend()
        torch.cuda.synchronize()
        worst = 0.0
        for h in (0, 31):
            at = (lists[h][:, None] * 8 + torch.arange(8, device="cuda")).flatten()
            p = (q[:32, h].double() @ layer.keys[h][at].double().T * layer.d ** -0.5).softmax(1)
            worst = max(worst, float((p @ layer.values[h][at].double() - call.out[:32, h].double()).abs().max()))
        # Every head the same share: per head, the quantile of its own scores would do; lists are what they are.
        n = [len(x) for x in lists]
        groups = sum(n)
        dense = dense_times(q, layer, 5 if t < 4096 else 3)
        best = min(dense, key=dense.get)
        total, lookup = timed(call.attend, 9), timed(call.select, 9)
        flop = 4.0 * t * groups * 8 * layer.d
        ours = Call(lib, layer, q, dense=True)
        mine = timed(ours.attend, 3)
        row = dict(queries=t, card=torch.cuda.get_device_name(), rows_read=groups * 8 / (layer.k * layer.n),
                   least_groups=min(n), most_groups=max(n), error=worst, dense=dense, best_dense=best,
                   best_dense_ms=dense[best], squeeze_dense_ms=mine, ms=total, lookup_ms=lookup,
                   attention_ms=total - lookup, ratio=dense[best] / total,
                   attention_tflop_s=flop / (total - lookup) / 1e9,
                   lookup_tflop_s=4.0 * t * 32 * 26214 * 128 / lookup / 1e9,
                   dense_tflop_s=4.0 * t * layer.n * 32 * 128 / mine / 1e9)
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        json.dump(rows, open(sys.argv[2], "w"), indent=1)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
