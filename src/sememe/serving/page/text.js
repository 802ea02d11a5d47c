// Text in colour: tokens and the segments of their concepts, what the pointer or the arrow keys tell
// of them, and a few lines that make elements. What comes from a model becomes text, never markup.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
export const number = (value, digits = 2) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const plural = (count, noun) => `${number(count, 0)} ${noun}${count === 1 ? "" : "s"}`;

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** The hue and the line of a concept; the report of a run has the same hues. */
export function paint(element, concept, kind = 0) {
  const value = concept + 1009 * kind;
  element.style.setProperty("--hue", (value * 137.50776405) % 360);
  element.classList.remove("line-0", "line-1", "line-2", "line-3");
  element.classList.add(`line-${value % 4}`);
}

/** Text that grows by tokens, cut into the segments of its concepts. A concept is known one step
 * after its token, so the last segment is open. */
export class ConceptText {
  constructor(label) {
    this.root = make("p", { className: "text waiting", tabIndex: 0 });
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", `${label}. Arrow keys go through its tokens.`);
    this.open = make("span", { className: "segment" });
    this.rest = make("span", { className: "rest" }); // text whose tokens are not known yet
    this.root.append(this.open, this.rest);
    this.characters = []; // code points, as the server counts them
    this.tokens = []; // { offset, element }
    this.done = 0; // tokens whose text is whole
    this.given = 0; // tokens of the prompt
    this.hidden = 0; // those of them that are not shown
  }

  get text() {
    return this.characters.join("");
  }

  /** `tokens`: { offset, nll } of each new one; `concepts`: [place, id] pairs. */
  add({ text = "", tokens = [], concepts = [] }) {
    for (const character of text) this.characters.push(character);
    const at = new Map(concepts.map(([place, id]) => [place - this.hidden, id]));
    for (const [index, id] of at) if (index < this.tokens.length) this.close(index, id);
    for (const { offset, nll } of tokens) {
      const index = this.tokens.length;
      const given = index + this.hidden < this.given;
      const element = make("span", { className: given ? "token given" : "token" });
      element.dataset.place = index;
      if (nll != null) {
        element.dataset.nll = nll;
        element.style.setProperty("--surprise", `${Math.min(100, Math.max(0, nll) * 10)}%`);
      }
      this.tokens.push({ offset, element });
      this.open.append(element);
      if (at.has(index)) this.close(index, at.get(index));
    }
    this.draw();
  }

  /** The open segment ends with this token. */
  close(index, concept) {
    const segment = this.open;
    const later = [...segment.children].filter((token) => token.dataset.place > index);
    if (later.length === segment.children.length) return;
    this.open = make("span", { className: "segment" }, ...later);
    segment.after(this.open);
    segment.dataset.id = concept;
    if (concept < 0) segment.classList.add("sink");
    else paint(segment, concept);
  }

  /** A token's text ends where the next one's begins: half a character belongs to its last token. */
  draw() {
    const { tokens, characters } = this;
    const unread = tokens.length + this.hidden < this.given;
    const end = unread ? (tokens.at(-1)?.offset ?? 0) : characters.length;
    for (let n = this.done; n < tokens.length; n++) {
      const next = tokens[n + 1]?.offset ?? end;
      tokens[n].element.textContent = characters.slice(tokens[n].offset, next).join("");
      if (n === this.done && n + 1 < tokens.length && next <= characters.length) this.done++;
    }
    this.rest.textContent = characters.slice(tokens.length ? end : 0).join("");
  }

  finish() {
    this.root.classList.remove("waiting");
  }
}

// ---- what a token is: by pointer, or by arrow keys ----

let here = null;

export function leave() {
  for (const element of $$(".here, .same")) element.classList.remove("here", "same");
  $("#tip").hidden = true;
  here = null;
}

const samples = (segment) =>
  $$(`.segment[data-id="${segment.dataset.id}"]`, segment.closest("[role=tabpanel]"));

function visit(token) {
  leave();
  here = token;
  const segment = token.parentElement;
  const { id } = segment.dataset;
  const lines = [];
  let title = "Open segment";
  if (document.body.classList.contains("plain")) title = "Token";
  else if (id !== undefined) {
    const same = samples(segment);
    if (id >= 0) for (const element of same) element.classList.add("same");
    title = id >= 0 ? `Concept ${id}` : "Sink: a state without a code";
    const count = $$(".token", segment).length;
    lines.push(`${plural(same.length, "place")} on this page`);
    lines.push(`${plural(count, "token")}: a rate of ${number(1 / count)} here`);
  }
  const nll = token.dataset.nll;
  if (nll !== undefined) {
    const share = 100 * Math.exp(-nll);
    const percent = number(share, share < 1 ? 2 : 0);
    lines.push(`Surprise of “${token.textContent}”: ${number(Number(nll))} nats (${percent} %)`);
  }
  token.classList.add("here");
  const tip = $("#tip");
  tip.replaceChildren(make("b", {}, title), ...lines.map((line) => make("span", {}, line)));
  tip.hidden = false;
  const [box] = token.getClientRects();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box?.left ?? 8), innerWidth - size.width - 8);
  const below = (box?.bottom ?? 0) + 8;
  const top = below + size.height < innerHeight ? below : (box?.top ?? 0) - size.height - 8;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${Math.max(8, top)}px`);
  return [title, ...lines].join(". ");
}

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".token");
  if (token) visit(token);
  else if (here && !here.closest(".text:focus")) leave();
});
document.addEventListener("focusout", leave);
document.addEventListener("scroll", () => here?.closest(".text:focus") || leave(), { passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") leave();
  const root = event.target.classList?.contains("text") ? event.target : null;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };
  if (!root || !(event.key in steps)) return;
  event.preventDefault();
  const token = neighbour(root, steps[event.key], ["ArrowUp", "ArrowDown"].includes(event.key));
  if (!token) return;
  token.closest(".text").focus({ preventScroll: true });
  token.scrollIntoView({ block: "nearest" });
  announce(visit(token));
});

/** The next token in that direction, or the next place of the same concept. */
function neighbour(root, step, same) {
  const tokens = $$(".token", root).filter((token) => token.textContent);
  if (!here || !root.contains(here)) return tokens[step > 0 ? 0 : tokens.length - 1];
  if (!same) return tokens[tokens.indexOf(here) + step];
  const segment = here.parentElement;
  if (!(segment.dataset.id >= 0)) return null;
  const all = samples(segment);
  const next = all[(all.indexOf(segment) + step + all.length) % all.length];
  return $$(".token", next).find((token) => token.textContent) ?? null;
}

export function announce(text) {
  $("#announcement").textContent = text;
}
