// What users of openai for Node call, in cases: `node openai_node.cjs CASE URL`, with NODE_PATH naming the
// folder that has the packages openai and zod. test_clients_node.py runs them.
"use strict";
const assert = require("node:assert/strict");
const OpenAI = require("openai");
const {zodFunction, zodResponseFormat} = require("openai/helpers/zod");
const {z} = require("zod");

const WEATHER = {
  name: "get_weather", description: "Get the weather for a location.",
  parameters: {type: "object", properties: {location: {type: "string"}}, required: ["location"]},
};
const TOOLS = [{type: "function", function: WEATHER}];
const City = z.object({name: z.string().max(20), big: z.boolean()});
const question = (text, fields) =>
  ({model: "demo", temperature: 0, max_tokens: 80, messages: [{role: "user", content: text}], ...fields});
const cases = {};

cases.an_answer_comes_with_its_usage_and_request_id = async client => {
  const {data, response} = await client.chat.completions.create(question("What is Rust?")).withResponse();
  assert.equal(data.choices[0].finish_reason, "stop");
  assert.match(data.choices[0].message.content, /^Rust is/);
  assert.ok(data.usage.completion_tokens > 0);
  assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + data.usage.completion_tokens);
  assert.equal(data._request_id, response.headers.get("x-request-id"));
};

cases.a_stream_says_the_same_with_the_same_usage = async client => {
  const whole = await client.chat.completions.create(question("What is Rust?"));
  const fields = {stream: true, stream_options: {include_usage: true}};
  const chunks = [];
  for await (const chunk of await client.chat.completions.create(question("What is Rust?", fields))) chunks.push(chunk);
  const last = chunks.pop();
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
  const text = chunks.map(chunk => chunk.choices[0].delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.ok(chunks.every(chunk => chunk.usage === null));
};

cases.the_stream_helper_accumulates_the_answer = async client => {
  const whole = await client.chat.completions.create(question("What is Rust?", {logprobs: true, top_logprobs: 2}));
  const fields = {logprobs: true, top_logprobs: 2, stream_options: {include_usage: true}};
  const stream = client.chat.completions.stream(question("What is Rust?", fields));
  let text = "";
  stream.on("content", delta => { text += delta; });
  const final = await stream.finalChatCompletion();
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(final.choices[0].message.content, text);
  assert.deepEqual(final.choices[0].logprobs, whole.choices[0].logprobs);
  assert.equal((await stream.totalUsage()).total_tokens, whole.usage.total_tokens);
};

cases.many_are_asked_at_once = async client => {
  const questions = [1, 2, 3, 4, 5, 6, 7, 8].map(number => question(`What is ${number} + 4?`));
  const ask = async body => (await client.chat.completions.create(body)).choices[0].message.content;
  const together = await Promise.all(questions.map(ask));
  for (const [index, body] of questions.entries()) assert.equal(await ask(body), together[index]);
};

async function run_with_tools(client, tool, fields) {
  const body = question("What is the weather in Paris?", {tools: [tool], ...fields});
  const runner = client.chat.completions.runTools(body);
  assert.match(await runner.finalContent(), /21/);
  assert.deepEqual(runner.messages.map(message => message.role), ["user", "assistant", "tool", "assistant"]);
}

function look_up(seen) {
  return given => {
    seen.push(given);
    return '{"temperature": 21, "condition": "sunny"}';
  };
}

cases.run_tools_calls_a_function_and_goes_on = async client => {
  for (const stream of [false, true]) {
    const seen = [];
    await run_with_tools(client, {type: "function", function: {...WEATHER, parse: JSON.parse, function: look_up(seen)}},
                         {stream});
    assert.deepEqual(seen, [{location: "Paris"}]);
  }
};

cases.run_tools_takes_a_zod_function = async client => {
  const seen = [];
  await run_with_tools(client, zodFunction({...WEATHER, parameters: z.object({location: z.string()}),
                                            function: look_up(seen)}));
  assert.deepEqual(seen, [{location: "Paris"}]);
};

cases.a_call_is_made_where_one_is_wanted = async client => {
  for (const tool_choice of ["required", {type: "function", function: {name: "get_weather"}}]) {
    const answer = await client.chat.completions.create(question("What is Rust?", {tools: TOOLS, tool_choice}));
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "get_weather");
    assert.equal(typeof JSON.parse(call.function.arguments).location, "string");
  }
};

cases.parse_reads_calls_by_their_schema = async client => {
  const add = zodFunction({name: "add", parameters: z.object({a: z.number().int(), b: z.number().int()})});
  const body = question("What is 3 + 4?", {tools: [add], tool_choice: "required"});
  const answer = await client.chat.completions.parse(body);
  const sum = answer.choices[0].message.tool_calls[0].function.parsed_arguments;
  assert.ok(Number.isInteger(sum.a) && Number.isInteger(sum.b));
};

cases.parse_and_stream_read_an_answer_by_its_schema = async client => {
  const body = question("What is the capital of France?", {response_format: zodResponseFormat(City, "city")});
  const parsed = (await client.chat.completions.parse(body)).choices[0].message.parsed;
  City.parse(parsed);
  const final = await client.chat.completions.stream(body).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.parsed, parsed);
};

cases.a_plain_schema_and_json_mode_hold = async client => {
  const schema = {type: "object", properties: {n: {type: "integer", minimum: 0, maximum: 9}}, required: ["n"],
                  additionalProperties: false};
  const ask = async response_format => JSON.parse(
    (await client.chat.completions.create(question("Hello", {response_format}))).choices[0].message.content);
  const {n} = await ask({type: "json_schema", json_schema: {name: "digit", strict: true, schema}});
  assert.ok(Number.isInteger(n) && 0 <= n && n <= 9);
  assert.equal(typeof await ask({type: "json_object"}), "object");
};

cases.errors_are_the_classes_that_programs_catch = async client => {
  const cases = [
    [{temperature: 5}, OpenAI.BadRequestError, 400, "invalid_value", "temperature"],
    [{max_tokens: 5000}, OpenAI.BadRequestError, 400, "context_length_exceeded", "messages"],
    [{messages: [{role: "user", content: "word ".repeat(5000)}]}, OpenAI.BadRequestError, 400,
     "context_length_exceeded", "messages"],
    [{model: "gpt-4"}, OpenAI.NotFoundError, 404, "model_not_found", "model"],
    [{store: true}, OpenAI.BadRequestError, 400, "unsupported_parameter", "store"]];
  for (const [fields, kind, status, code, param] of cases)
    for (const stream of [false, true])
      await assert.rejects(client.chat.completions.create(question("Hello", {...fields, stream})), error => {
        assert.ok(error instanceof kind && error.requestID);
        assert.deepEqual([error.status, error.code, error.param], [status, code, param]);
        return true;
      });
};

cases.what_is_not_served_is_a_clean_error = async client => {
  const missing = {name: "Error", constructor: OpenAI.NotFoundError, status: 404, code: "not_found"};
  await assert.rejects(client.embeddings.create({model: "demo", input: "Hello"}), missing);
};

cases.responses_whole_and_streamed = async client => {
  const body = {model: "demo", input: "What is Rust?", temperature: 0};
  const whole = await client.responses.create(body);
  assert.match(whole.output_text, /^Rust is/);
  const stream = client.responses.stream(body);
  let text = "";
  stream.on("response.output_text.delta", event => { text += event.delta; });
  const final = await stream.finalResponse();
  assert.equal(text, whole.output_text);
  assert.equal(final.output_text, whole.output_text);
};

cases.completions_whole_and_streamed = async client => {
  const body = {model: "demo", prompt: "Rust is", max_tokens: 8, temperature: 0};
  const whole = await client.completions.create(body);
  assert.equal(whole.usage.completion_tokens, 8);
  let text = "";
  for await (const chunk of await client.completions.create({...body, stream: true})) text += chunk.choices[0].text;
  assert.ok(text);
  assert.equal(text, whole.choices[0].text);
};

cases.the_served_model_is_listed = async client => {
  const models = [];
  for await (const model of client.models.list()) models.push(model);
  assert.deepEqual(models.map(model => model.id), ["demo"]);
  assert.deepEqual({...await client.models.retrieve("demo")}, {...models[0]});
  await assert.rejects(client.models.retrieve("gpt-4"), OpenAI.NotFoundError);
};

// -- on a server so slow that no long answer ends by itself

const LONG = {max_tokens: 3000, ignore_eos: true};

async function wait_for_running(client, wanted) {
  for (let tries = 0; tries < 200; tries++) {
    const metrics = await (await fetch(new URL("/v1/metrics", client.baseURL))).json();
    if (metrics.engine.num_requests_running === wanted) return;
    await new Promise(resolve => setTimeout(resolve, 50));
  }
  assert.fail(`waited in vain for ${wanted} running requests`);
}

cases.slow_an_aborted_stream_ends_on_the_server = async client => {
  const stream = await client.chat.completions.create(question("Hello", {...LONG, stream: true}));
  for await (const chunk of stream) {
    assert.ok(chunk.choices);
    await wait_for_running(client, 1);
    stream.controller.abort();
  }
  await wait_for_running(client, 0);
};

cases.slow_an_aborted_request_ends_on_the_server = async client => {
  const controller = new AbortController();
  const answer = client.chat.completions.create(question("Hello", LONG), {signal: controller.signal});
  const rejected = assert.rejects(answer, OpenAI.APIUserAbortError);
  await wait_for_running(client, 1);
  controller.abort();
  await rejected;
  await wait_for_running(client, 0);
};

cases.slow_a_stream_left_by_break_ends_on_the_server = async client => {
  for await (const chunk of await client.chat.completions.create(question("Hello", {...LONG, stream: true}))) {
    assert.ok(chunk.choices);
    await wait_for_running(client, 1);
    break;
  }
  await wait_for_running(client, 0);
};

const [name, url] = process.argv.slice(2);
const client = new OpenAI({baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0, timeout: 60000});
cases[name](client).then(() => process.exit(0), error => {
  console.error(error);
  process.exit(1);
});
