// OpenAI's npm client: chat completions and the Responses API.
import OpenAI from "openai";
import { MODEL, CHAT, TOOL, TOOL_QUESTION, TOOL_RESULT, RECORD_QUESTION, RECORD_SCHEMA, check, user } from "./scenario.mjs";

const client = new OpenAI();
const base = { model: MODEL, temperature: 0 };
const answer = await client.chat.completions.create({ ...base, messages: user(CHAT) });
check("chat", "Paris", answer.choices[0].message.content);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...base, messages: user(CHAT), stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
check("stream", "Paris", text);

const messages = user(TOOL_QUESTION);
const message = (await client.chat.completions.create({ ...base, messages, tools: [TOOL] })).choices[0].message;
check("tool call", "London", message.tool_calls[0].function.arguments);
messages.push(message, { role: "tool", tool_call_id: message.tool_calls[0].id, content: TOOL_RESULT });
const told = await client.chat.completions.create({ ...base, messages, tools: [TOOL] });
check("answer from the tool", TOOL_RESULT, told.choices[0].message.content);

const run = client.chat.completions.runTools({
  ...base,
  messages: user(TOOL_QUESTION),
  tools: [{ type: "function", function: { ...TOOL.function, parse: JSON.parse, function: () => TOOL_RESULT } }],
});
check("runTools", TOOL_RESULT, await run.finalContent());

const record = await client.chat.completions.create({
  ...base,
  messages: user(RECORD_QUESTION),
  response_format: { type: "json_schema", json_schema: { name: "record", schema: RECORD_SCHEMA, strict: true } },
});
check("structured answer", '{"name":"Tovin","age":7}', JSON.stringify(JSON.parse(record.choices[0].message.content)));

const first = await client.responses.create({ ...base, input: "My name is Tovin." });
const second = await client.responses.create({ ...base, input: "What is my name?", previous_response_id: first.id });
check("responses", "Tovin", second.output_text);
