"""Blocks of tokens: checks sqz_cuda_attend() against float64, and that calls on layers with many tiles give the same bits
every time. Exits 1 on failure.

usage: block.py LIBRARY [quick]"""
import math
import sys
import torch
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


def repeats(lib, layer, t, gain, n=20):
    """Whether n calls retain the same groups and give the same sums: with more tiles than stages on their way."""
    q = layer.queries(t, 9, 0.8)
    call = Call(lib, layer, q, torch.full((layer.k,), -9.0, device="cuda"),
                variance_gain=torch.full((layer.k,), gain, device="cuda") if gain else None)
    first = None
    for i in range(n):
        call.workspace.fill_(0xff)
        lists, total = call.lists(call.select())
        call.attend()
        torch.cuda.synchronize()
        now = lists + [total, call.out.clone(), call.lse.clone()]
        if first is None:
            first = now
        elif not all(torch.equal(a, b) for a, b in zip(first, now)):
            return f"call {i} differs from the first"
    return "" if sum(len(x) for x in lists) else "nothing retained"


def checks(lib, quick):
    failures, count = [], 0

    def note(what, check):
        nonlocal count
        count += 1
        try:
            failure = check()
        except RuntimeError as error:
            failure = str(error)[:200]
        if failure:
            failures.append(f"FAIL {what}: {failure}")

    for heads, kv, d in [(8, 8, 128), (8, 2, 128), (4, 4, 64)]:
        for int8 in (False, True):
            layer = SyntheticLayer(heads, kv, d, 65536, 80, [3276], BF16, 5, int8=int8)
            for t, gain in [(128, 0), (512, 0.5), (4096, 0)]:
                note(f"repeats, {heads}:{kv} x {d}, T {t}, gain {gain}, int8 {int8}", lambda: repeats(lib, layer, t, gain))
            note(f"large, {heads}:{kv} x {d}, int8 {int8}", lambda: check(lib, layer, 512, 0.1, 0, 5))
            del layer
    layer = SyntheticLayer(4, 2, 128, 3003, 80, [150], BF16, 7)
    for t in (1, 2, 3, 63, 64, 65, 127, 129, 255, 257, 1000, 4095, 4099):
        for share, n_user in [(0.1, 0), (0.1, t + 3)]:
            note(f"T {t}, user {n_user}", lambda: check(lib, layer, t, share, n_user, 5))
    if quick:
        for f in failures[:30]:
            print(f)
        print(f"{count - len(failures)} of {count} checks passed", flush=True)
        return failures
    for heads, kv, d in [(2, 2, 128), (4, 2, 128), (2, 2, 64), (6, 2, 96), (2, 1, 256), (5, 1, 64)]:
        for kind in (F16, BF16):
            for rows, fixed, clusters, int8 in [(3003, 80, 150, False), (2000, 0, 97, True), (81, 80, 1, False)]:
                layer = SyntheticLayer(heads, kv, d, rows, fixed, [clusters], kind, 7, int8=int8)
                for t, share, n_user in [(128, 0.2, 0), (65, 0.1, 70), (200, None, 0), (2, 0.3, 2), (333, 0.5, 333)]:
                    what = f"{heads}:{kv} x {d}, type {kind}, rows {rows}, int8 {int8}, T {t}, share {share}, user {n_user}"
                    note(what, lambda: check(lib, layer, t, share, n_user, 5))
    for f in failures[:30]:
        print(f)
    print(f"{count - len(failures)} of {count} checks passed", flush=True)
    return failures


def main():
    lib = load(sys.argv[1])
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    return 1 if checks(lib, "quick" in sys.argv) else 0


if __name__ == "__main__":
    sys.exit(main())
