"""sqz_cuda_attend() against float64 on small layers: which groups are retained, output, log-sum-exp. Exits 1 on failure.

usage: check.py LIBRARY [full | quick | tiny] [rows | blocks] [codes]     tiny: for compute-sanitizer
rows: one token only; blocks: the others; codes: layers with codes only"""
import itertools
import math
import sys
import torch
from squeeze_cuda import *


def reference(layer, q, log_threshold, user, n_user, variance_gain, tail_gain, tail_skip, groups=None):
    """Of one sequence, q [T][H][D]: groups of every head, output [T][H][D], lse and log Z [T][H]; user: (keys, values)
    [K][cap][D], of which token t sees the first n_user - T + t + 1.
    groups: take these in place of the lookup's. The last result says whether a score stands close to its limit."""
    g, scale, d = layer.n_head // layer.k, layer.d ** -0.5, layer.d
    out, lse, total, lists, close = [], [], [], [], False
    for h in range(layer.k):
        tokens = q.shape[0]
        x = q[:, h * g:(h + 1) * g].double().reshape(tokens * g, d)
        token = torch.arange(tokens, device="cuda").repeat_interleave(g)
        keys, values = layer.keys[h].double(), layer.values[h].double()
        own = [(user[0][h, :n_user].double(), user[1][h, :n_user].double())] if n_user else []
        own_logits = [torch.where(torch.arange(n_user, device="cuda")[None] < n_user - tokens + token[:, None] + 1,
                                  scale * x @ k.T, -math.inf) for k, _ in own]
        exact = torch.cat([scale * x @ keys[:layer.n_fixed].T] + own_logits, 1)
        known = torch.full((tokens * g,), -math.inf, device="cuda", dtype=torch.float64)
        if layer.rule == 0 and exact.shape[1]:
            known = torch.logsumexp(exact, 1)
        gain = (float(variance_gain[h]) if variance_gain is not None else 0) * scale ** 2 * x.square().sum(1) / (2 * d)
        full = scale ** 2 * x.square().sum(1) / (2 * d)
        tails, coded = [], layer.codes is not None and tokens == 1 and g <= 16
        if coded:
            added, deviation = layer.codes.estimates(h, x, scale)
        t = float(log_threshold[h])
        use = groups[h] if groups is not None else None
        read = torch.zeros((layer.n + 7) // 8, device="cuda", dtype=torch.bool)
        if use is not None:
            read[use] = True
        read = read.repeat_interleave(8)[layer.n_fixed:layer.n]
        active = torch.ones(layer.clusters[-1], device="cuda", dtype=torch.bool)
        for l in range(len(layer.clusters) - 1, -1, -1):
            begin = torch.arange(layer.clusters[l] + 1, device="cuda")
            for m in range(l, -1, -1):
                begin = layer.offset[m][h].long()[begin]
            count = (begin[1:] - begin[:-1]).double()
            raw = scale * x @ layer.level_centroids(l, h).T
            y = raw + gain[:, None] * layer.variance[l][h].double()
            masked = torch.where(active, y + count.log(), -math.inf)
            z = torch.logaddexp(torch.logsumexp(masked, 1), known)
            s = (y - z[:, None]).exp()
            s = s.amax(0) if layer.group else s.mean(0)
            limit = math.exp(t - (2 if l and not coded else 0))
            if coded:  # opened: by its score, or where a key may reach the threshold
                width = (4 if l else 2.5) * deviation[:, None] * layer.variance[l][h].double().sqrt()
                reach = raw + width - z[:, None]
                reach = torch.maximum(reach.amax(0), torch.where(s >= limit, t, -math.inf))
                if math.isfinite(t):
                    close |= bool(((reach - t).abs() < 3e-5)[active & (reach != t)].any())
                s, limit = reach, t
            elif 0 < limit < math.inf:
                close |= bool(((s / limit - 1).abs() < 2e-4)[active].any())
            keep = active & (s >= limit)
            pruned = active & ~keep
            if tail_gain is not None and pruned.any():
                weight = count
                if coded:
                    up = torch.cat([torch.zeros(1, device="cuda").long(), read.long().cumsum(0)])
                    weight = count - (up[begin[1:]] - up[begin[:-1]])
                y_tail = raw + full[:, None] * layer.variance[l][h].double() + float(tail_gain[h])
                tails.append((y_tail[:, pruned], weight[pruned], layer.value_centroids[l][h].double()[pruned]))
            if coded and l == 0:
                of = torch.repeat_interleave(torch.arange(len(count), device="cuda"), count.long())
                e = torch.where(keep[of], raw[:, of] + added, -math.inf)
                closed = torch.where(pruned, y + count.log(), -math.inf)
                z = torch.logaddexp(torch.logsumexp(torch.cat([closed, e], 1), 1), known)
                p = (e - z[:, None]).exp()
                s = p.amax(0) if layer.group else p.mean(0)
                if 0 < math.exp(t) < math.inf:
                    close |= bool(((s / math.exp(t) - 1).abs() < 3e-5).any())
                chosen = keep[of] & (s >= math.exp(t))
                if tail_gain is not None and keep.any():
                    left = torch.zeros(len(x), len(count), device="cuda", dtype=torch.float64)
                    left.index_add_(1, of, torch.where(read, 0, p))
                    w = (left * math.exp(float(tail_gain[h]))).clamp_max(1).log() + z[:, None]
                    tails.append((w[:, keep], torch.ones_like(count[keep]), layer.value_centroids[0][h].double()[keep]))
                rows_kept = chosen
            elif l == 0:
                rows_kept = torch.repeat_interleave(keep, count.long())
            if l:
                known = torch.logaddexp(known, torch.logsumexp(torch.where(pruned, y + count.log(), -math.inf), 1))
                up = layer.offset[l][h].long()
                active = torch.repeat_interleave(keep, up[1:] - up[:-1])
        rows = torch.zeros((layer.n + 7) // 8 * 8, device="cuda", dtype=torch.bool)
        rows[:layer.n_fixed] = True
        rows[layer.n_fixed:layer.n] = rows_kept
        found = rows.view(-1, 8).any(1).nonzero()[:, 0]
        lists.append(found)
        use = found if use is None else use
        at = (use[:, None] * 8 + torch.arange(8, device="cuda")).flatten()
        at = at[at < layer.n]
        logits, vs = [scale * x @ keys[at].T], [values[at]]
        for (_, v), y in zip(own, own_logits):
            logits.append(y)
            vs.append(v)
        for y_tail, count, v in tails:
            w = torch.minimum(y_tail, z[:, None]) + count.log()
            drop = (w - z[:, None]).exp().amax(0) < tail_skip * math.exp(t)
            logits.append(torch.where(drop, -math.inf, w))
            vs.append(v)
        logits = torch.cat(logits, 1)
        e = torch.logsumexp(logits, 1) if logits.shape[1] else torch.full((len(x),), -math.inf, device="cuda").double()
        p = torch.where(e[:, None] > -math.inf, (logits - e[:, None]).exp(), 0)
        out.append((p @ torch.cat(vs)).view(tokens, g, d))
        lse.append(e.view(tokens, g))
        total.append(z.view(tokens, g))
    return lists, torch.cat(out, 1), torch.cat(lse, 1), torch.cat(total, 1), close


def check(lib, name, layer, sequences=1, threshold=None, dense=False, n_user=0, varied_user=False, a=None, tail=None,
          sharpness=0.7, seed=1, tokens=1):
    q = layer.queries(sequences * tokens, seed, sharpness)
    user = None
    cap = n_user + 3
    if n_user:
        user = tuple(torch.randn(sequences, layer.k, cap, layer.d, device="cuda").to(q.dtype) for _ in range(2))
        for u in user:
            u[:, :, n_user:] = float("nan")  # rows that do not exist
    user_rows = None
    if varied_user:
        user_rows = (torch.arange(sequences, device="cuda", dtype=torch.int32) * 7 % (n_user + 1)).contiguous()
    t = torch.full((layer.k,), threshold if threshold is not None else 0.0, device="cuda")
    variance_gain = torch.full((layer.k,), a, device="cuda") if a is not None else None
    tail_gain = torch.full((layer.k,), tail, device="cuda") if tail is not None else None
    call = Call(lib, layer, q, None if dense else t, dense, sequences, user, n_user, user_rows, variance_gain, tail_gain)
    if not call.supported:
        return f"{name}: not supported"
    call.attend()
    torch.cuda.synchronize()
    if dense:
        lists = None
    else:
        out, lse = call.out.clone(), call.lse.clone()
        lists, total = call.lists(call.select())
        call.attend()  # again, over a used workspace: the same bits
        torch.cuda.synchronize()
        if not torch.equal(out, call.out) or not torch.equal(lse, call.lse):
            return f"{name}: a second call gave other bits"
    eps = 2 ** -10 if layer.kind == F16 else 2 ** -7
    for b in range(sequences):
        n = int(user_rows[b]) if varied_user else n_user
        own = tuple(u[b] for u in user) if user else None
        every = [torch.arange((layer.n + 7) // 8, device="cuda")] * layer.k
        mine = every if dense else lists[b * layer.k:(b + 1) * layer.k]
        limits = t if not dense else torch.full((layer.k,), -math.inf, device="cuda")
        at = slice(b * tokens, (b + 1) * tokens)
        want = reference(layer, q[at], limits, own, n, variance_gain, tail_gain, 0.5, mine)
        if not dense:
            for h in range(layer.k):
                same = mine[h].shape == want[0][h].shape and bool((mine[h] == want[0][h]).all())
                if not same and not want[4]:
                    return f"{name}: sequence {b} head {h}: {len(mine[h])} groups, wanted {len(want[0][h])}"
            error = (total[at] - want[3]).abs().max()
            if layer.codes and want[4]:
                continue  # a cluster more or less that is opened changes log Z and the tail
            if not float(error) <= 2e-3:
                return f"{name}: log Z off by {float(error)}"
            if not want[4] and [len(m) for m in mine] != call.n_retained[b].tolist():
                return f"{name}: n_retained"
        error = (call.out[at].double() - want[1]).abs().max()
        size = max(1.0, float(want[1].abs().max()))
        if not float(error) <= (eps if tokens == 1 else 2 * eps) * size:  # weights are rounded to the type in a block
            return f"{name}: output off by {float(error)} of {size}"
        error = torch.where(call.lse[at] == want[2], 0, (call.lse[at] - want[2]).abs()).max()
        if not float(error) <= 2e-3:
            return f"{name}: lse off by {float(error)}"
    return None


def main():
    lib = load(sys.argv[1])
    if not lib.sqz_cuda_device_supported():
        print("skipped: no CUDA device of sm_80 or newer")
        return 77
    failures, count = [], 0
    size = sys.argv[2] if len(sys.argv) > 2 else "full"
    shapes = [(4, 4, 128), (8, 2, 128), (4, 4, 64), (6, 3, 96), (4, 2, 256), (16, 1, 64), (20, 4, 128), (32, 1, 128)]
    word_counts = itertools.cycle([(2, 1), (1, 0), (4, 1), (3, 0), (2, 0)])  # with the rule of the group
    for (heads, kv, d), kind in itertools.product({"quick": shapes[:3], "tiny": shapes[1:2]}.get(size, shapes),
                                                 (BF16,) if size == "tiny" else (F16, BF16)):
        for (clusters, int8, rule, rows, fixed, group), coded in itertools.product(
                [([60], False, 0, 1203, 80, 0), ([60], False, 0, 1203, 80, 1), ([60, 12], False, 0, 1203, 80, 0),
                 ([100], True, 0, 2000, 0, 0), ([60, 20, 5], True, 1, 1200, 13, 0), ([60, 20, 5], True, 1, 1200, 13, 1),
                 ([1], False, 0, 1, 0, 0), ([1], False, 0, 81, 80, 1)], (False, True)):
            if "codes" in sys.argv and not coded:
                continue
            codes, group = next(word_counts) if coded else (0, group)
            layer = SyntheticLayer(heads, kv, d, rows, fixed, clusters, kind, 7, rule, group, int8, codes=codes)
            where = f"{heads}:{kv} x {d}, type {kind}, rows {rows}, clusters {clusters}, int8 {int8}, rule {rule}, " \
                f"codes {codes}, group {group}"
            for case in [dict(threshold=-7.0), dict(threshold=-5.0, n_user=37), dict(dense=True),
                         dict(dense=True, n_user=1), dict(threshold=math.inf), dict(threshold=-math.inf, n_user=5),
                         dict(threshold=-6.0, sequences=5, n_user=40, varied_user=True),
                         dict(threshold=-5.5, sequences=40, n_user=21, varied_user=True),
                         dict(threshold=-6.0, a=0.5, n_user=1100), dict(threshold=-5.5, a=0.75, tail=-0.3, n_user=9),
                         dict(threshold=math.inf, tail=0.2), dict(threshold=-6.0, a=6.0),
                         dict(threshold=-6.5, sharpness=6.0), dict(threshold=-6.5, tokens=33, n_user=40),
                         dict(threshold=-6.0, tokens=130, a=0.5), dict(dense=True, tokens=17, n_user=17),
                         dict(threshold=-math.inf, tokens=2), dict(threshold=math.inf, tokens=3, n_user=3),
                         dict(threshold=-6.0, tokens=5, sequences=2, n_user=9),
                         dict(threshold=-5.5, a=0.75, tail=-0.3, tokens=33, n_user=40),
                         dict(threshold=-4.5, tail=0.1, tokens=130), dict(threshold=math.inf, tail=0.2, tokens=7),
                         dict(threshold=-5.0, a=0.5, tail=0.0, tokens=3, sequences=2, n_user=9)]:
                if "rows" in sys.argv and "tokens" in case:
                    continue
                if "blocks" in sys.argv and "tokens" not in case:
                    continue
                try:
                    failure = check(lib, f"{where}, {case}", layer, **case)
                except RuntimeError as error:
                    failure = f"{where}, {case}: {error}"
                count += 1
                if failure:
                    failures.append(failure)
    layer = SyntheticLayer(8, 4, 128, 3000, 80, [150], BF16, 3, codes=2)
    q = layer.queries(3, 5, 0.7)
    for words, point in itertools.product((0, 2), (20, 60, 100, 140)):
        layer.struct.codes.n_words = words
        share, grid = calibrated(lib, layer, q, -12.0, 0.05, 200)
        t = torch.full((layer.k,), float(grid[point]) + 1e-4, device="cuda")
        read = torch.zeros(layer.k, device="cuda")
        for i in range(3):
            call = Call(lib, layer, q[i:i + 1].contiguous(), t)
            lists, _ = call.lists(call.select())
            read += torch.tensor([len(m) for m in lists], device="cuda") * 8 / 3 / 3000
        error = float((read - share[:, point]).abs().max())
        count += 1
        if not error <= (0.02 if words else 0.004):  # codes: one denominator for all points
            failures.append(f"calibration at point {point}, {words} words: off by {error}")
    for failure in failures[:40]:
        print("FAIL", failure)
    print(f"{count - len(failures)} of {count} checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
