// What the Node programs share (programs/checks.py says how they report).
import assert from "node:assert/strict";

export const [BASE, MODEL] = process.argv.slice(2);
export const FRANCE = "What is the capital of France?";
export const SUM = "What is 2 + 3? Use the tool.";
export const CITY = "Tell me about Paris as JSON with the keys city and population.";
export const TOKENS = 200;
export const calls = [];

export function add({ a, b }) {
  assert(Number.isInteger(a) && Number.isInteger(b));
  calls.push([a, b]);
  return a + b;
}

export function isCity(value) {
  assert(["Paris", "Rome", "Berlin"].includes(value.city), JSON.stringify(value));
  assert(Number.isInteger(value.population) && value.population >= 1 && value.population <= 99_999_999);
}

export async function run(checks) {
  for (const [check, body] of Object.entries(checks)) {
    let error = null;
    try {
      await body();
    } catch (thrown) {
      error = String(thrown.stack ?? thrown).slice(0, 2000);
    }
    console.log(JSON.stringify({ check, error }).replace('{"check":', '{"check": '));
  }
}
