// The connection to the router: one streamed answer whose lines are frames, made again whenever it breaks.
//
// The key of an operator is kept in this module alone: in no storage, no cookie and no address. A reload forgets it.

const QUIET_MS = 6_000; // a router says something twice a second
const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const LINE_MAX = 64 << 20;

let key = "";

export function hasKey() {
  return key !== "";
}

export function takeKey(shown) {
  key = shown;
}

/** What is shown with every request: the key, and the mark that other sites cannot set. */
function headers(more = {}) {
  const shown = { "x-tandem-dashboard": "1", ...more };
  if (key) shown.authorization = `Bearer ${key}`;
  return shown;
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Asks for a document, or has something done. Raises Refused with the router's own words. */
export async function ask(path, body) {
  const options = body === undefined
    ? { headers: headers() }
    : { method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body) };
  const reply = await fetch(`/dashboard/${path}`, { ...options, cache: "no-store", credentials: "same-origin" });
  const document = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, document.error?.message ?? `the router answered ${reply.status}`);
  return document;
}

/** Watches for ever. `onFrame` gets each frame; `onState` (state, words, msUntilRetry) each change of the connection. */
export class Feed {
  constructor({ onFrame, onState }) {
    this.onFrame = onFrame;
    this.onState = onState;
    this.tries = 0;
    this.timer = null;
    this.abort = null;
  }

  /** Connects now, whatever it was doing. */
  start() {
    clearTimeout(this.timer);
    this.abort?.abort("again");
    const abort = new AbortController();
    this.abort = abort;
    this.#run(abort).catch((error) => {
      if (this.abort === abort) this.#again(error);
    });
  }

  async #run(abort) {
    this.onState("connecting", this.tries ? "connecting again" : "connecting");
    let quiet = setTimeout(() => abort.abort(new Error("the router says nothing")), QUIET_MS);
    const heard = () => {
      clearTimeout(quiet);
      quiet = setTimeout(() => abort.abort(new Error("the router says nothing")), QUIET_MS);
    };
    try {
      const reply = await fetch("/dashboard/feed", {
        headers: headers(), cache: "no-store", credentials: "same-origin", signal: abort.signal,
      });
      if (!reply.ok) {
        const document = await reply.json().catch(() => ({}));
        throw new Refused(reply.status, document.error?.message ?? `the router answered ${reply.status}`);
      }
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (this.abort !== abort) return;
        if (done) throw new Error("the router has closed the connection");
        heard();
        rest += value;
        if (rest.length > LINE_MAX) throw new Error("a frame is too large");
        const lines = rest.split("\n");
        rest = lines.pop();
        for (const line of lines) this.#line(JSON.parse(line));
      }
    } finally {
      clearTimeout(quiet);
      abort.abort("over");
    }
  }

  #line(frame) {
    if (frame.kind === "end") throw new Error(frame.why);
    this.onFrame(frame);
    if (this.tries !== -1) {
      this.tries = -1;
      this.onState("live", "live");
    }
  }

  #again(error) {
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
      this.onState("refused", error.message, null, error.status);
      return;
    }
    this.tries = Math.max(0, this.tries) + 1;
    const pause = RETRY_MS[Math.min(this.tries, RETRY_MS.length) - 1];
    const network = error instanceof TypeError ? "the router cannot be reached" : error.message ?? String(error);
    this.onState("lost", network, pause);
    this.timer = setTimeout(() => this.start(), pause * (0.8 + 0.4 * Math.random()));
  }
}
