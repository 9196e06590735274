/** Builds elements.  Text becomes text nodes only: nothing here turns a string into markup. */

export const byId = (id) => document.getElementById(id);

/** An element.  Properties are attributes, or listeners where they begin with "on"; empty ones are left out. */
export function el(tag, properties, ...children) {
  return filled(document.createElement(tag), properties, children);
}

/** The same of an SVG image. */
export function svg(tag, properties, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(2).filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

const PATHS = {
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  edit: "M4 20l1-4L16.5 4.5l3 3L8 19zM14 7l3 3",
  menu: "M4 7h16M4 12h16M4 17h10",
  odds: "M5 19v-6M12 19V5M19 19v-9",
  redo: "M19 5v5h-5M19 10a7.5 7.5 0 1 0 .5 5",
  send: "M12 19V6M6 12l6-6 6 6",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M13 4.5v5M7 14.5v5",
  stop: "M7 7h10v10H7z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

/** An icon, which says nothing to a screen reader: its button has the words. */
export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: PATHS[name] }));
}

/** A button with an icon, and the words for it as a tool tip. */
export function iconButton(name, words, onclick) {
  return el("button", { type: "button", class: "icon", "aria-label": words, title: words, onclick }, icon(name));
}

/** Tell a screen reader what a look at the page would tell. */
export function say(text) {
  byId("said").textContent = text;
}

/** Show a dialog, and return what it was closed with: the value of the button, or null where it was left. */
export function dialog(title, content, buttons, properties = {}) {
  return new Promise((resolve) => {
    const heading = el("h2", { id: "dialog-title" }, title);
    const form = el("form", { method: "dialog" }, heading, content, el("div", { class: "row end" }, buttons));
    const shown = el("dialog", { "aria-labelledby": "dialog-title", ...properties }, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      shown.close(event.submitter?.value ?? "");
    });
    shown.addEventListener("cancel", () => {
      shown.returnValue = "";
    });
    shown.addEventListener("close", () => {
      shown.remove();
      resolve(shown.returnValue || null);
    });
    document.body.append(shown);
    shown.showModal();
  });
}

export const cancelButton = () => el("button", { value: "", formnovalidate: true, class: "quiet" }, "Cancel");

/** Whether the user really wants it. */
export async function confirmed(title, text, yes) {
  const buttons = [cancelButton(), el("button", { value: "yes", class: "danger" }, yes)];
  return (await dialog(title, el("p", {}, text), buttons)) === "yes";
}
