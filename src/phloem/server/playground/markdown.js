// Markdown as DOM nodes. Text only ever becomes text: nothing here writes HTML.

function node(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

const INLINE = [
  [/^`([^`\n]+)`/, (m) => node("code", m[1])],
  [/^\*\*(?=\S)([^\n]+?\S|\S)\*\*/, (m) => node("strong", ...inline(m[1]))],
  [/^__(?=\S)([^\n]+?\S|\S)__(?!\w)/, (m) => node("strong", ...inline(m[1]))],
  [/^~~(?=\S)([^\n]+?)~~/, (m) => node("del", ...inline(m[1]))],
  [/^\*(?=[^\s*])([^*\n]*[^\s*])\*/, (m) => node("em", ...inline(m[1]))],
  [/^_(?=[^\s_])([^_\n]*[^\s_])_(?!\w)/, (m) => node("em", ...inline(m[1]))],
  [/^\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/, (m) => link(m[2], ...inline(m[1]))],
  [/^https?:\/\/[^\s<>")\]]+[^\s<>")\].,;:!?]/, (m) => link(m[0], m[0])],
  [/^\\([\\`*_{}[\]()#+.!~|-])/, (m) => m[1]],
];

function link(address, ...children) {
  const made = node("a", ...children);
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}

function inline(text) {
  const found = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const rest = text.slice(at);
    // An underscore inside a word is no emphasis.
    const inWord = rest[0] === "_" && /\w/.test(text[at - 1] || "");
    const rule = inWord || !/^[`*_~[\\h]/.test(rest) ? null : INLINE.find(([pattern]) => pattern.test(rest));
    if (!rule) {
      plain += text[at++];
      continue;
    }
    const match = rest.match(rule[0]);
    if (plain) found.push(plain);
    plain = "";
    found.push(rule[1](match));
    at += match[0].length;
  }
  if (plain) found.push(plain);
  return found;
}

function paragraph(lines) {
  const made = node("p");
  lines.forEach((line, i) => {
    if (i) made.append(/ {2}$/.test(lines[i - 1]) ? node("br") : "\n");
    made.append(...inline(line.trimEnd()));
  });
  return made;
}

function fence(lines, language) {
  const code = node("code", lines.join("\n"));
  const made = node("pre", code);
  if (language) made.dataset.language = language;
  const copy = node("button", "Copy");
  copy.type = "button";
  copy.className = "quiet";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  made.append(copy);
  return made;
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines) {
  const first = lines[0].match(ITEM);
  const made = node(/\d/.test(first[2]) ? "ol" : "ul");
  if (made.tagName === "OL" && parseInt(first[2], 10) !== 1) made.start = parseInt(first[2], 10);
  const indent = first[1].length;
  let content = null;
  const close = () => {
    if (!content) return;
    const inside = blocks(content);
    const only = inside.length && inside[0].tagName === "P" ? [...inside[0].childNodes, ...inside.slice(1)] : inside;
    made.append(node("li", ...only));
  };
  for (const line of lines) {
    const match = line.match(ITEM);
    if (match && match[1].length <= indent + 1) {
      close();
      content = [match[3]];
    } else {
      content.push(line.replace(/^\s{1,4}/, ""));
    }
  }
  close();
  return made;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const head = node("tr", ...cells(lines[0]).map((cell) => node("th", ...inline(cell))));
  const body = lines.slice(2).map((line) => node("tr", ...cells(line).map((cell) => node("td", ...inline(cell)))));
  return node("table", node("thead", head), node("tbody", ...body));
}

function blocks(lines) {
  const found = [];
  let at = 0;
  const take = (test) => {
    const begin = at;
    while (at < lines.length && test(lines[at])) at++;
    return lines.slice(begin, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = line.match(/^\s*(```+|~~~+)\s*([\w+-]*)\s*$/))) {
      at++;
      const inside = take((other) => !other.trim().startsWith(match[1]));
      at++;
      found.push(fence(inside, match[2]));
    } else if ((match = line.match(/^(#{1,6})\s+(.*?)\s*#*$/))) {
      at++;
      found.push(node(`h${Math.min(6, match[1].length + 2)}`, ...inline(match[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      at++;
      found.push(node("hr"));
    } else if (/^\s*>/.test(line)) {
      found.push(node("blockquote", ...blocks(take((other) => /^\s*>/.test(other)).map((other) => other.replace(/^\s*> ?/, "")))));
    } else if (ITEM.test(line)) {
      found.push(list(take((other) => ITEM.test(other) || /^\s{2,}\S/.test(other))));
    } else if (line.includes("|") && /^\s*\|?[\s:-]*-[\s|:-]*$/.test(lines[at + 1] || "")) {
      found.push(table(take((other) => other.includes("|"))));
    } else {
      const begin = at++;
      while (at < lines.length && lines[at].trim() && !/^\s*(```|~~~|#{1,6}\s|>)/.test(lines[at]) && !ITEM.test(lines[at])) at++;
      found.push(paragraph(lines.slice(begin, at)));
    }
  }
  return found;
}

/** Nodes for a Markdown text; also for one that is still being written. */
export function render(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"));
}
