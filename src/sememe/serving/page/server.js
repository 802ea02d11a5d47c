// Calls of the server, with the key that its reader enters, and its streams.

import { $ } from "./text.js";

/** A fetch with the reader's key, which is asked for when the server wants one. Throws an Error with
 * the server's own sentence. */
export async function call(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("sememe-key");
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, signal, body: JSON.stringify(body) });
  if (response.ok) return response;
  const { error = {} } = await response.json().catch(() => ({}));
  if (response.status === 401) {
    await askKey(key ? "The server does not take this key." : "");
    return call(path, body, signal);
  }
  const message = error.message ?? `The server answered ${response.status}.`;
  throw Object.assign(new Error(message), { code: error.code });
}

function askKey(fault) {
  const dialog = $("#key");
  $("#key-fault").textContent = fault;
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onclose = () => reject(new Error("This server needs a key. Reload the page to enter it."));
    $("form", dialog).onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("sememe-key", $("#key-text").value);
      $("#key-text").value = "";
      dialog.onclose = null;
      dialog.close();
      resolve();
    };
  });
}

/** The parts of a stream. One without [DONE] has broken off. */
export async function* parts(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("The stream broke off before its end.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment keeps the connection open
        if (event === "data: [DONE]") return;
        const part = JSON.parse(event.slice(6));
        if (part.error) throw new Error(part.error.message);
        yield part;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection is closed however the stream ends
  }
}
