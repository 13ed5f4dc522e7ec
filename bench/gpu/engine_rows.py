#!/usr/bin/env python3
"""Makes of what bench/gpu/engine.sh saved one file of rows: gpu-engine-<card>.json.

`share_of_limit`: the time in which the card would read the bytes of a token, by its memory's rate (a leaf of its data
sheet), over the time that was measured.
"""
import glob
import json
import os
import re
import sys

RATES = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}  # bytes a second, as NVIDIA says


def load(path):
    with open(path) as f:
        return json.load(f)


def row(what, report, budget, ms, llama_ms, share_of_limit=None):
    return {"what": what, "context_tokens": report["context_tokens"], "users": 1, "contexts": 1, "budget": budget,
            "ms": ms, "llama_ms": llama_ms, "vs_llama": llama_ms / ms, "share_of_limit": share_of_limit}


def rows_of(report, rate):
    budget, read = report["budget_asked"], report["squeezed_bytes_a_token"]
    ms = {m: 1e3 * report[m]["token_seconds"]["median"] for m in ("llama", "dense", "squeezed")}
    first = {m: 1e3 * report[m]["first_token_seconds"]["median"] for m in ("llama", "dense", "squeezed")}
    yield row("generate", report, 1.0, ms["dense"], ms["llama"]) | {"kl_vs_llama": report["dense_kl_mean_vs_llama"]}
    yield row("generate", report, budget, ms["squeezed"], ms["llama"],
              read / rate * 1e3 / ms["squeezed"] if rate else None) | {"budget_read": report["budget_read"]}
    for budget, method in ((1.0, "dense"), (budget, "squeezed")):
        yield row(f"question of {report['question_tokens']}", report, budget, first[method], first["llama"])
        if "long_question_tokens" in report:
            ms = {m: 1e3 * report[m]["long_question_seconds"]["median"] for m in ("llama", method)}
            long_row = row(f"question of {report['long_question_tokens']}", report, budget, ms[method], ms["llama"])
            if method == "squeezed" and "long_question_read" in report:
                long_row["budget_read"] = report["long_question_read"]
            yield long_row


def users_rows(report):
    """A step of all users together."""
    for r in report["rows"]:
        n = r["users"]
        yield {"what": "generate, users", "context_tokens": report["context_tokens"], "users": n,
               "contexts": n if report["apart"] else 1, "budget": report["budget_asked"], "selects": "centroids",
               "together": report["together"], "ms": 1e3 * n / r["tokens_s"], "llama_ms": 1e3 * n / r["llama_tokens_s"],
               "vs_llama": r["vs_llama"], "share_of_limit": None,
               "weight_copies_bytes": report["weight_copies_bytes"]} | {
                   k: r[k] for k in ("tokens_s", "first_token_s", "llama_first_token_s", "budget_read")}


def prepare_row(p, reports):
    """Of llama.cpp the fastest reading of as many tokens, whatever its batches were."""
    same = [r for r in reports if r["context_tokens"] == p["n_context_tokens"] and "llama_seconds" in r]
    best = min(same, key=lambda r: r["llama_seconds"], default=None)
    building = p["cluster_seconds"] + p["calibrate_seconds"]
    row = {"what": "prepare", "context_tokens": p["n_context_tokens"], "users": 1, "contexts": 1, "budget": None,
           "ms": 1e3 * p["seconds"], "llama_ms": None, "vs_llama": None, "share_of_limit": None}
    if best:
        llama = best["llama_seconds"]
        row |= {"llama_ms": 1e3 * llama, "vs_llama": llama / p["seconds"],
                "llama_batch_tokens": best["llama_batch_tokens"], "read_vs_llama": llama / p["read_seconds"],
                "build_share_of_llama": building / llama}
    return row | {k: p[k] for k in p if k.endswith("_seconds")}


def main():
    folder = sys.argv[1]
    gpu = load(os.path.join(folder, "gpu.json"))
    card = gpu["cards"][0]["name"]
    rate = next((r for name, r in RATES.items() if name in card), None)
    reports = []
    for path in glob.glob(os.path.join(folder, "generate-*.json")):
        reports.append(load(path) | {"selects": os.path.basename(path).split("-")[2]})
    reports.sort(key=lambda r: (r["context_tokens"], r["selects"], r["budget_asked"]))
    rows = [r | {"selects": report["selects"]} for report in reports for r in rows_of(report, rate)]
    for path in sorted(glob.glob(os.path.join(folder, "users-*.json"))):
        rows += users_rows(load(path))
    for path in sorted(glob.glob(os.path.join(folder, "prepare-*.json"))):
        rows.append(prepare_row(load(path), reports) | {"selects": os.path.basename(path).split("-")[2].split(".")[0]})
    for path in sorted(glob.glob(os.path.join(folder, "open-*.json"))):
        a = load(path)  # the context's pages are in memory; the model is open
        parts = {k: a[k] for k in ("context_open_seconds", "session_open_seconds", "first_token_seconds")}
        rows.append({"what": "open, to the first token", "context_tokens": int(path.split("-")[-2]), "users": 1,
                     "contexts": 1, "budget": a["budget_asked"], "ms": 1e3 * sum(parts.values()), "llama_ms": None,
                     "vs_llama": None, "share_of_limit": None} | parts)
    name = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-")
    out = os.path.join(folder, f"gpu-engine-{name}.json")
    with open(out, "w") as f:
        json.dump({"card": gpu["cards"][0], "model": "random weights, the shape of Llama-3.1-8B, Q4_0",
                   "version": gpu["version"], "rows": rows}, f, indent=1)
        f.write("\n")
    for r in rows:
        if r["what"] == "prepare" and r["vs_llama"]:
            print(f"prepare          {r['context_tokens']:8,} tokens, {r['selects']}: {r['ms'] / 1e3:.1f} s, llama.cpp "
                  f"reads them in {r['llama_ms'] / 1e3:.1f}: {r['vs_llama']:.2f}x, reading {r['read_vs_llama']:.2f}x, "
                  f"clustering and calibration {100 * r['build_share_of_llama']:.1f}% of it")
        elif r["vs_llama"]:
            what = r["what"] if r["users"] == 1 else f"{r['users']} users on {r['contexts']}"
            print(f"{what:16} {r['context_tokens']:8,} tokens, {r['selects']}, budget {r['budget']:.2f}: {r['ms']:8.2f} ms, "
                  f"llama.cpp {r['llama_ms']:8.2f}, {r['vs_llama']:.2f}x")
    print(out)


if __name__ == "__main__":
    main()
