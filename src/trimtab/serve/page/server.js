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

const PATIENCE = 60; // seconds for which a busy server is asked again

// `busy` is called with the seconds until a busy server is asked again.
export async function get(path, key, busy) {
  const response = await request(path, { headers: headers(key) }, busy);
  try {
    return await response.json();
  } catch {
    throw new ServerError(`The server's answer to ${path} is not JSON. Is this a Trimtab server?`);
  }
}

// Yield the chunks of an answer while they come.
export async function* stream(body, key, signal, busy) {
  const options = {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, projections: true }),
    signal,
  };
  const response = await request(COMPLETIONS, options, busy);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, PLACES[chunk.error.param]);
    yield chunk;
  }
  throw new ServerError("The answer broke off: the server closed the connection.");
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function request(path, options, busy) {
  for (let waited = 0; ; ) {
    const response = await ask(path, options);
    if (response.ok) return response;
    const wait = Math.max(1, Number(response.headers.get("Retry-After") ?? NaN));
    waited += wait;
    if (response.status !== 429 || !(waited <= PATIENCE)) throw await refusal(response, options.headers);
    response.body.cancel().catch(() => {});
    busy(wait);
    await rest(1000 * wait, options.signal);
  }
}

async function ask(path, options) {
  try {
    return await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
}

const rest = (milliseconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)));
  });

async function refusal(response, sent) {
  const status = response.status;
  const error = (await response.json().catch(() => ({}))).error ?? {};
  const said = error.message ?? `The server answered with status ${status}.`;
  const wait = response.headers.get("Retry-After");
  const later = /^\d+$/.test(wait ?? "") ? `in ${wait} s` : "later";
  if (status === 401) return new ServerError(`This server ${sent.Authorization ? "does not know this key" : "wants an API key"}.`, "key");
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
