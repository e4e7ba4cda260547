// The playground. The conversation and the id of the running answer live in this tab's storage: a reload goes on.

import { begin, cancel, follow, get } from "./api.js";
import { call, content, element, tokens } from "./render.js";

const $ = (id) => document.getElementById(id);
const FIELDS = [
  "model", "system", "temperature", "top_p", "max_tokens", "seed", "stops", "alternatives", "schema", "tools",
  "tool_required",
];

let messages = []; // as the API takes them; an answer has `shown` too: its tokens, thought, how it ended
let running = null; // {id} of the answer being read

export async function start() {
  const kept = JSON.parse(sessionStorage.getItem("chat") ?? "{}");
  messages = kept.messages ?? [];
  for (const name of FIELDS) if (kept.settings?.[name] !== undefined) put($(name), kept.settings[name]);
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => running?.id && cancel(running.id));
  $("clear").addEventListener("click", () => {
    if (running?.id) cancel(running.id);
    messages = [];
    keep();
    draw();
  });
  document.querySelector("aside").addEventListener("input", () => {
    keep();
    showCode();
  });
  $("text").addEventListener("input", showCode);
  draw();
  await listModels(kept.settings?.model);
  showCode();
  if (kept.running) {
    running = kept.running;
    await read(running);
  }
}

export async function listModels(chosen = $("model").value) {
  try {
    const { data } = await get("/v1/models");
    $("model").replaceChildren(...data.map((model) => element("option", { value: model.id }, model.id)));
    if (data.some((model) => model.id === chosen)) $("model").value = chosen;
    say(data.length ? "" : "No model is served yet.");
  } catch (error) {
    say(error.message, true);
  }
}

const value = (field) => (field.type === "checkbox" ? field.checked : field.value);

function put(field, given) {
  if (field.type === "checkbox") field.checked = given;
  else field.value = given;
}

function keep() {
  const settings = Object.fromEntries(FIELDS.map((name) => [name, value($(name))]));
  sessionStorage.setItem("chat", JSON.stringify({ messages, settings, running: running && { id: running.id } }));
}

function say(text, wrong = false) {
  $("state").textContent = text;
  $("state").classList.toggle("error", wrong);
}

// ------------------------------------------------------------------ a request

/** The body of the request, from the settings. Throws where a field holds no JSON. */
function body(conversation) {
  const system = $("system").value.trim();
  const made = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation.map(plain)],
  };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") made[name] = Number($(name).value);
  }
  const stops = $("stops").value.split("\n").filter((line) => line);
  if (stops.length) made.stop = stops;
  if ($("alternatives").checked) Object.assign(made, { logprobs: true, top_logprobs: 5 });
  const schema = json("schema", "the JSON schema");
  if (schema && Object.keys(schema).length) {
    made.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  } else if (schema) made.response_format = { type: "json_object" };
  const tools = json("tools", "the tools");
  if (tools) Object.assign(made, { tools, tool_choice: $("tool_required").checked ? "required" : "auto" });
  return made;
}

function json(id, what) {
  const text = $(id).value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what}: ${error.message}`);
  }
}

function plain({ shown, ...message }) {
  return message;
}

async function ask() {
  const text = $("text").value.trim();
  if (!text || running) return;
  let asked;
  try {
    asked = body([...messages, { role: "user", content: text }]);
  } catch (error) {
    say(error.message, true);
    return;
  }
  busy(true);
  say("Waiting for the first token …");
  try {
    const started = await begin(asked);
    messages.push({ role: "user", content: text });
    $("text").value = "";
    running = started;
    keep();
    draw();
    await read(started);
  } catch (error) {
    say(error.message, true);
    busy(false);
  }
}

/** Read the running answer to its end, into the last message. */
async function read(started) {
  busy(true);
  const answer = { role: "assistant", content: "", shown: { tokens: [], thought: "", end: null } };
  messages.push(answer);
  let due = false;
  try {
    for await (const event of follow(started, (broken) => broken && say("The connection broke: going on elsewhere …"))) {
      if (event.error) throw new Error(event.error.message);
      add(answer, event);
      if (!due) {
        due = true;
        requestAnimationFrame(() => {
          due = false;
          draw();
        });
      }
    }
    const end = answer.shown.end;
    say({ length: "Ended at the limit of tokens.", abort: "Stopped." }[end] ?? "");
  } catch (error) {
    say(error.message, true);
    if (!answer.content && !answer.tool_calls) messages.pop();
  }
  running = null;
  busy(false);
  keep();
  draw();
}

/** One event of a stream into the answer that it belongs to. */
function add(answer, event) {
  const choice = event.choices?.[0];
  if (!choice) return;
  const { delta = {} } = choice;
  answer.content += delta.content ?? "";
  answer.shown.thought += delta.reasoning_content ?? delta.reasoning ?? "";
  answer.shown.tokens.push(...(choice.logprobs?.content ?? []));
  for (const piece of delta.tool_calls ?? []) {
    answer.tool_calls ??= [];
    const one = (answer.tool_calls[piece.index] ??= { type: "function", function: { name: "", arguments: "" } });
    if (piece.id) one.id = piece.id;
    one.function.name += piece.function?.name ?? "";
    one.function.arguments += piece.function?.arguments ?? "";
  }
  if (choice.finish_reason) answer.shown.end = choice.finish_reason;
  say("");
}

function busy(now) {
  $("send").disabled = now;
  $("stop").hidden = !now;
}

// ------------------------------------------------------------------ what is seen

function draw() {
  const last = messages.length - 1;
  $("messages").replaceChildren(
    ...messages.map((message, at) => {
      const item = element("li", { class: message.role }, element("span", { class: "who" }, message.role));
      if (message.role !== "assistant") item.append(message.content);
      else item.append(...answered(message, !(running && at === last)));
      return item;
    }),
  );
}

function answered(message, ended) {
  const parts = [];
  const { thought, tokens: seen } = message.shown ?? { thought: "", tokens: [] };
  if (thought) {
    const box = element("details", {}, element("summary", {}, "Thought"), element("div", { class: "thought" }, thought));
    box.open = !ended;
    parts.push(box);
  }
  if (seen.length && !message.tool_calls) parts.push(tokens(seen));
  else if (message.content) parts.push(content(message.content, ended));
  parts.push(...(message.tool_calls ?? []).map(call));
  return parts;
}

function showCode() {
  let made;
  try {
    made = body([...messages, { role: "user", content: $("text").value || "Hello" }]);
  } catch (error) {
    $("as-curl").textContent = $("as-python").textContent = error.message;
    return;
  }
  const text = JSON.stringify(made, null, 2);
  const quoted = text.replaceAll("'", "'\\''");
  $("as-curl").textContent =
    `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n` +
    `  -H "Authorization: Bearer $API_KEY" \\\n  -d '${quoted}'`;
  $("as-python").textContent =
    `import json, os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", ` +
    `api_key=os.environ.get("API_KEY", "none"))\nrequest = json.loads(r'''\n${text.replaceAll(/'(?='')/g, "\\u0027")}\n''')\n` +
    `for event in client.chat.completions.create(**request, stream=True):\n` +
    `    print(event.choices[0].delta.content or "", end="", flush=True)`;
}
