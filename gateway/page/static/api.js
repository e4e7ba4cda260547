// Calls of this service. A stream is read to its end whatever happens to a gateway or to this page: events carry ids,
// and after a break the rest is asked for, from any gateway, at GET /v1/streams/ID.

const RESUME_S = 600;

let key = sessionStorage.getItem("key") ?? ""; // this tab's only

export function setKey(given) {
  key = given.trim();
  sessionStorage.setItem("key", key);
}

export const getKey = () => key;

function headers(more = {}) {
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

export class Refused extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `the service answered ${status}`);
    this.status = status;
  }
}

async function checked(answer) {
  if (answer.ok) return answer;
  let body = null;
  try {
    body = await answer.json();
  } catch {
    // no JSON: a proxy in between, say
  }
  throw new Refused(answer.status, body);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function cancel(id) {
  await fetch(`/v1/requests/${encodeURIComponent(id)}`, { method: "DELETE", headers: headers() });
}

/** Start a request. Returns its stream for `follow`. */
export async function begin(body) {
  const answer = await checked(
    await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json", "X-Headrace-Resume": String(RESUME_S) }),
      body: JSON.stringify({ ...body, stream: true }),
    }),
  );
  return { id: answer.headers.get("X-Request-Id"), answer };
}

/** Every event of a request. `started` is what `begin` gave, or {id}: from the request's first token on.
    `waiting(true)` tells that the connection broke and is tried again. */
export async function* follow(started, waiting) {
  let { answer } = started;
  let last = "";
  let begun = false; // events of ours have ids
  let pause = 250;
  for (;;) {
    try {
      answer ??= await resume(started.id, last);
      waiting(false);
      if (answer.status === 204) return;
      for await (const event of events(answer)) {
        pause = 250;
        begun = true;
        if (event.id) last = event.id;
        if (event.data === "[DONE]") return;
        yield JSON.parse(event.data);
      }
    } catch (error) {
      if (error instanceof Refused && error.status < 500 && error.status !== 429) throw error;
      if (error instanceof SyntaxError) throw error;
    }
    answer = null;
    if (begun && !last) throw new Error("The connection broke. This model is an upstream: its answers cannot be resumed.");
    waiting(true);
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(4000, pause * 2);
  }
}

async function resume(id, last) {
  const more = last ? { "Last-Event-ID": last } : {};
  return checked(await fetch(`/v1/streams/${encodeURIComponent(id)}`, { headers: headers(more) }));
}

/** The events of one answer (the HTML Standard, "Server-sent events"); ends where the connection does. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { id: "", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("data: ")) event.data += line.slice(6);
        else if (line.startsWith("id: ")) event.id = line.slice(4);
      }
      if (event.data) yield event;
    }
  }
}
