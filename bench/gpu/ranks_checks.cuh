/* What ranks.cu checks: selections and results of two GPUs against those of one, and a rank that is silent. */
#ifndef SQZ_BENCH_GPU_RANKS_CHECKS_CUH
#define SQZ_BENCH_GPU_RANKS_CHECKS_CUH

#include <algorithm>
#include <chrono>

#include "ranks_gpus.cuh"

namespace
{

bool all_right = true;

void result(bool right, const char *what, const char *numbers)
{
    printf("%s %s: %s\n", right ? "right" : "WRONG", what, numbers);
    fflush(stdout);
    all_right = all_right && right;
}

/* Which groups a head reads, from this row's group on. */
void selected(gpu &g, const layer &l, const work &w, enum way way, uint32_t from, std::vector<std::vector<char>> &marks)
{
    struct sqz_cuda_selection s;
    const struct sqz_cuda_attend_args a = args_of(g, l, w, way);
    good(sqz_cuda_select(&a, &s, g.stream), "select");
    std::vector<uint32_t> n(K), list;
    CHECK(cudaMemcpyAsync(n.data(), s.n_groups, K * 4, cudaMemcpyDeviceToHost, g.stream));
    CHECK(cudaStreamSynchronize(g.stream));
    for (int h = 0; h < K; h++) {
        list.resize(n[h]);
        CHECK(cudaMemcpy(list.data(), s.groups + (size_t)h * s.capacity, n[h] * 4, cudaMemcpyDeviceToHost));
        for (uint32_t group : list) marks[h][from / 8 + group]++;
    }
}

std::vector<float> output(const layer &l)
{
    std::vector<__half> half(H * D);
    std::vector<float> out;
    CHECK(cudaMemcpy(half.data(), l.out, H * D * 2, cudaMemcpyDefault));
    for (__half x : half) out.push_back(__half2float(x));
    return out;
}

/* Largest difference over the largest number of the first; NaN where one is. */
double difference(const std::vector<float> &a, const std::vector<float> &b)
{
    double largest = 0, worst = 0;
    for (size_t i = 0; i < a.size(); i++) {
        largest = std::max(largest, (double)fabsf(a[i]));
        const double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
        if (worst != worst) break;
    }
    return worst / largest;
}

/* All rows of a layer and the user's, in double. */
std::vector<float> reference(const layer &l)
{
    auto halves = [](const __half *p, size_t n) {
        std::vector<__half> x(n);
        CHECK(cudaMemcpy(x.data(), p, n * 2, cudaMemcpyDefault));
        return x;
    };
    const size_t n = l.m.n_rows;
    const auto keys = halves(l.m.keys, K * n * D), values = halves(l.m.values, K * n * D), q = halves(l.queries, H * D),
               own_keys = halves(l.own_keys, K * OWN * D), own_values = halves(l.own_values, K * OWN * D);
    std::vector<float> out(H * D);
    std::vector<std::thread> threads;
    for (int h = 0; h < H; h++)
        threads.emplace_back([&, h] {
            std::vector<double> sum(D, 0.0), logit;
            double largest = -INFINITY, total = 0;
            auto row = [&](const std::vector<__half> &of, const std::vector<__half> &own, size_t i) {
                return i < n ? &of[(h / G * n + i) * D] : &own[((size_t)(h / G) * OWN + i - n) * D];
            };
            for (size_t i = 0; i < n + OWN; i++) {
                double x = 0;
                for (int d = 0; d < D; d++)
                    x += (double)__half2float(q[h * D + d]) * __half2float(row(keys, own_keys, i)[d]);
                logit.push_back(x * l.rows.shape.scale);
                largest = std::max(largest, logit.back());
            }
            for (size_t i = 0; i < n + OWN; i++) {
                const double w = exp(logit[i] - largest);
                total += w;
                for (int d = 0; d < D; d++) sum[d] += w * __half2float(row(values, own_values, i)[d]);
            }
            for (int d = 0; d < D; d++) out[h * D + d] = (float)(sum[d] / total);
        });
    for (std::thread &t : threads) t.join();
    return out;
}

void check_way(layer &all, layer (&half)[RANKS], const work &w, enum way way, const char *name)
{
    char what[160], numbers[200];
    gpu &g = gpus[0];
    CHECK(cudaSetDevice(0));
    attend(g, all, w, ONE);
    CHECK(cudaStreamSynchronize(g.stream));
    const std::vector<float> want = output(all);
    size_t differ = 0, groups = 0, of_each[RANKS] = {0, 0};
    if (!w.dense) {
        std::vector<std::vector<char>> one(K, std::vector<char>(all.m.n_rows / 8 + 1)), parts[RANKS] = {one, one};
        selected(g, all, w, ONE, 0, one);
        on_both(
            [&](gpu &of) { selected(of, half[of.number], w, way, of.number * all.m.n_rows / 2, parts[of.number]); });
        for (int h = 0; h < K; h++)
            for (size_t i = 0; i < one[h].size(); i++) {
                groups += one[h][i];
                of_each[0] += parts[0][h][i], of_each[1] += parts[1][h][i];
                differ += one[h][i] != parts[0][h][i] + parts[1][h][i];
            }
    }
    double off[RANKS] = {0, 0}, again = 0;
    std::vector<float> first;
    for (int turn = 0; turn < 5; turn++) {
        on_both([&](gpu &of) {
            layer &l = half[of.number];
            CHECK(cudaMemsetAsync(l.out, 0xff, H * D * 2, of.stream));
            attend(of, l, w, way);
            CHECK(cudaStreamSynchronize(of.stream));
        });
        std::vector<float> got[RANKS] = {output(half[0]), output(half[1])};
        if (turn == 0) first = got[0];
        for (int i = 0; i < RANKS; i++) off[i] = std::max(off[i], difference(want, got[i]));
        again += memcmp(first.data(), got[0].data(), H * D * 4) || memcmp(first.data(), got[1].data(), H * D * 4);
    }
    snprintf(what, sizeof what, "%s, %s, %u rows, %u clusters", name, way_names[way], all.m.n_rows, all.m.n_clusters);
    snprintf(numbers, sizeof numbers,
             "off %.1e and %.1e of one GPU's, %zu of %zu groups differ (%zu + %zu), %g of 5 not alike", off[0], off[1],
             differ, groups, of_each[0], of_each[1], again);
    result(off[0] < 2e-3 && off[1] < 2e-3 && again == 0 && differ <= 4 + groups / 5000, what, numbers);
}

void check_dense(layer &all, layer (&half)[RANKS])
{
    const std::vector<float> want = reference(all);
    const std::vector<float> got[RANKS] = {output(half[0]), output(half[1])};
    char numbers[100];
    snprintf(numbers, sizeof numbers, "off %.1e and %.1e", difference(want, got[0]), difference(want, got[1]));
    result(difference(want, got[0]) < 2e-3 && difference(want, got[1]) < 2e-3, "dense, against sums in double",
           numbers);
}

/* A rank alone gives up in time, says so, and has no result; cleared, all goes on. */
void check_silence(layer &all, layer (&half)[RANKS])
{
    typedef std::chrono::steady_clock clock;
    const work w = {false, false, false};
    gpu &g = gpus[0];
    CHECK(cudaSetDevice(0));
    struct sqz_cuda_mailbox header;
    g.peers.patience_ns = 5000000;
    const clock::time_point begin = clock::now();
    for (int i = 0; i < 32; i++) attend(g, half[0], w, PEERS);
    CHECK(cudaStreamSynchronize(g.stream));
    const double ms = std::chrono::duration<double, std::milli>(clock::now() - begin).count();
    g.peers.patience_ns = PATIENCE;
    CHECK(cudaMemcpy(&header, g.peers.mailbox[0], sizeof header, cudaMemcpyDefault));
    const std::vector<float> out = output(half[0]);
    size_t numbers = 0;
    for (float x : out) numbers += x == x;
    char text[120];
    snprintf(text, sizeof text, "32 layers in %.1f ms, failed %u, %zu numbers in %zu", ms, header.failed, numbers,
             out.size());
    result(header.failed == 2 && numbers == 0 && ms < 1000, "a rank that does not answer, 5 ms of patience", text);
    for (void *mailbox : {g.peers.mailbox[0], g.peers.mailbox[1]})
        CHECK(cudaMemset(mailbox, 0, sqz_cuda_mailbox_bytes(RANKS, g.peers.n_rows)));
    for (gpu &of : gpus) {
        CHECK(cudaSetDevice(of.number));
        CHECK(cudaDeviceSynchronize());
    }
    check_way(all, half, w, PEERS, "after that");
}

void check_all(uint32_t n_rows, uint32_t keys_a_cluster, bool codes)
{
    gpu &g = gpus[0];
    CHECK(cudaSetDevice(0));
    layer all = make_layer(n_rows, keys_a_cluster, 1), half[RANKS];
    set_threshold(g, all, {false, false, false}, ONE, 0.05);
    for (uint32_t i = 0; i < RANKS; i++) {
        CHECK(cudaSetDevice(i));
        half[i] = half_of(all, i);
    }
    for (enum way way : {PEERS, NCCL}) {
        if (way == NCCL && !the_nccl.there) continue;
        check_way(all, half, {true, false, false}, way, "dense");
        if (way == PEERS && n_rows <= 32768) check_dense(all, half);
        check_way(all, half, {false, false, false}, way, "clusters");
        check_way(all, half, {false, false, true}, way, "clusters and tail");
    }
    check_silence(all, half);
    if (codes) {
        CHECK(cudaSetDevice(0));
        make_codes(all, 1);
        set_threshold(g, all, {false, true, false}, ONE, 0.05);
        for (uint32_t i = 0; i < RANKS; i++) {
            CHECK(cudaSetDevice(i));
            make_codes(half[i], 1);
            CHECK(cudaMemcpy(half[i].log_threshold, all.log_threshold, K * 4, cudaMemcpyDefault));
        }
        check_way(all, half, {false, true, false}, PEERS, "codes");
        check_way(all, half, {false, true, true}, PEERS, "codes and tail");
    }
    all.release();
    for (layer &l : half) l.release();
}

} // namespace

#endif
