"""One call of each kind, for ncu: ncu.py LIBRARY"""
import sys
import torch
from squeeze_cuda import *

lib = load(sys.argv[1])
for heads_kv, n in ((32, 524288), (8, 131072)):
    layer = SyntheticLayer(32, heads_kv, 128, n, 80, [n // 20, n // 100], BF16, 1)
    q = layer.queries(1, 11, 0.9)
    layer.struct.n_levels = 1
    share, grid = calibrated(lib, layer, q)
    t = torch.full((layer.k,), threshold_for(share, grid, 0.1), device="cuda")
    torch.cuda.profiler.start()
    for levels in (1, 2):
        layer.struct.n_levels = levels
        call = Call(lib, layer, q, t)
        call.attend()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    del layer
