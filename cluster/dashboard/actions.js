// What an operator may do: sign in, move a request, drain a worker, give pools other sizes. Each says what came of it.

import { ask } from "./feed.js";
import { h, ms, plural, say, tail } from "./elements.js";

/** Says something at the foot of the page, and to screen readers. */
export function toast(text, kind = "well") {
  const note = h("div", { class: `toast ${kind}` }, text);
  const toasts = document.getElementById("toasts");
  toasts.append(note);
  while (toasts.children.length > 4) toasts.firstChild.remove();
  setTimeout(() => note.remove(), kind === "bad" ? 12_000 : 6_000);
}

/** A modal dialog; resolves to what `values` gives when it is confirmed, and to null when it is left. */
function dialog(title, parts, { confirm, danger = false, values = () => true, cancel = "Cancel" }) {
  const box = document.getElementById("dialog");
  if (box.open) box.close();
  return new Promise((resolve) => {
    let result = null;
    const form = h("form", { submit: (event) => {
      event.preventDefault();
      result = values(form);
      box.close();
    } }, h("h2", { id: "dialog-title" }, title), parts,
      h("div", { class: "act" }, cancel && h("button", { type: "button", click: () => box.close() }, cancel), h("button", { type: "submit", class: danger ? "danger" : "main" }, confirm)));
    box.replaceChildren(form);
    box.onclose = () => {
      box.replaceChildren();
      resolve(result);
    };
    box.showModal();
  });
}

/** Asks for an operator's key; null when there is none. It goes into no storage: a reload asks again. */
export function signIn(why) {
  return dialog("Operator's key", [
    h("p", {}, why),
    h("label", {}, h("span", {}, "API key"), h("input", { type: "password", name: "key", required: true, autocomplete: "current-password", spellcheck: "false", maxlength: 512 })),
    h("p", {}, "It stays in this page's memory: a reload asks for it again."),
  ], { confirm: "Sign in", values: (form) => form.elements.key.value.trim() });
}

async function tried(what, ...asked) {
  try {
    return await ask(...asked);
  } catch (error) {
    toast(`${what}: ${error.message}`, "bad");
    return null;
  }
}

async function drain(store, id, restart) {
  const worker = store.workers.get(id);
  const num = worker ? store.running(worker).length : 0;
  const then = restart ? "When it is empty it ends, and a fresh one takes its place." : "When it is empty it ends, and its pool stays smaller.";
  const sure = await dialog(`Drain ${id}?`, [h("p", {}, `It gets nothing new. ${plural(num, "request")} of this router here ${num === 1 ? "is" : "are"} moved away or finished; no stream is cut off.`), h("p", {}, then)],
    { confirm: restart ? "Drain and restart" : "Drain", danger: true });
  if (sure && (await tried(`${id} is not drained`, "drain", { worker: id, restart }))) toast(`${id} drains`);
}

async function flip(store, id) {
  const now = store.workers.get(id)?.role;
  const roles = ["prefill", "decode", "mixed"].filter((each) => each !== now);
  const role = await dialog(`Another role for ${id}`, [
    h("p", {}, `It is a ${now} worker. What the new role does not do is moved away or finished first; its weights, its cache and its name stay.`),
    h("label", {}, h("span", {}, "new role"), h("select", { name: "role" }, roles.map((each) => h("option", { value: each }, each)))),
  ], { confirm: "Change the role", values: (form) => form.elements.role.value });
  if (role && (await tried(`${id} keeps its role`, "flip", { worker: id, role }))) toast(`${id} becomes a ${role} worker`);
}

/** What the panel of a worker offers. */
export const WORKER_ACTIONS = [
  { label: "Change role…", run: (store, id) => flip(store, id) },
  { label: "Drain…", danger: true, run: (store, id) => drain(store, id, false) },
  { label: "Drain and restart…", danger: true, run: (store, id) => drain(store, id, true) },
];

export async function scale(store) {
  const sizes = {};
  for (const worker of store.workers.values()) {
    sizes[worker.role] ??= 0;
    if (worker.state !== "dead" && worker.state !== "left") sizes[worker.role] += 1;
  }
  const inputs = Object.entries(sizes).map(([role, num]) => h("label", {}, h("span", {}, role),
    h("input", { type: "number", name: role, min: 0, max: 64, step: 1, required: true, value: num })));
  const wanted = await dialog("Scale the pools", [h("p", {}, "New workers start on the same machines; those that go are drained first, the ones with the fewest requests."), inputs],
    { confirm: "Scale", values: (form) => Object.fromEntries(Object.keys(sizes).map((role) => [role, Number(form.elements[role].value)])) });
  if (!wanted) return;
  const changed = Object.fromEntries(Object.entries(wanted).filter(([role, num]) => num !== sizes[role]));
  if (!Object.keys(changed).length) return toast("The pools have these sizes already.", "note");
  if (await tried("The pools are not scaled", "scale", { pools: changed })) toast(`Scaling ${Object.entries(changed).map(([role, num]) => `${role} to ${num}`).join(", ")}`);
}

/** The controls that move a request; `update` lets them follow where it is and where it may go. */
export function migrateControls(store, id, onMoved) {
  const choice = h("select", { "aria-label": "Where to move it" });
  const button = h("button", { type: "button", class: "main", click: () => move() }, "Migrate");
  const note = h("span", { class: "quiet", role: "status" });
  const element = h("div", { class: "act" }, choice, button, note);
  let offered = "", busy = false;

  async function move() {
    busy = true;
    update();
    const done = await tried(`${tail(id)} is not moved`, "migrate", { request: id, to: choice.value });
    busy = false;
    if (done) toast(done.outcome === "moved" ? `${tail(id)} moved from ${done.from} to ${done.to}, pause ${ms(done.pause_ms)}` : `${tail(id)} was not moved to ${done.to}: ${done.error || done.outcome}`, done.outcome === "moved" ? "well" : "bad");
    update();
    onMoved();
  }

  function update() {
    const request = store.byId.get(id);
    const here = request?.decode;
    const able = Boolean(request && request.state === "decoding");
    const places = [...store.workers.values()].filter((each) => each.state === "ready" && each.role !== "prefill" && each.id !== here).map((each) => each.id);
    if (places.join() !== offered) {
      offered = places.join();
      const chosen = choice.value;
      choice.replaceChildren(h("option", { value: "" }, "router chooses"), ...places.map((each) => h("option", { value: each }, each)));
      choice.value = places.includes(chosen) ? chosen : "";
    }
    element.hidden = !able;
    button.disabled = choice.disabled = busy || Boolean(request?.moving_to) || !places.length;
    say(note, busy || request?.moving_to ? `moving to ${request?.moving_to || choice.value || "another worker"}` : places.length ? `at ${here}` : "no other worker that decodes is ready");
  }

  update();
  return { element, update };
}
