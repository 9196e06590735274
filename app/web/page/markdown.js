/**
 * Turns a model's markdown into elements.  HTML in it is shown as text; what the libraries make of the rest goes through
 * the sanitizer, whatever they are.  Highlighting and maths are loaded when a text first needs them.
 */

import { el, iconButton, say } from "./dom.js";
import DOMPurify from "./vendor/dompurify.js";
import { Marked } from "./vendor/marked.js";

let highlighter = null;
let maths = null;

const CODE = /```|~~~|^(?: {4}|\t)/m;
const MATHS = /\$|\\\(|\\\[/;

/** Load what a text needs, and return whether that was not there before: its code is plain until then, and its maths as written. */
export async function prepare(text) {
  const before = [highlighter, maths];
  if (!highlighter && CODE.test(text)) highlighter = (await import("./vendor/highlight.js")).default;
  if (!maths && MATHS.test(text)) maths = (await import("./vendor/temml.js")).default;
  return before[0] !== highlighter || before[1] !== maths;
}

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

const INLINE = [/^\\\(([\s\S]+?)\\\)/, /^\$(?![\s$])((?:[^$\n\\]|\\.)+?)(?<!\s)\$(?![\d$])/];
const DISPLAYED = [/^\$\$([\s\S]+?)\$\$/, /^\\\[([\s\S]+?)\\\]/];
const DISPLAYED_BLOCK = [/^\$\$([\s\S]+?)\$\$[ \t]*(?:\n|$)/, /^\\\[([\s\S]+?)\\\][ \t]*(?:\n|$)/];

const BLOCK_START = /\n(?:\$\$[\s\S]+?\$\$|\\\[[\s\S]+?\\\])[ \t]*(?:\n|$)/;

/** An extension of marked; `begin` finds where one may begin, which is where marked cuts the text before it. */
function mathsExtension(name, level, begin, patterns, displayMode) {
  return {
    name,
    level,
    start(source) {
      const place = source.search(begin);
      return place < 0 ? undefined : place;
    },
    tokenizer(source) {
      for (const pattern of patterns) {
        const found = pattern.exec(source);
        if (found) return { type: name, raw: found[0], text: found[1].trim() };
      }
      return undefined;
    },
    renderer: ({ raw, text }) => formula(raw, text, displayMode),
  };
}

function formula(raw, text, displayMode) {
  if (!maths) return escaped(raw);
  try {
    const found = maths.renderToString(text, { displayMode, throwOnError: true, trust: false, maxExpand: 200 });
    // Its texts hold no plain quotes, so these are attributes, which the policy of the page does not allow.
    return found.replace(/ style="[^"]*"/g, "");
  } catch {
    return `<code>${escaped(raw)}</code>`;
  }
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    code: ({ text, lang }) => codeBlock(text, (lang ?? "").trim().split(/\s/)[0].toLowerCase()),
  },
});
marked.use({
  extensions: [
    mathsExtension("displayed", "block", BLOCK_START, DISPLAYED_BLOCK, true),
    mathsExtension("displayedInline", "inline", MATHS, DISPLAYED, true),
    mathsExtension("formula", "inline", MATHS, INLINE, false),
  ],
});

function codeBlock(text, language) {
  const known = highlighter?.getLanguage(language);
  const body = known ? highlighter.highlight(text, { language, ignoreIllegals: true }).value : escaped(text);
  return `<pre><code class="language-${escaped(language)}">${body}</code></pre>`;
}

const SAFE = {
  USE_PROFILES: { html: true, mathMl: true },
  FORBID_TAGS:
    "audio button dialog form iframe img link map meta picture select slot style template textarea video".split(" "),
  FORBID_ATTR: ["style", "id", "name", "srcset", "action", "formaction", "background"],
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const ELSEWHERE = /^(?:https?|mailto):/i;
const BLOCKS = "p, li, h1, h2, h3, h4, h5, h6, blockquote, td, th";

/** The elements of a text. */
export function rendered(text) {
  const fragment = DOMPurify.sanitize(marked.parse(text), SAFE);
  for (const each of fragment.querySelectorAll(BLOCKS)) each.dir = "auto";
  for (const link of fragment.querySelectorAll("a[href]")) {
    // One without a scheme would lead into the service itself.
    if (!ELSEWHERE.test(link.getAttribute("href"))) link.removeAttribute("href");
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const box of fragment.querySelectorAll("input")) {
    box.disabled = true;
    box.setAttribute("aria-label", box.checked ? "done" : "to do");
  }
  for (const table of fragment.querySelectorAll("table"))
    wrap(table, el("div", { class: "wide-table", tabindex: "0" }));
  for (const block of fragment.querySelectorAll("pre")) frame(block);
  return fragment;
}

function wrap(node, outer) {
  node.replaceWith(outer);
  outer.append(node);
}

/** Put a bar above a block of code: its language, and a button that copies it. */
function frame(block) {
  const code = block.querySelector("code");
  const language = /language-(\S+)/.exec(code?.className ?? "")?.[1] ?? "";
  const bar = el("div", { class: "code-bar" }, el("span", {}, language));
  bar.append(copyButton("Copy the code", () => block.textContent));
  const outer = el("div", { class: "code", dir: "ltr" });
  wrap(block, outer);
  block.tabIndex = 0;
  outer.prepend(bar);
}

/** A button that copies what `text` returns. */
export function copyButton(words, text) {
  const button = iconButton("copy", words, async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.classList.add("done");
      say("Copied");
      setTimeout(() => button.classList.remove("done"), 1200);
    } catch {
      say("The browser did not let the page copy");
    }
  });
  return button;
}
