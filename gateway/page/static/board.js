// The dashboard: the feed once a second; rates and percentiles are differences over the last minute.

import { get } from "./api.js";
import { element } from "./render.js";

const $ = (id) => document.getElementById(id);
const KEPT = 61; // samples, a second apart

let samples = [];
let timer = null;

export function show(visible) {
  clearInterval(timer);
  timer = null;
  if (!visible) return;
  look();
  timer = setInterval(look, 1000);
}

async function look() {
  try {
    const sample = await get("/ui/feed");
    if (samples.at(-1)?.admin !== sample.admin) samples = []; // another key: what it may see is another series
    samples = [...samples, sample].slice(-KEPT);
    $("board-state").textContent = sample.admin ? "" : `What waits of tenant ${sample.tenant}. An admin key shows all.`;
    $("board-state").classList.remove("error");
    draw(sample);
  } catch (error) {
    $("board-state").textContent = error.message;
    $("board-state").classList.add("error");
  }
}

// ------------------------------------------------------------------ figures

const round = (value, digits = 0) =>
  value === null || Number.isNaN(value) ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });

/** What a count grew by per second between each two samples. */
function rates(of) {
  return samples.slice(1).map((now, at) => {
    const before = samples[at];
    return Math.max(0, (of(now) - of(before)) / (now.at - before.at));
  });
}

/** A percentile of what a histogram gained in the last minute: the bound of the bucket that it lies in, milliseconds. */
function percentile(name, share) {
  const now = samples.at(-1).gateway.latency[name];
  const before = samples[0].gateway.latency[name];
  const gained = now.counts.map((count, at) => count - before.counts[at]);
  const all = gained.reduce((sum, count) => sum + count, 0);
  if (samples.length < 2 || all <= 0) return null;
  let sum = 0;
  for (let at = 0; at < gained.length; at++) {
    const low = at ? now.bounds[at - 1] : 0;
    const high = now.bounds[at] ?? low;
    if (sum + gained[at] >= share * all) return 1000 * (low + ((high - low) * (share * all - sum)) / gained[at]);
    sum += gained[at];
  }
  return null;
}

// ------------------------------------------------------------------ what is seen

function tile(name, value, series) {
  const made = element("div", { class: "tile" }, element("b", {}, value), element("span", {}, name));
  if (series?.length > 1) {
    const most = Math.max(...series, 1e-9);
    const points = series.map((y, x) => `${(x * 100) / (series.length - 1)},${30 - (28 * y) / most}`).join(" ");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 32");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    line.setAttribute("points", points);
    svg.append(line);
    made.append(svg);
  }
  return made;
}

function draw(sample) {
  const tiles = [];
  if (sample.admin) {
    const tokens = samples.map((one) => one.models.reduce((sum, model) => sum + (model.rate ?? 0), 0));
    const asked = (one) => Object.values(one.gateway.requests).reduce((sum, count) => sum + count, 0);
    const requests = rates(asked);
    const failed = rates((one) => one.gateway.requests["5xx"] ?? 0);
    const mean = (series) => (series.length ? series.reduce((a, b) => a + b, 0) / series.length : null);
    tiles.push(
      tile("tokens/s, all models", round(tokens.at(-1)), tokens),
      tile("requests/s, last minute", round(mean(requests), 2), requests),
      tile("server errors/s, last minute", round(mean(failed), 2), failed),
      tile("requests being answered", round(sample.gateway.active), samples.map((one) => one.gateway.active)),
      tile("first token ms, p50 / p99", `${round(percentile("ttft", 0.5))} / ${round(percentile("ttft", 0.99))}`),
      tile(
        "between tokens ms, p50 / p99",
        `${round(percentile("inter_token", 0.5), 1)} / ${round(percentile("inter_token", 0.99), 1)}`,
      ),
    );
  }
  $("tiles").replaceChildren(...tiles);
  $("models").replaceChildren(...sample.models.map((model) => modelBox(model, sample)));
}

function modelBox(model, sample) {
  const told = model.sleeps ? "asleep: loaded when it is asked" : model.ready ? "ready" : "not ready";
  const state = element("span", { class: model.ready ? "good" : "bad" }, model.waits || told);
  const box = element("section", { class: "model" }, element("h2", {}, `${model.name} · `, state));
  if (!model.reachable) {
    box.append(element("p", { class: "error" }, model.why));
    return box;
  }
  if (!sample.admin) {
    box.append(table(["waiting requests", "waiting tokens"], [[round(model.own.requests), round(model.own.tokens)]]));
    return box;
  }
  const { leader, lost } = model;
  const tenants = Object.entries(model.tenants).sort(([, a], [, b]) => b.tokens - a.tokens);
  box.append(
    element(
      "p", {},
      `Running sequences: ${round(model.running)}. Waiting requests: ${round(model.waiting)} ` +
        `(${round(model.waiting_tokens)} tokens). ${round(model.rate)} tokens/s.`,
    ),
    element(
      "p", {},
      `Leader ${leader.name || "–"}${leader.alive ? "" : " (silent)"}, term ${leader.term}, since ${moment(leader.since)}` +
        `${leader.taken_over ? ", when the one before had gone silent" : ""}. Workers lost since then: ${round(lost.workers)}` +
        `${lost.workers ? `, the last ${moment(lost.last)}` : ""}.`,
    ),
    element(
      "div", { class: "columns" },
      table(["worker", "state", "generation", "KV cache"], model.workers.map(workerRow)),
      table(
        ["tenant", "waiting requests", "tokens"],
        tenants.map(([name, waits]) => [name, round(waits.requests), round(waits.tokens)]),
      ),
    ),
  );
  return box;
}

const moment = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString() : "–");

function workerRow(worker) {
  const used = worker.kv_blocks ? worker.kv_used / worker.kv_blocks : null;
  const bar = element("progress", { max: "1", value: String(used ?? 0), "aria-label": `KV cache of ${worker.name}` });
  return [worker.name, worker.state, String(worker.generation), used === null ? "–" : bar];
}

function table(heads, rows) {
  const made = element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", {}, head)))));
  const body = element("tbody");
  for (const row of rows) body.append(element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
  if (!rows.length) body.append(element("tr", {}, element("td", { colspan: String(heads.length) }, "none")));
  made.append(body);
  return made;
}
