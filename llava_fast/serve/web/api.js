// The server: OpenAI's API at addresses relative to the page, so that the app works under any prefix.

/** What the server or the network said no with, in words. */
class Refusal extends Error {
  /** @param {string} what the headline  @param {string} detail the server's own words, if any */
  constructor(what, detail = "") {
    super(what);
    this.detail = detail;
  }
}

/** The answer broke off: what came until then has been given out. */
class Broken extends Refusal {}

/**
 * Fetch with the key; where the server asks for one, so is the user, and the request is made again.
 * @param {(wrong: boolean) => Promise<boolean>} askForKey whether the user gave a key
 * @returns {Promise<{response: Response, sent: number}>} sent: when the request that was answered went out, in ms
 */
async function request(path, options, askForKey) {
  for (;;) {
    const key = sessionKey();
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const sent = performance.now();
    let response;
    try {
      response = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The server cannot be reached. It may have stopped, or the connection is down.");
    }
    if (response.ok) return { response, sent };
    if (response.status !== 401 || !(await askForKey(Boolean(key)))) throw await refusalOf(response);
  }
}

/** The models that the server has: [{id, max_model_len?}] */
async function listModels(askForKey) {
  const { response } = await request("v1/models", { method: "GET" }, askForKey);
  return (await response.json()).data;
}

/**
 * Ask, and yield what comes: {sent} once, {text} often, then {end: finish_reason} and {usage}.
 * @throws {Refusal} before the first word, {Broken} after it, AbortError when the signal fired.
 */
async function* ask(body, signal, askForKey) {
  const { response, sent } = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  }, askForKey);
  yield { sent };
  let ended = false;
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Broken("The server stopped in the middle of the answer.", event.error.message);
    const choice = event.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      ended = true;
      yield { end: choice.finish_reason };
    }
    if (event.usage) yield { usage: event.usage };
  }
  if (!ended) throw new Broken("The connection broke off in the middle of the answer.");
}

/** The data of server-sent events. Lines end with LF or CRLF; comments (heartbeats) and other fields are skipped. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Broken("The connection broke off in the middle of the answer.");
    }
    if (read.done) return;
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice("data:".length).trim();
    }
  }
}

/** Words for a status that is not a success. The server's message names the cause and stands below as the detail. */
async function refusalOf(response) {
  const error = (await response.json().catch(() => ({}))).error ?? {};
  const detail = typeof error.message === "string" ? error.message : "";
  return new Refusal(headline(response, error, detail), response.status === 503 ? "" : detail);
}

function headline(response, { code }, detail) {
  const wait = Number(response.headers.get("Retry-After"));
  const later = wait > 0 ? `Try again in ${wait} second${wait === 1 ? "" : "s"}.` : "Try again in a moment.";
  const { status } = response;
  if (code === "context_length_exceeded") return "The conversation is too long for the model. Start a new one, or leave pictures out.";
  if (status === 401) return "The server answers only with a key.";
  if (status === 403) return "The server does not allow this.";
  if (status === 404) return "The server does not have this model, or is not the one that this page belongs to.";
  if (status === 413) return "This is more than the server takes at a time. Send fewer pictures, or start a new conversation.";
  if (status === 429) return `The server has too much to do. ${later}`;
  if (status === 503) return `The server ${code === "shutting_down" ? "is about to stop" : "has as many questions as it takes"}. ${later}`;
  if (status >= 500) return "The server failed on this question.";
  if (/image|picture/i.test(`${code} ${detail}`)) return "The server refused a picture.";
  return "The server refused the question.";
}
