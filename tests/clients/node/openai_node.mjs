// openai, the Node client.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { add, BASE, calls, CITY, FRANCE, isCity, MODEL, run, SUM, TOKENS } from "./checks.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: "none", maxRetries: 0 });
const City = z.object({
  city: z.enum(["Paris", "Rome", "Berlin"]),
  population: z.number().int().min(1).max(99_999_999),
});
const Sum = z.object({ a: z.number().int().min(0).max(99), b: z.number().int().min(0).max(99) });
const asked = (content, more) => ({
  model: MODEL, messages: [{ role: "user", content }], temperature: 0, max_tokens: TOKENS, ...more,
});

await run({
  async chat() {
    const answer = await client.chat.completions.create(asked(FRANCE));
    assert.match(answer.choices[0].message.content, /Paris/);
    assert(answer._request_id);
    const listed = await client.models.list();
    assert.deepEqual(listed.data.map((model) => model.id), [MODEL]);
    await assert.rejects(client.chat.completions.create(asked(FRANCE, { top_logprobs: 3 })), (error) => {
      assert(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "top_logprobs");
      assert(error.requestID);
      return true;
    });
  },
  async stream() {
    const whole = await client.chat.completions.create(asked(FRANCE));
    let text = "";
    let usage = null;
    const more = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create(asked(FRANCE, more))) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert(usage.completion_tokens > 0);
  },
  async tools() {
    const tool = { name: "add", description: "The sum of two integers.", parameters: Sum, function: add };
    const named = { type: "function", function: { name: "add" } };
    const first = await client.chat.completions.create(asked(SUM, { tools: [zodFunction(tool)], tool_choice: named }));
    const { message } = first.choices[0];
    assert.equal(first.choices[0].finish_reason, "tool_calls");
    const result = add(JSON.parse(message.tool_calls[0].function.arguments));
    const last = await client.chat.completions.create({
      ...asked(SUM), tools: [zodFunction(tool)], tool_choice: "none",
      messages: [
        { role: "user", content: SUM }, message,
        { role: "tool", tool_call_id: message.tool_calls[0].id, content: String(result) },
      ],
    });
    assert(last.choices[0].message.content);
    // the client's own loop: it calls the function and asks again, with a free choice after a named one
    const runner = client.chat.completions.runTools(asked(SUM, { tools: [zodFunction(tool)], tool_choice: named }));
    await runner.done();
    assert(calls.length >= 2);
    const streamed = client.chat.completions.stream(asked(SUM, { tools: [zodFunction(tool)], tool_choice: named }));
    const completion = await streamed.finalChatCompletion();
    assert.equal(completion.choices[0].message.tool_calls[0].function.arguments,
      message.tool_calls[0].function.arguments);
  },
  async structured() {
    const response_format = zodResponseFormat(City, "City");
    const answer = await client.chat.completions.parse(asked(CITY, { response_format }));
    isCity(answer.choices[0].message.parsed);
  },
});
