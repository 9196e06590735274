// What the programs in JavaScript ask of the service; the same as scenario.py.
export const MODEL = "tiny-chat";
export const CHAT = "What is the capital of France?";
export const TOOL_QUESTION = "What is the weather in London?";
export const TOOL_RESULT = "foggy";
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
export const TOOL = {
  type: "function",
  function: { name: "get_weather", description: "Get the weather in a city.", parameters: PARAMETERS },
};
export const RECORD_QUESTION = "My name is Tovin and I am 7 years old. Answer as JSON with name and age.";
export const RECORD_SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};

export const user = (content) => [{ role: "user", content }];

export function check(what, expected, found) {
  const right = String(found).includes(expected);
  console.log(right ? "ok  " : "FAIL", what, "|", String(found).slice(0, 200));
  if (!right) process.exit(1);
}
