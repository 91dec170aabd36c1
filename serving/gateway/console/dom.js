// Elements. Whatever text goes in becomes a text node: no line of this page parses HTML (and its policy forbids it).

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

/** An element. attributes: plain ones, and `on: {event: f}`, `data: {name: value}`, `style: {property: value}`. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "style") for (const [property, to] of Object.entries(value)) node.style.setProperty(property, to);
    else set(node, name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets an attribute; null and false remove it. Writes only what changes, so that nothing is laid out again for nothing. */
export function set(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else {
    const text = value === true ? "" : String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
}

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function style(node, property, value) {
  if (node.style.getPropertyValue(property) !== value) node.style.setProperty(property, value);
}

/** Boxes of figures in a <dl>, made once: returns a function that takes [[name, figure, remark], …] in the same order. */
export function tiles(list) {
  let boxes = [];
  return (rows) => {
    if (boxes.length !== rows.length) {
      boxes = rows.map(() => [h("dt"), h("dd", { class: "figure" }), h("dd")]);
      list.replaceChildren(...boxes.map((parts) => h("div", {}, ...parts)));
    }
    rows.forEach((row, at) => row.forEach((text, part) => say(boxes[at][part], text)));
  };
}

/** Keeps children of `parent` equal to `keys`, in order: `make(key)` for new ones; moves and removes the others. */
export class Keyed {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.items = new Map(); // key -> {node, …}
  }

  update(keys) {
    const wanted = new Set(keys);
    for (const [key, item] of this.items) {
      if (!wanted.has(key)) {
        item.node.remove();
        this.items.delete(key);
      }
    }
    let before = this.parent.firstChild;
    for (const key of keys) {
      if (!this.items.has(key)) this.items.set(key, this.make(key));
      const { node } = this.items.get(key);
      if (node === before) before = before.nextSibling;
      else this.parent.insertBefore(node, before);
    }
  }
}
