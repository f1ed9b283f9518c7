// The chat, and what the page needs beside it.

import { events, get, stream, useKey } from "./api.js";
import { open } from "./draw.js";
import { look, start } from "./live.js";
import { render } from "./markdown.js";

const byId = (id) => document.getElementById(id);
const log = byId("log");
let messages = [];
let pictures = [];
let running = null; // AbortController of the answer that is being written
let takesImages = false;
let modelName = "default";

// --- conversation

function atEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function addTurn(role) {
  byId("empty").hidden = true;
  const made = document.createElement("div");
  made.className = `turn ${role}`;
  log.append(made);
  return made;
}

function addUser(text, images) {
  const made = addTurn("user");
  for (const address of images) {
    const image = document.createElement("img");
    image.src = address;
    image.alt = "attached image";
    made.append(image);
  }
  made.append(text);
}

function addProblem(text) {
  const made = addTurn("failed");
  made.setAttribute("role", "alert");
  made.textContent = text;
}

function number(id) {
  const value = byId(id).value.trim();
  return value === "" ? null : Number(value);
}

function schema() {
  const text = byId("schema").value.trim();
  const problem = byId("schema-problem");
  problem.hidden = true;
  if (!text) return null;
  try {
    const value = JSON.parse(text);
    if (typeof value !== "object" || value === null) throw new Error("a schema is an object");
    return value;
  } catch (error) {
    problem.textContent = `The schema is not JSON: ${error.message}`;
    problem.hidden = false;
    byId("settings").open = true;
    byId("schema").focus();
    throw error;
  }
}

function request() {
  const wanted = schema();
  const system = byId("system").value.trim();
  const body = {
    model: modelName, stream: true, stream_options: { include_usage: true },
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
  };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"]) {
    const value = number(name);
    if (value !== null) body[name] = value;
  }
  if (wanted) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: wanted } };
  return body;
}

function facts(usage, times, count, ended) {
  const found = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    found.push(`${usage.completion_tokens} tokens`, `${usage.prompt_tokens} in the prompt, ${cached} of them cached`);
    byId("used").textContent = `${usage.total_tokens} tokens in this conversation`;
  }
  if (times.first) found.push(`first after ${(times.first - times.begun).toFixed(0)} ms`);
  const made = usage ? usage.completion_tokens : count;
  if (times.last > times.first && made > 1) {
    found.push(`${((1000 * (made - 1)) / (times.last - times.first)).toFixed(1)} tok/s`);
  }
  if (ended) found.push(ended);
  return found.join(" · ");
}

const ENDS = { length: "cut off at the limit of tokens", abort: "aborted", stopped: "stopped" };

async function answer() {
  const body = request();
  const turn = addTurn("assistant");
  const text = document.createElement("div");
  text.className = "text growing";
  turn.append(text);
  const times = { begun: performance.now(), first: 0, last: 0 };
  let said = "";
  let usage = null;
  let count = 0;
  let ended = "";
  let due = 0;
  const draw = () => {
    due = 0;
    const follow = atEnd();
    text.replaceChildren(...render(said));
    if (follow) log.scrollTop = log.scrollHeight;
  };
  log.scrollTop = log.scrollHeight;
  running = new AbortController();
  busy(true);
  let problem = null;
  try {
    for await (const event of stream("/v1/chat/completions", body, running.signal)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices ?? []) {
        const piece = (choice.delta?.reasoning_content ?? "") + (choice.delta?.content ?? "");
        if (piece) {
          times.last = performance.now();
          times.first ||= times.last;
          count += 1;
          said += piece;
          due ||= requestAnimationFrame(draw); // at most once a frame, however fast it comes
        }
        if (choice.finish_reason) ended = ENDS[choice.finish_reason] ?? "";
      }
    }
  } catch (error) {
    if (error.name === "AbortError") ended = ENDS.stopped;
    else problem = error;
  }
  cancelAnimationFrame(due);
  running = null;
  draw();
  text.classList.remove("growing");
  if (said || !problem) {
    messages.push({ role: "assistant", content: said });
    const about = document.createElement("div");
    about.className = "facts";
    about.textContent = facts(usage, times, count, ended);
    turn.append(about);
  } else {
    turn.remove();
    takeBack();
  }
  if (problem) addProblem(problem.message);
  busy(false);
  log.scrollTop = log.scrollHeight;
  look();
}

/** What got no answer may be sent again: put it back into the box. */
function takeBack() {
  const last = messages.pop();
  const content = last?.content ?? "";
  const prompt = byId("prompt");
  if (!prompt.value) prompt.value = typeof content === "string" ? content : content.find((part) => part.type === "text").text;
}

function busy(now) {
  byId("send").hidden = now;
  byId("stop").hidden = !now;
  log.setAttribute("aria-busy", String(now));
}

async function send() {
  const prompt = byId("prompt");
  const text = prompt.value.trim();
  if (running || !(text || pictures.length)) return;
  try {
    schema();
  } catch {
    return;
  }
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  messages.push({ role: "user", content: parts.length ? [...parts, { type: "text", text }] : text });
  addUser(text, pictures);
  prompt.value = "";
  pictures = [];
  showPictures();
  await answer();
  prompt.focus();
}

// --- images

function showPictures() {
  byId("pictures").replaceChildren(...pictures.map((address, i) => {
    const made = document.createElement("button");
    made.type = "button";
    made.title = "Remove this image";
    const image = document.createElement("img");
    image.src = address;
    image.alt = "image to send; press to remove";
    made.append(image);
    made.addEventListener("click", () => { pictures.splice(i, 1); showPictures(); });
    return made;
  }));
}

function addFiles(files) {
  if (!takesImages) return;
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.addEventListener("load", () => { pictures.push(reader.result); showPictures(); });
    reader.readAsDataURL(file);
  }
}

function allowImages(allowed) {
  takesImages = allowed;
  byId("file").disabled = !allowed;
  const attach = byId("attach");
  attach.setAttribute("aria-disabled", String(!allowed));
  attach.title = allowed ? "Add an image, drop one here, or paste one" : "This model takes no images";
}

// --- page

const THEMES = ["auto", "light", "dark"];

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  const button = byId("theme");
  button.textContent = name;
  button.setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system has them" : name}`);
  localStorage.setItem("phloem-theme", name);
}

async function greet() {
  try {
    const info = await get("/model_info");
    modelName = info.served_model_name;
    byId("model").textContent = info.served_model_name;
    document.title = `Phloem: ${info.served_model_name}`;
    allowImages(Boolean(info.has_image_understanding));
    if (info.pictures) open(info.pictures);
    else if (!info.is_generation) setTimeout(greet, 2000); // it may draw: that is known when it is ready
  } catch { /* the live view tells what is wrong */ }
}

byId("compose").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
byId("stop").addEventListener("click", () => running?.abort());
byId("fresh").addEventListener("click", () => {
  running?.abort();
  messages = [];
  for (const turn of log.querySelectorAll(".turn")) turn.remove();
  byId("empty").hidden = false;
  byId("used").textContent = "";
  byId("prompt").focus();
});
byId("schema").addEventListener("change", () => { try { schema(); } catch { /* it is shown */ } });
byId("file").addEventListener("change", (event) => { addFiles(event.target.files); event.target.value = ""; });
for (const kind of ["dragenter", "dragover"]) {
  byId("compose").addEventListener(kind, (event) => {
    event.preventDefault();
    byId("compose").classList.toggle("over", takesImages);
  });
}
for (const kind of ["dragleave", "drop"]) {
  byId("compose").addEventListener(kind, (event) => {
    event.preventDefault();
    byId("compose").classList.remove("over");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
}
byId("prompt").addEventListener("paste", (event) => {
  if (!takesImages || !event.clipboardData.files.length) return;
  event.preventDefault();
  addFiles(event.clipboardData.files);
});
byId("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(byId("theme").textContent) + 1) % THEMES.length]);
});
byId("key-box").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("key").value = "";
  byId("key-box").hidden = true;
  greet();
  look();
  byId("prompt").focus();
});
events.addEventListener("unauthorized", () => {
  if (!byId("key-box").hidden) return;
  byId("key-box").hidden = false;
  byId("key").focus();
});
setTheme(THEMES.includes(localStorage.getItem("phloem-theme")) ? localStorage.getItem("phloem-theme") : "auto");
greet();
start();
