// The server's interface: lists, answers as they are written, and its errors in plain words.
// Addresses are relative, so that the page also works behind a proxy that puts a path before them.

export const COMPLETIONS = "v1/chat/completions";

// `place` says where on the page an error belongs: key, knobs, prompt or answer.
export class ServerError extends Error {
  constructor(message, place = "answer") {
    super(message);
    this.place = place;
  }
}

const PLACES = {
  knobs: "knobs",
  panel: "knobs",
  model: "prompt",
  messages: "prompt",
  max_tokens: "prompt",
  max_completion_tokens: "prompt",
  temperature: "prompt",
  seed: "prompt",
};

export async function get(path, key) {
  const response = await request(path, { headers: headers(key) });
  try {
    return await response.json();
  } catch {
    throw new ServerError(`The server's answer to ${path} is not JSON. Is this a Trimtab server?`);
  }
}

// Yield the chunks of an answer while they come.
export async function* stream(body, key, signal) {
  const response = await request(COMPLETIONS, {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, projections: true }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, PLACES[chunk.error.param]);
    yield chunk;
  }
  throw new ServerError("The answer broke off: the server closed the connection.");
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function request(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const status = response.status;
  const error = (await response.json().catch(() => ({}))).error ?? {};
  const said = error.message ?? `The server answered with status ${status}.`;
  const wait = response.headers.get("Retry-After");
  const later = /^\d+$/.test(wait ?? "") ? `in ${wait} s` : "later";
  if (status === 401 || status === 403) return new ServerError(`The server wants a valid API key. ${said}`, "key");
  if (status === 429) return new ServerError(`The server is busy: try again ${later}. ${said}`, "prompt");
  if (status === 503) return new ServerError(`The server takes no requests now: try again ${later}. ${said}`, "prompt");
  return new ServerError(said, PLACES[error.param]);
}

// Yield the data of server-sent events; the server writes one line of data for each.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The answer broke off: the connection was lost.");
  } finally {
    reader.cancel().catch(() => {}); // of a stream that is already over there is nothing to cancel
  }
}
