// What a model wrote, as elements. It is never trusted: text goes in as text, and markdown through DOMPurify, which
// gives a tree without scripts, styles, forms, and anything that would load from elsewhere.

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a",
    "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td",
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOWED_URI_REGEXP: /^https?:\/\//i,
  RETURN_DOM_FRAGMENT: true,
};

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function markdown(text) {
  const html = window.marked.parse(text, { async: false, gfm: true });
  const tree = window.DOMPurify.sanitize(html, ALLOWED);
  for (const link of tree.querySelectorAll("a")) {
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
  }
  return tree;
}

export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** The content of an answer: JSON by lines, anything else as markdown. */
export function content(text, ended) {
  if (ended && /^\s*[[{]/.test(text) && pretty(text) !== text) return element("pre", {}, pretty(text));
  return markdown(text);
}

export function call(one) {
  return element(
    "div", { class: "call" },
    element("code", {}, one.function.name), element("pre", {}, pretty(one.function.arguments)),
  );
}

/** Tokens, each with what the model thought as likely, shown on hover and on focus. */
export function tokens(entries) {
  const line = element("div", { class: "tokens" });
  for (const entry of entries) {
    const share = Math.exp(entry.logprob);
    const others = (entry.top_logprobs ?? []).map(
      (other) => `${(Math.exp(other.logprob) * 100).toFixed(1).padStart(5)}%  ${JSON.stringify(other.token)}`,
    );
    const kind = share > 0.9 ? "sure" : share < 0.5 ? "unsure" : "";
    line.append(
      element(
        "span", { class: `token ${kind}`, tabindex: "0" },
        entry.token, element("span", { class: "others", role: "note" }, others.join("\n")),
      ),
    );
  }
  return line;
}
