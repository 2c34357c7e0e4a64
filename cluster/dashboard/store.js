// What the router has told: frames come in, and each says which workers, requests and moves are other than before.

const FORMAT = 1;
export const OVER = new Set(["finished", "cancelled", "failed"]);
export const BLOCK_STATES = ["owned", "exported", "granted", "cached", "quarantined", "free"];

export class OtherFormat extends Error {}

export class Store {
  constructor() {
    this.clear();
  }

  clear() {
    this.head = {};
    this.number = 0;
    this.atMs = 0;
    this.workers = new Map();
    this.requests = new Map(); // by handle
    this.byId = new Map();
    this.moves = new Map();
    this.tasks = new Map();
    this.seconds = [];
    this.secondsMax = 300;
    this.fields = null;
  }

  /** Takes a frame. Returns what it changed; raises where a frame before it is missing, or it speaks another format. */
  apply(frame) {
    const changed = { all: false, workers: new Set(), homes: new Set(), moves: [], handoffs: [], requests: false };
    if (frame.kind === "full") {
      if (frame.format !== FORMAT) throw new OtherFormat("this page is of another version than the router: load it again");
      this.clear();
      this.fields = frame.fields;
      this.secondsMax = frame.seconds_max;
      changed.all = true;
    } else if (this.fields === null || frame.number !== this.number + 1) {
      throw new Error(`frame ${frame.number} came after ${this.number}`);
    }
    this.number = frame.number;
    this.atMs = frame.at_ms;
    if (frame.head) this.head = frame.head;
    for (const row of frame.workers ?? []) {
      const worker = named(this.fields.workers, row);
      worker.requests = this.workers.get(worker.id)?.requests ?? new Set();
      this.workers.set(worker.id, worker);
      changed.workers.add(worker.id);
    }
    for (const id of frame.workers_gone ?? []) {
      this.workers.delete(id);
      changed.homes.add(id);
      changed.all = true;
    }
    for (const handle of frame.requests_gone ?? []) this.#forget(handle, changed);
    for (const row of frame.requests ?? []) this.#request(named(this.fields.requests, row), changed);
    const counters = frame.tokens ?? [];
    for (let at = 0; at < counters.length; at += 2) {
      const request = this.requests.get(counters[at]);
      if (request) request.tokens = counters[at + 1];
    }
    for (const row of frame.moves ?? []) {
      const move = named(this.fields.moves, row);
      changed.moves.push([this.moves.get(move.key) ?? null, move]);
      this.moves.set(move.key, move);
    }
    for (const key of frame.moves_gone ?? []) this.moves.delete(key);
    for (const row of frame.seconds ?? []) this.seconds.push(named(this.fields.seconds, row));
    if (this.seconds.length > this.secondsMax) this.seconds.splice(0, this.seconds.length - this.secondsMax);
    for (const row of frame.tasks ?? []) this.#task(named(this.fields.tasks, row));
    if (changed.all) for (const id of this.workers.keys()) changed.workers.add(id);
    return changed;
  }

  #request(request, changed) {
    const before = this.requests.get(request.handle);
    changed.requests = true;
    this.requests.set(request.handle, request);
    this.byId.set(request.id, request);
    if (before && before.home !== undefined) this.workers.get(before.home)?.requests.delete(request.handle);
    if (before && before.began_ms && !request.began_ms) request.began_ms = before.began_ms;
    if (before && before.state === "handing_off" && request.state === "decoding" && request.prefill !== request.decode)
      changed.handoffs.push(request);
    const home = OVER.has(request.state) ? undefined : homeOf(request);
    request.home = home;
    if (home !== undefined) this.workers.get(home)?.requests.add(request.handle);
    for (const each of [before?.home, home]) if (each !== undefined) changed.homes.add(each);
  }

  #forget(handle, changed) {
    const request = this.requests.get(handle);
    if (!request) return;
    this.requests.delete(handle);
    if (this.byId.get(request.id) === request) this.byId.delete(request.id);
    if (request.home !== undefined) {
      this.workers.get(request.home)?.requests.delete(handle);
      changed.homes.add(request.home);
    }
    changed.requests = true;
  }

  #task(task) {
    this.tasks.set(task.id, task);
    while (this.tasks.size > 32) this.tasks.delete(this.tasks.keys().next().value);
  }

  /** Requests that run, of a worker. */
  running(worker) {
    return [...worker.requests].map((handle) => this.requests.get(handle)).filter(Boolean);
  }
}

/** Where a request is now: with its prefill worker until a decode worker owns it. */
function homeOf(request) {
  if (request.state === "prefilling" || request.state === "handing_off") return request.prefill || undefined;
  return request.decode || request.prefill || undefined;
}

function named(fields, row) {
  const record = {};
  for (let at = 0; at < fields.length; at += 1) record[fields[at]] = row[at];
  return record;
}
