"""libsqueeze_cuda for Python, and layers of synthetic keys on the GPU."""
import ctypes as c
import torch

from structs import (BF16, CUDA, F16, I8, Attend, Calibrate, Cluster, Codes, Layer, Level, Merge, Plan, Rows, Selection,
                     Shape)

DTYPE = {F16: torch.float16, BF16: torch.bfloat16}


def load(path):
    lib = c.CDLL(path)
    for name in ("attend", "calibrate", "cluster"):
        getattr(lib, f"sqz_cuda_{name}_workspace_bytes").restype = c.c_size_t
    for name in ("attend_supported", "cluster_supported", "device_supported"):
        getattr(lib, "sqz_cuda_" + name).restype = c.c_bool
    return lib


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


class CodedKeys:
    """Codes of keys as lib/codes.h defines them, along random directions and with entries drawn from the keys."""

    def __init__(self, heads_kv, head_dim, n, n_words, gen):
        self.n_words, self.m = n_words, min(24 * n_words, head_dim)
        parts, dev = 8 * n_words, "cuda"
        self.words = torch.zeros(heads_kv, n_words, n, device=dev, dtype=torch.int32)
        cuts = torch.rand(heads_kv, parts - 1, device=dev, generator=gen).mul(self.m + 1).long().sort().values
        even = (torch.arange(parts + 1, device=dev) * self.m // parts).expand(heads_kv, -1)
        self.first = torch.where(torch.arange(heads_kv, device=dev)[:, None] % 2 == 0, even, torch.cat(
            [torch.zeros_like(cuts[:, :1]), cuts, torch.full_like(cuts[:, :1], self.m)], 1)).to(torch.int32).contiguous()
        q = torch.linalg.qr(torch.randn(heads_kv, head_dim, head_dim, device=dev, generator=gen)).Q
        self.directions = q[:, :self.m].half().contiguous()
        self.book = torch.empty(heads_kv, 16, self.m, device=dev, dtype=torch.float16)
        self.spread = torch.empty(heads_kv, self.m, device=dev)

    def encode(self, h, difference, gen):
        at = difference @ self.directions[h].float().T
        n = len(at)
        self.spread[h] = at.square().mean(0) / difference.square().sum(1).mean().clamp_min(1e-20)
        self.book[h] = at[torch.randint(n, (16,), device="cuda", generator=gen)].half()
        first = self.first[h].tolist()
        for p in range(8 * self.n_words):
            i, j = first[p], first[p + 1]
            if j > i:
                code = torch.cdist(at[:, i:j], self.book[h, :, i:j].float()).argmin(1)
                shifted = code << (4 * (p % 8))
                self.words[h, p // 8] |= torch.where(shifted >= 1 << 31, shifted - (1 << 32), shifted).to(torch.int32)

    def struct(self):
        return Codes(self.n_words, self.m, address(self.words), address(self.directions), address(self.book),
                     address(self.first), address(self.spread))

    def estimates(self, h, x, scale):
        """Of query rows x F64: what codes add to every key's logit [rows][n], and the deviation of a logit [rows]."""
        at = x @ self.directions[h].double().T
        first, total = self.first[h].tolist(), 0
        for p in range(8 * self.n_words):
            i, j = first[p], first[p + 1]
            table = scale * at[:, i:j] @ self.book[h, :, i:j].double().T
            total = total + table[:, (self.words[h, p // 8].long() >> (4 * (p % 8))) & 15]
        return total, scale * (at.square() * self.spread[h].double()).sum(1).sqrt()


class SyntheticLayer:
    """Keys around centres that lie around coarser centres, sorted by cluster, as lib/ sorts them: K heads of N rows."""

    def __init__(self, heads, heads_kv, head_dim, rows, n_fixed, clusters, kind, seed, rule=0, group=0, int8=False,
                 values=True, codes=0):
        self.n_head, self.k, self.d, self.n, self.n_fixed, self.kind = heads, heads_kv, head_dim, rows, n_fixed, kind
        self.clusters, self.rule, self.group = clusters, rule, group
        gen = torch.Generator(device="cuda")
        gen.manual_seed(seed)
        dev, dt = "cuda", DTYPE[kind]

        def cuts(total, parts):
            """Strictly increasing offsets, parts of uneven sizes."""
            if parts == total:
                return torch.arange(parts + 1, device=dev, dtype=torch.int64)
            at = (torch.arange(parts + 1, device=dev, dtype=torch.float64) * total / parts)
            spread = 0.45 * max(total / parts - 1, 0)
            at[1:-1] += (torch.rand(parts - 1, device=dev, generator=gen, dtype=torch.float64) * 2 - 1) * spread
            at = at.floor().long()
            at[0], at[-1] = 0, total
            return at

        self.offset = []
        below = rows - n_fixed
        for n_clusters in clusters:
            self.offset.append(torch.stack([cuts(below, n_clusters) for _ in range(heads_kv)]))
            below = n_clusters
        self.keys = torch.empty(heads_kv, rows, head_dim, device=dev, dtype=dt)
        self.values = torch.empty(heads_kv, rows, head_dim, device=dev, dtype=dt)
        self.centres = []
        self.centroids = [torch.empty(heads_kv, n, head_dim, device=dev) for n in clusters]
        self.value_centroids = [torch.empty(heads_kv, n, head_dim, device=dev) for n in clusters]
        self.variance = [torch.empty(heads_kv, n, device=dev) for n in clusters]
        self.codes = CodedKeys(heads_kv, head_dim, rows - n_fixed, codes, gen) if codes else None
        for h in range(heads_kv):
            coarse_n = max(1, clusters[0] // 5)
            coarse = torch.randn(coarse_n, head_dim, device=dev, generator=gen)
            owner = torch.arange(clusters[0], device=dev) * coarse_n // clusters[0]
            centre = 0.8 * coarse[owner] + 0.6 * torch.randn(clusters[0], head_dim, device=dev, generator=gen)
            self.centres.append(centre)
            sizes = (self.offset[0][h, 1:] - self.offset[0][h, :-1])
            row_cluster = torch.repeat_interleave(torch.arange(clusters[0], device=dev), sizes)
            k = torch.randn(rows, head_dim, device=dev, generator=gen)
            k[n_fixed:] = centre[row_cluster] + 0.35 * k[n_fixed:]
            self.keys[h] = k.to(dt)
            self.values[h] = torch.randn(rows, head_dim, device=dev, generator=gen).to(dt)
            del k
            for l, n_clusters in enumerate(clusters):
                if l > 0:
                    parts = self.offset[l][h, 1:] - self.offset[l][h, :-1]
                    up = torch.repeat_interleave(torch.arange(n_clusters, device=dev), parts)
                    row_cluster = up[row_cluster]
                count = torch.bincount(row_cluster, minlength=n_clusters).float()[:, None]
                kf, vf = self.keys[h, n_fixed:].float(), self.values[h, n_fixed:].float()
                zero = torch.zeros(n_clusters, head_dim, device=dev)
                self.centroids[l][h] = zero.clone().index_add_(0, row_cluster, kf) / count
                self.value_centroids[l][h] = zero.clone().index_add_(0, row_cluster, vf) / count
                away = (kf - self.centroids[l][h][row_cluster]).square().mean(1)
                self.variance[l][h] = torch.zeros(n_clusters, device=dev).index_add_(0, row_cluster, away) \
                    / count[:, 0] * head_dim
                if codes and l == 0:
                    self.codes.encode(h, kf - self.centroids[0][h][row_cluster], gen)
                del kf, vf, away
        self.key_mean = self.keys.float().mean(1) if int8 else None
        self.centroids_i8, self.centroid_scale = [None] * len(clusters), [None] * len(clusters)
        for l in range(len(clusters)):
            if int8:
                rel = self.centroids[l] - self.key_mean[:, None]
                scale = rel.abs().amax(2) / 127
                self.centroids_i8[l] = (rel / scale[..., None]).round().to(torch.int8)
                self.centroid_scale[l] = scale.contiguous()
                self.centroids[l] = None
            else:
                self.centroids[l] = self.centroids[l].to(dt)
            self.value_centroids[l] = self.value_centroids[l].to(dt)
        self.offset = [o.to(torch.int32).contiguous() for o in self.offset]
        self.struct = Layer(CUDA, Shape(heads, heads_kv, head_dim, head_dim ** -0.5), rows, n_fixed,
                            Rows(kind, address(self.keys)), Rows(kind, address(self.values)), len(clusters))
        self.struct.rule, self.struct.group = rule, group
        if codes:
            self.struct.codes = self.codes.struct()
        for l, n_clusters in enumerate(clusters):
            centroids = Rows(I8, address(self.centroids_i8[l]), address(self.centroid_scale[l]),
                             address(self.key_mean)) if int8 else Rows(kind, address(self.centroids[l]))
            self.struct.level[l] = Level(n_clusters, centroids, Rows(kind, address(self.value_centroids[l])),
                                         address(self.offset[l]), address(self.variance[l]))

    def level_centroids(self, l, h):
        """F64 [C][D] as lookup sees them."""
        if self.centroids[l] is not None:
            return self.centroids[l][h].double()
        return self.key_mean[h].double() + self.centroid_scale[l][h].double()[:, None] * self.centroids_i8[l][h].double()

    def queries(self, tokens, seed, sharpness):
        """type [tokens][H][D]; sharpness differs from head to head, so heads retain unequal amounts."""
        gen = torch.Generator(device="cuda")
        gen.manual_seed(seed)
        group = self.n_head // self.k
        q = torch.empty(tokens, self.n_head, self.d, device="cuda")
        for h in range(self.n_head):
            centre = self.centres[h // group]
            pick = torch.randint(len(centre), (tokens,), device="cuda", generator=gen)
            noise = torch.randn(tokens, self.d, device="cuda", generator=gen)
            q[:, h] = sharpness * (0.6 + 0.8 * (h % 5) / 4) * (centre[pick] + 0.5 * noise)
        return q.to(DTYPE[self.kind])


class Call:
    """One struct sqz_cuda_attend_args with what it points to."""

    def __init__(self, lib, layer, queries, log_threshold=None, dense=False, sequences=1, user=None, n_user=0,
                 user_rows=None, variance_gain=None, tail_gain=None, tail_skip=0.5):
        self.lib, self.layer, self.q = lib, layer, queries
        tokens = queries.shape[0] // sequences
        self.out = torch.full_like(queries, float("nan"))
        self.lse = torch.full(queries.shape[:2], float("nan"), device="cuda")
        self.n_retained = torch.zeros(sequences, layer.k, device="cuda", dtype=torch.int32)
        self.keep = [log_threshold, user, user_rows, variance_gain, tail_gain]
        self.args = Attend(c.pointer(layer.struct),
                           Plan(address(log_threshold), address(variance_gain), address(tail_gain), tail_skip, False),
                           dense,
                           sequences, tokens, address(queries), address(self.out), address(self.lse),
                           address(user[0]) if user else None, address(user[1]) if user else None,
                           user[0].shape[2] if user else 0, n_user, address(user_rows), None,
                           address(self.n_retained))
        size = lib.sqz_cuda_attend_workspace_bytes(c.byref(self.args))
        self.supported = size > 0
        self.workspace = torch.full((max(size, 1),), 0xff, device="cuda", dtype=torch.uint8)
        self.args.workspace, self.args.workspace_bytes = address(self.workspace), size

    def attend(self):
        status = self.lib.sqz_cuda_attend(c.byref(self.args), c.c_void_p(torch.cuda.current_stream().cuda_stream))
        if status:
            raise RuntimeError(f"sqz_cuda_attend: status {status}")

    def select(self):
        s = Selection()
        status = self.lib.sqz_cuda_select(c.byref(self.args), c.byref(s),
                                          c.c_void_p(torch.cuda.current_stream().cuda_stream))
        if status:
            raise RuntimeError(f"sqz_cuda_select: status {status}")
        return s

    def lists(self, selection):
        """Groups of every (sequence, head) as tensors, and log Z [B][T][H]."""
        torch.cuda.synchronize()
        base = self.workspace.data_ptr()
        def view(pointer, count, dtype, size):
            at = pointer - base
            return self.workspace[at:at + count * size].view(dtype)
        pairs = self.args.n_sequences * self.layer.k
        n = view(selection.n_groups, pairs, torch.int32, 4).tolist()
        groups = view(selection.groups, pairs * selection.capacity, torch.int32, 4).view(pairs, selection.capacity)
        rows = self.q.shape[0] * self.layer.n_head
        total = view(selection.log_total, rows, torch.float32, 4).view(self.q.shape[0], self.layer.n_head).clone()
        return [groups[p, :n[p]].long().clone() for p in range(pairs)], total


def calibrated(lib, layer, queries, first=-30.0, step=0.02, points=1500):
    """Share of rows read [K][P] and the grid of log thresholds, of queries [n][H][D]."""
    share = torch.empty(layer.k, points, device="cuda")
    args = Calibrate(c.pointer(layer.struct), None, queries.shape[0], address(queries), points, first, step,
                     address(share))
    size = lib.sqz_cuda_calibrate_workspace_bytes(c.byref(args))
    workspace = torch.empty(max(size, 1), device="cuda", dtype=torch.uint8)
    args.workspace, args.workspace_bytes = address(workspace), size
    status = lib.sqz_cuda_calibrate(c.byref(args), c.c_void_p(torch.cuda.current_stream().cuda_stream))
    if status:
        raise RuntimeError(f"sqz_cuda_calibrate: status {status}")
    torch.cuda.synchronize()
    return share, first + step * torch.arange(points, device="cuda")


def threshold_for(share, grid, wanted):
    """One log threshold for all heads whose mean share is nearest to `wanted`."""
    return float(grid[(share.mean(0) - wanted).abs().argmin()])
