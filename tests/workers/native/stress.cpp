// The team of threads under ThreadSanitizer: passes and products by more threads than cores, compared with one thread's.
//
// Built and run by test_team_sanitized.py. Exit code 0 if every result was right bit by bit; what the sanitizer finds it
// says itself. With a second argument, a race that must be reported.
#include "standard.inc"
#define NAME(op) stress_##op
#define AREA_FLOATS (1 << 14)  // few layers go round
#include "kernels.inc"

#include <cstdio>
#include <mutex>

namespace {

uint64_t state = 1;
float noise() {  // xorshift, in [-0.5, 0.5)
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (float)((double)(state >> 40) / (1 << 24)) - 0.5f;
}
std::vector<float> noises(int64_t n, float scale = 1) {
  std::vector<float> made(n);
  for (float& x : made) x = noise() * scale;
  return made;
}

constexpr int64_t C = 32, HEADS = 4, KV = 2, SIZE = 8, HIDDEN = 48, VOCABULARY = 80, BLOCK = 16;

struct Weights {
  std::vector<float> memory;
  Linear linear;
  Weights(int64_t N, int64_t K) : memory(noises((N + 15) / 16 * 16 * K, 0.5f)), linear{memory.data(), nullptr, nullptr, N, K, 0} {}
};

// A small model and one step of it: `sequences` of `each` new tokens.
struct Model {
  std::vector<Weights> weights;
  std::vector<float> ones = std::vector<float>(C, 1.f), angles = noises(1024 * SIZE);
  std::vector<Layer> layers;
  std::vector<std::vector<float>> memory;
  std::vector<Pool> pools;
  Weights embedding{VOCABULARY, C};
  Pass pass{};

  Model(int64_t count, int64_t blocks, bool norms_behind) {
    weights.reserve(4 * count);
    for (int64_t i = 0; i < count; ++i) {
      for (auto [N, K] : {std::pair{(HEADS + 2 * KV) * SIZE, C}, {C, HEADS * SIZE}, {2 * HIDDEN, C}, {C, HIDDEN}})
        weights.emplace_back(N, K);
      Weights* w = &weights[4 * i];
      const float* behind = norms_behind ? ones.data() : nullptr;
      layers.push_back({w[0].linear, w[1].linear, w[2].linear, w[3].linear,
                        {ones.data(), behind, ones.data(), behind, nullptr, nullptr}, {1e-5f, 1e-5f, 1e-5f, 1e-5f, 0, 0},
                        {0.3f, 0, 0, nullptr}, HEADS, 0, SIZE});
      memory.push_back(std::vector<float>(blocks * BLOCK * KV * SIZE));
      memory.push_back(std::vector<float>(blocks * BLOCK * KV * SIZE));
    }
    for (int64_t i = 0; i < count; ++i)
      pools.push_back({memory[2 * i].data(), memory[2 * i + 1].data(), KV, SIZE, SIZE, BLOCK});
    pass = {layers.data(), count, angles.data(), angles.data(), SIZE, &embedding.linear, &embedding.linear, ones.data(), 1e-5f};
  }

  std::vector<float> run(int64_t sequences, int64_t each) {
    const int64_t T = sequences * each;
    std::vector<int32_t> tasks, tables(sequences), starts{0}, contexts;
    std::vector<int64_t> slots, ids, positions, rows, best(T);
    for (int64_t s = 0; s < sequences; ++s) {
      tables[s] = s;
      starts.push_back((s + 1) * each);
      contexts.push_back(each);
      tasks.insert(tasks.end(), {(int32_t)s, (int32_t)(s * each), (int32_t)((s + 1) * each)});
      for (int64_t i = 0; i < each; ++i) {
        slots.push_back(s * BLOCK + i);
        ids.push_back((7 * s + 3 * i) % VOCABULARY);
        positions.push_back(i);
        rows.push_back(s * each + i);
      }
    }
    Step step{tasks.data(), tables.data(), starts.data(), contexts.data(), slots.data(), sequences, 1, T, each};
    std::vector<float> out(T * VOCABULARY, NAN);
    std::atomic<int64_t> progress{0};
    stress_pass(&pass, &step, pools.data(), ids.data(), positions.data(), nullptr, rows.data(), T, out.data(), best.data(), &progress);
    for (int64_t i : best) out.push_back((float)i);
    return out;
  }
};

// Sums into places that other threads sum into too, without a word between them: what the sanitizer must see.
void planted(int64_t* shared) {
  team().run([&] {
    for (int i = 0; i < 100; ++i) ++*shared;
  });
}

int wrong = 0;
std::mutex saying;
void check(const std::vector<float>& found, const std::vector<float>& expected, const char* what) {
  if (std::memcmp(found.data(), expected.data(), expected.size() * sizeof(float)) == 0) return;
  std::lock_guard<std::mutex> guard(saying);
  ++wrong;
  std::printf("wrong: %s\n", what);
}

}  // namespace

int main(int count, char** given) {
  const int rounds = count > 1 ? std::atoi(given[1]) : 30;
  stress_set_threads(5);
  if (count > 2) {
    int64_t shared = 0;
    for (int i = 0; i < rounds; ++i) planted(&shared);
    return 0;
  }
  // few rows: each thread prepares for itself; many: rows are shared, and areas go round
  struct Case { int64_t layers, sequences, each; bool behind; const char* what; };
  for (const Case& c : {Case{6, 3, 1, false, "few rows"}, {6, 2, 2, true, "few rows, norms behind"},
                        {9, 4, 12, false, "many rows"}, {9, 4, 12, true, "many rows, norms behind"}}) {
    Model model(c.layers, c.sequences, c.behind);
    stress_set_threads(1);
    const auto expected = model.run(c.sequences, c.each);
    for (int threads : {2, 3, 7}) {
      stress_set_threads(threads);
      for (int i = 0; i < rounds; ++i) check(model.run(c.sequences, c.each), expected, c.what);
    }
  }
  // several callers: one has the team, the others compute alone
  stress_set_threads(3);
  Weights product(160, 40);
  const auto x = noises(24 * 40);
  std::vector<float> expected(24 * 160);
  stress_linear(&product.linear, x.data(), 40, expected.data(), 160, 24);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int i = 0; i < rounds; ++i) {
        std::vector<float> out(24 * 160, NAN);
        stress_linear(&product.linear, x.data(), 40, out.data(), 160, 24);
        check(out, expected, "a product beside others");
      }
    });
  for (auto& caller : callers) caller.join();
  // draws and rows outside of passes
  const auto logits = noises(16 * 3000, 20);
  std::vector<Draw> draws(16, {0.8f, 0.9f, 0.f, 0.4f, 50});
  std::vector<int64_t> first(16), again(16);
  stress_draw(logits.data(), 3000, draws.data(), first.data(), 16, 3000);
  for (int i = 0; i < rounds; ++i) {
    stress_draw(logits.data(), 3000, draws.data(), again.data(), 16, 3000);
    if (first != again) ++wrong, std::printf("wrong: draws\n");
  }
  std::printf("%d wrong\n", wrong);
  std::fflush(stdout);
  return wrong ? 1 : 0;
}
