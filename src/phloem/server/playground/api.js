// Requests to the server that this page came from; the API key, when there is one, lives in this tab.

const KEY = "phloem-key";
export const events = new EventTarget();

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** An error that the server told, or that there is none. */
export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function problem(response) {
  let message = `HTTP ${response.status}`;
  try {
    const body = await response.json();
    message = body.error?.message || message;
  } catch { /* an answer that is no JSON tells no more than its status */ }
  if (response.status === 401) events.dispatchEvent(new Event("unauthorized"));
  return new Problem(message, response.status);
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw await problem(response);
  return response;
}

export async function get(path) {
  return (await ask(path, {})).json();
}

export async function post(path, body) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  return (await ask(path, options)).json();
}

export async function remove(path) {
  await ask(path, { method: "DELETE" });
}

/** A file that the server sends. */
export async function blob(path) {
  return (await ask(path, {})).blob();
}

/** The events of a streamed answer, decoded. Ends with the stream; throws what the server tells inside it. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" },
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The connection broke while the answer came.", 0);
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:") || line.slice(5).trim() === "[DONE]") continue;
      const event = JSON.parse(line.slice(5));
      if (event.error) throw new Problem(event.error.message, event.error.code);
      yield event;
    }
  }
}
