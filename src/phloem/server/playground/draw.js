// Pictures and films: what is asked for, what is seen of it on its way, and what has been made.

import { blob, get, post, remove, stream } from "./api.js";

const byId = (id) => document.getElementById(id);
const PREVIEWS = 3; // as many as the server sends
const MOST = 10; // pictures of one request
const LOOK = 700; // milliseconds between looks at a film
let facts = null; // what the model takes
let given = null; // the picture to begin with, as a data address
let running = null; // AbortController of what is being drawn

/** Show the panel for a model that draws, in the chat's place. */
export function open(pictures) {
  if (facts) return;
  facts = pictures;
  byId("chat").hidden = true;
  byId("drawing").hidden = false;
  document.querySelector("main").classList.add("draws");
  byId("drawing-title").textContent = facts.films ? "Films" : "Pictures";
  byId("width").placeholder = facts.width;
  byId("height").placeholder = facts.height;
  for (const name of ["width", "height"]) byId(name).step = byId(name).min = facts.grid;
  byId("steps").placeholder = facts.steps;
  byId("guidance").placeholder = facts.guidance ?? "none";
  byId("count-field").hidden = facts.films;
  byId("seconds-field").hidden = !facts.films;
  byId("negative-field").hidden = !facts.negative;
  byId("given-field").hidden = !facts.pictures;
  byId("draw-prompt").focus();
}

function number(id) {
  const value = byId(id).value.trim();
  return value === "" ? null : Number(value);
}

/** Fields that pictures and films have alike; what is left empty is the model's to say. */
function request(prompt) {
  const body = { prompt };
  const named = {
    width: number("width"), height: number("height"), seed: number("draw-seed"), num_inference_steps: number("steps"),
    guidance_scale: number("guidance"), negative_prompt: byId("negative").value.trim() || null,
  };
  if (named.width !== null && named.height === null) named.height = facts.height;
  if (named.height !== null && named.width === null) named.width = facts.width;
  for (const [name, value] of Object.entries(named)) if (value !== null) body[name] = value;
  return body;
}

function make(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** A place in the gallery, the newest first. */
function frame(text) {
  byId("gallery-empty").hidden = true;
  const figure = make("figure", "drawn growing");
  const caption = make("figcaption", "", text);
  figure.append(caption);
  byId("gallery").prepend(figure);
  return { figure, caption };
}

function show(place, event) {
  let image = place.figure.querySelector("img");
  if (!image) {
    image = document.createElement("img");
    place.figure.prepend(image);
  }
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.alt = place.prompt;
}

/** What was made, how to have it, and how to have it again. */
function finish(place, address, name, seed, more) {
  place.figure.classList.remove("growing");
  const save = make("a", "button quiet", "Save");
  save.href = address;
  save.download = name;
  const again = make("button", "quiet", "Use this seed");
  again.type = "button";
  again.addEventListener("click", () => {
    byId("draw-prompt").value = place.prompt;
    byId("draw-seed").value = seed;
    byId("draw-prompt").focus();
  });
  const actions = make("span", "row");
  actions.append(save, again);
  place.caption.replaceChildren(place.prompt, make("span", "hint", `${more} · seed ${seed}`), actions);
}

function fail(places, text) {
  for (const place of places) place.figure.remove();
  const problem = make("p", "problem", text);
  problem.setAttribute("role", "alert");
  byId("gallery").prepend(problem);
}

async function pictures(prompt, signal, places) {
  const body = { ...request(prompt), n: number("count") ?? 1, stream: true, partial_images: PREVIEWS };
  if (given) body.image = given;
  const begun = performance.now();
  const route = given ? "/v1/images/edits" : "/v1/images/generations";
  for (let at = 0; at < Math.min(body.n, MOST); at += 1) places.push({ ...frame("waiting"), prompt });
  for await (const event of stream(route, body, signal)) {
    const place = places[event.index ?? 0];
    show(place, event);
    if (event.type.endsWith("completed")) {
      const seconds = ((performance.now() - begun) / 1000).toFixed(1);
      const image = place.figure.querySelector("img").src;
      finish(place, image, `phloem-${event.seed}.${event.output_format}`, event.seed, `${event.size} · ${seconds} s`);
      place.done = true;
    } else {
      place.caption.textContent = `preview ${event.partial_image_index + 1}`;
    }
  }
  if (places.some((place) => !place.done)) throw new Error("The answer ended before the picture was finished.");
}

async function film(prompt, signal, places) {
  const body = request(prompt);
  const seconds = number("seconds");
  if (seconds !== null) body.seconds = String(seconds);
  if (given) body.input_reference = { image_url: given };
  const place = { ...frame("waiting"), prompt };
  places.push(place);
  let job = await post("/v1/videos", body); // not ended by a stop: who has no id cannot delete the job
  const leave = () => remove(`/v1/videos/${job.id}`).catch(() => { /* it has gone by itself */ });
  if (signal.aborted) leave(); // while it was asked for
  signal.throwIfAborted();
  signal.addEventListener("abort", leave, { once: true });
  while (["queued", "in_progress"].includes(job.status)) {
    place.caption.textContent = job.status === "queued" ? "waiting" : `${job.progress} %`;
    await new Promise((wake) => { setTimeout(wake, LOOK); });
    signal.throwIfAborted();
    job = await get(`/v1/videos/${job.id}`);
  }
  signal.removeEventListener("abort", leave);
  if (job.status === "failed") throw new Error(job.error.message);
  const address = URL.createObjectURL(await blob(`/v1/videos/${job.id}/content`));
  const video = document.createElement("video");
  video.src = address;
  video.controls = video.loop = video.muted = true;
  place.figure.prepend(video);
  finish(place, address, `${job.id}.mp4`, job.seed, `${job.size} · ${job.seconds} s`);
  place.done = true;
}

async function draw() {
  const prompt = byId("draw-prompt").value.trim();
  if (running || !prompt) return;
  const places = [];
  running = new AbortController();
  busy(true);
  try {
    await (facts.films ? film : pictures)(prompt, running.signal, places);
  } catch (error) {
    const left = places.filter((place) => !place.done);
    if (error.name === "AbortError") for (const place of left) place.figure.remove();
    else fail(left, error.message);
  }
  running = null;
  busy(false);
  byId("gallery-empty").hidden = byId("gallery").children.length > 1;
  const count = byId("gallery").querySelectorAll("figure").length;
  byId("drawn").textContent = count ? `${count} in this tab` : "";
}

function busy(now) {
  byId("draw-send").hidden = now;
  byId("draw-stop").hidden = !now;
  byId("gallery").setAttribute("aria-busy", String(now));
}

function begin(file) {
  given = null;
  byId("given-clear").hidden = true;
  if (!file?.type.startsWith("image/")) return;
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    if (byId("given").files[0] !== file) return; // another one was chosen meanwhile
    given = reader.result;
    byId("given-clear").hidden = false;
  });
  reader.readAsDataURL(file);
}

byId("draw").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
byId("draw-prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    draw();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
byId("draw-stop").addEventListener("click", () => running?.abort());
byId("given").addEventListener("change", (event) => begin(event.target.files[0]));
byId("given-clear").addEventListener("click", () => { byId("given").value = ""; begin(null); });
byId("gallery-clear").addEventListener("click", () => {
  for (const one of byId("gallery").querySelectorAll("figure:not(.growing), .problem")) {
    const video = one.querySelector("video");
    if (video) URL.revokeObjectURL(video.src); // else the film stays in memory
    one.remove();
  }
  byId("gallery-empty").hidden = byId("gallery").children.length > 1;
  byId("drawn").textContent = "";
});
