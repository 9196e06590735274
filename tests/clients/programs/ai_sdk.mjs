// AI SDK with its OpenAI provider (the Responses API by default, and chat completions) and the compatible one.
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
import { CHAT, MODEL, RECORD_QUESTION, TOOL_QUESTION, TOOL_RESULT, check } from "./scenario.mjs";

const baseURL = process.env.OPENAI_BASE_URL;
const apiKey = process.env.OPENAI_API_KEY;
const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "service", baseURL, apiKey, supportsStructuredOutputs: true });
const tools = {
  get_weather: tool({
    description: "Get the weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async () => TOOL_RESULT,
  }),
};

for (const [name, model] of Object.entries({
  responses: openai(MODEL),
  chat: openai.chat(MODEL),
  compatible: compatible(MODEL),
})) {
  check(`${name}: chat`, "Paris", (await generateText({ model, prompt: CHAT, temperature: 0 })).text);
  check(`${name}: stream`, "Paris", await streamText({ model, prompt: CHAT, temperature: 0 }).text);
  const run = await generateText({ model, prompt: TOOL_QUESTION, tools, stopWhen: stepCountIs(3), temperature: 0 });
  check(`${name}: answer from the tool`, TOOL_RESULT, run.text);
  const streamed = streamText({ model, prompt: TOOL_QUESTION, tools, stopWhen: stepCountIs(3), temperature: 0 });
  check(`${name}: streamed answer from the tool`, TOOL_RESULT, await streamed.text);
  const { output } = await generateText({
    model,
    prompt: RECORD_QUESTION,
    temperature: 0,
    output: Output.object({ schema: z.object({ name: z.string(), age: z.int() }) }),
  });
  check(`${name}: structured answer`, '{"name":"Tovin","age":7}', JSON.stringify(output));
}
