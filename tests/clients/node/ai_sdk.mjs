// Vercel's AI SDK, by its provider for OpenAI-like servers and by OpenAI's own (chat).
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { add, BASE, calls, CITY, FRANCE, isCity, MODEL, run, SUM, TOKENS } from "./checks.mjs";

const like = createOpenAICompatible({
  name: "headrace", baseURL: BASE, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const models = [like(MODEL), createOpenAI({ baseURL: BASE, apiKey: "none" }).chat(MODEL)];
const City = z.object({
  city: z.enum(["Paris", "Rome", "Berlin"]),
  population: z.number().int().min(1).max(99_999_999),
});
const Sum = z.object({ a: z.number().int().min(0).max(99), b: z.number().int().min(0).max(99) });
const settings = { temperature: 0, maxOutputTokens: TOKENS, maxRetries: 0 };

await run({
  async chat() {
    for (const model of models) {
      const { text, usage } = await generateText({ model, prompt: FRANCE, ...settings });
      assert.match(text, /Paris/);
      assert(usage.outputTokens > 0);
    }
  },
  async stream() {
    for (const model of models) {
      const answer = streamText({ model, prompt: FRANCE, ...settings });
      let text = "";
      for await (const piece of answer.textStream) text += piece;
      assert.match(text, /Paris/);
      assert((await answer.usage).outputTokens > 0);
    }
  },
  async tools() {
    const tools = { add: tool({ description: "The sum of two integers.", inputSchema: Sum, execute: add }) };
    for (const model of models) {
      const before = calls.length;
      const answer = await generateText({
        model, prompt: SUM, tools, stopWhen: stepCountIs(2), ...settings,
        prepareStep: ({ stepNumber }) => ({
          toolChoice: stepNumber === 0 ? { type: "tool", toolName: "add" } : "none",
        }),
      });
      assert.equal(calls.length, before + 1);
      assert.equal(answer.steps[0].toolResults[0].output, calls.at(-1)[0] + calls.at(-1)[1]);
      assert.equal(answer.steps.length, 2);
      assert(answer.text);
      const streamed = streamText({ model, prompt: SUM, tools, toolChoice: "required", ...settings });
      assert((await streamed.toolCalls).length > 0);
    }
  },
  async structured() {
    for (const model of models) {
      isCity((await generateObject({ model, schema: City, prompt: CITY, ...settings })).object);
      const streamed = streamObject({ model, schema: City, prompt: CITY, ...settings });
      let parts = 0;
      for await (const _ of streamed.partialObjectStream) parts += 1;
      assert(parts > 1);
      isCity(await streamed.object);
      isCity((await generateText({ model, prompt: CITY, output: Output.object({ schema: City }), ...settings })).output);
    }
  },
});
