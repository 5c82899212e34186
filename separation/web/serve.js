"use strict";
const options = JSON.parse(document.getElementById("options").textContent);
const ACTIVE_MS = 500, IDLE_MS = 5000; // between status requests: while a song is in progress, and afterwards
const LISTEN = "stems.html", ZIP = "stems.zip", MORE = "more", RECIPES = "recipes";
const PROJECT = ".rpp", STEM_FILE = ".stem.mp4"; // ends of names
// Paths of the icons beside a song's state, which colour alone would not tell apart.
const ICONS = { done: "M2 8.5 6 13 14 3", failed: "M8 2v7M8 13v.5", cancelled: "M3 3l10 10M13 3 3 13", other: "M8 4v4l3 2M8 1a7 7 0 1 0 .01 0" };
const find = selector => document.querySelector(selector);
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

/** The server refused a request and said why. (If it does not respond at all, `fetch` throws a TypeError.) */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(method, path, body, signal) {
  const response = await fetch(path, { method, body, signal, headers: method === "GET" ? {} : { "X-Separation": "page" } });
  find("#lost").hidden = true;
  if (!response.ok) throw new Refusal(response.status, await response.text());
  return response.json();
}

function lost() {
  find("#lost").textContent = "The server does not respond. If it was stopped, start it again with “python -m separation serve”: "
    + "this page reconnects by itself, and songs that have arrived go on.";
  find("#lost").hidden = false;
}

function pause(milliseconds) {
  return new Promise(resolve => { setTimeout(resolve, milliseconds); });
}

/** A time that is left, in words that do not pretend to be exact. */
function about(left) {
  if (left >= 5400) return `about ${+(left / 3600).toFixed(1)} hours`;
  if (left >= 90) return `about ${Math.round(left / 60)} minutes`;
  if (left >= 50) return "about a minute";
  return left > 8 ? `about ${Math.ceil(left / 10) * 10} s` : "a few seconds";
}

/** The seconds that are left until something, from estimates that change. */
class Countdown {
  end = null; // in the time of performance.now()
  shown = Infinity;

  /** The estimate to show; null if there is none. */
  update(left) {
    if (left === null || left === undefined) {
      this.end = null;
      return null;
    }
    const now = performance.now() / 1000, estimate = now + left;
    const differs = this.end === null || Math.abs(estimate - this.end) > 0.5 * Math.max(10, this.end - now);
    this.end = differs ? estimate : this.end + 0.2 * (estimate - this.end);
    const rest = Math.max(0, this.end - now);
    if (rest < this.shown || rest > this.shown * 1.3 + 5) this.shown = rest; // small steps back would only confuse
    return this.shown;
  }
}

/** The card of a song. `id` is the song's id on the server, or null if the server does not have it. `at` is the time in
milliseconds, which orders the cards. `order` is what is wanted, and `title` is that in words. */
class Card {
  state = "";
  unsent = false; // its file has not arrived, and only this page has it
  sending = new AbortController();
  asking = null; // stops the making of its video
  left = new Countdown();

  constructor({ id = null, at, name, order, title }) {
    Object.assign(this, { id, at, name, order, title });
    this.element = find("template").content.cloneNode(true).firstElementChild;
    this.part("h3").textContent = name;
    this.part("small").textContent = title;
    this.part("progress").setAttribute("aria-label", `Progress of ${name}`);
    this.part("button").onclick = () => this.dismiss();
    this.part(".video select").setAttribute("aria-label", `Video with: sound of ${name}`);
    this.part(".video button").onclick = () => this.saveVideo();
    this.element.card = this;
    this.show({ state: "new", share: 0, files: {} });
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  get finished() {
    return ["done", "failed", "cancelled"].includes(this.state);
  }

  async send(file) {
    try {
      if (!await this.announce({ bytes: file.size })) return;
      await ask("PUT", `/songs/${this.id}`, file, this.sending.signal);
    } catch (error) {
      if (this.finished) return;
      if (error instanceof Refusal && !this.id) return this.fail(error.message);
      await this.refresh(); // browsers ignore responses that arrive mid-upload: ask why it failed
      if (this.finished || !find("#lost").hidden) return;
      this.fail(`“${this.name}” could not be read or sent: choose the file again. Folders do not work.`);
      this.remove();
    }
  }

  /** Separate a song whose file is on the server already, as that of the song `id`. */
  async sendAgain(id) {
    try {
      await this.announce({ again: id });
    } catch (error) {
      this.fail(error.message);
    }
  }

  /** Announce the song until the server takes it. Returns false if it was cancelled meanwhile. */
  async announce(file) {
    while (!this.id) {
      if (this.finished) return false;
      this.id = await this.tryToAnnounce(file);
      if (this.id && this.finished) this.remove(); // cancelled during the announcement
    }
    const { id, at, name, order, title } = this; // restored when the page is loaded again
    localStorage.setItem(`song ${id}`, JSON.stringify({ id, at, name, order, title }));
    poll();
    return true;
  }

  /** The song's new id; waits and returns null if the server's queue is full or the server does not respond. */
  async tryToAnnounce(file) {
    try {
      return (await ask("POST", "/songs", JSON.stringify({ ...this.order, name: this.name, ...file }))).id;
    } catch (error) {
      if (error instanceof Refusal && error.status !== 503) throw error;
      if (!(error instanceof Refusal)) lost();
      await pause(1000);
      return null;
    }
  }

  /** Show the song's state on the server. */
  async refresh() {
    try {
      this.show(await ask("GET", `/songs/${this.id}`));
    } catch (error) {
      if (!(error instanceof Refusal)) return lost();
      this.forget();
      this.fail("This song is no longer on the server: send it again.");
    }
  }

  fail(problem) {
    this.show({ state: "failed", problem, files: {} });
  }

  /** Cancel the song, or remove its card if it is finished. */
  dismiss() {
    this.sending.abort();
    this.remove();
    if (!this.finished) return this.show({ state: "cancelled", files: {} });
    const next = this.element.nextElementSibling ?? this.element.previousElementSibling;
    this.element.remove();
    (next?.card.part("button") ?? find("#files")).focus();
    listed();
  }

  /** Remove the song from the server, which may have removed it already. */
  remove() {
    if (this.id) ask("DELETE", `/songs/${this.id}`).catch(error => { if (!(error instanceof Refusal)) lost(); });
    this.forget();
  }

  forget() {
    localStorage.removeItem(`song ${this.id}`);
    this.id = null;
  }

  show({ state, share, stage, problem, ahead, left, files, again = null, video = [], analysis }) {
    const percent = `${Math.floor(share * 100)}%`, before = this.state, songs = ahead === 1 ? "1 song" : `${ahead} songs`;
    if (state !== before) this.left = new Countdown();
    const rest = this.left.update(left), time = rest === null ? "" : about(rest);
    this.state = state;
    this.text = {
      new: "Waiting to upload",
      announced: "Uploading",
      receiving: `Uploading, ${percent}`,
      waiting: ahead ? `Waiting: ${songs} ahead${time && `, starts in ${time}`}` : "Up next",
      separating: `${stage || "Starting"}, ${percent}${time && `, ${time} left`}`,
      done: "Done",
      failed: problem,
      cancelled: "Cancelled",
    }[state];
    this.element.className = state;
    const { tempo_bpm: tempo, key } = analysis ?? {}, facts = [...tempo ? [`${tempo.toFixed(1)} BPM`] : [], ...key ? [key.replace("#", "♯").replace(/^(.)b/, "$1♭")] : []];
    this.part(".state span").textContent = [this.text, ...state === "done" ? facts : []].join(" · ");
    this.part(".state path").setAttribute("d", ICONS[state] ?? ICONS.other);
    this.part(".note").textContent = state === "done" && problem || "";
    this.part("progress").hidden = this.finished;
    this.part("progress").value = ["receiving", "separating"].includes(state) ? share : 0;
    const verb = this.finished ? "Remove" : "Cancel";
    this.part(".dismiss").textContent = verb;
    this.part(".dismiss").setAttribute("aria-label", `${verb} ${this.name}`);
    this.showFiles(files, again);
    this.showVideo(video);
    if (state !== before && (this.finished || state === "separating")) {
      find("#announcement").textContent = `${this.name}: ${state === "separating" ? "separating" : this.text} ${this.part(".note").textContent}`.trim();
    }
  }

  showFiles(files, again) {
    const names = Object.keys(files), shown = `${names} ${again}`, button = (text, onclick) => make("button", { type: "button", onclick, ariaLabel: `${text}: ${this.name}` }, text);
    if (shown === this.files) return;
    this.files = shown;
    const stems = names.filter(name => name !== LISTEN && !name.endsWith(PROJECT));
    const sum = names.reduce((total, name) => total + (name === LISTEN ? 0 : files[name]), 0);
    const all = names.some(name => name.endsWith(PROJECT)) ? "REAPER project as zip" : "all as zip";
    this.part(".files").replaceChildren(...[
      ...names.filter(name => name === LISTEN).map(name => this.link(name, "Listen", `Listen to ${this.name}`, "first")),
      ...again === "whole" ? [button("Separate the whole song", () => this.whole())] : [],
      ...again === "rest" ? [button("Use what is there", () => this.rest())] : [],
      ...stems.map(name => this.download(name, name.endsWith(STEM_FILE) ? "stem file" : name.replace(/\.[^.]*$/, ""), files[name])),
      ...stems.length && !stems[0].endsWith(STEM_FILE) ? [this.download(ZIP, all, sum)] : [],
    ]);
  }

  /** Separate the rest of a song of which this is a part. */
  whole() {
    const { part: _, ...order } = this.order;
    this.again(order, element => find("ol").prepend(element));
  }

  /** Separate what is there of a damaged song. Its new card takes the place of this one. */
  async rest() {
    const card = await this.again({ ...this.order, accept_damaged: true }, element => this.element.replaceWith(element));
    if (card.id) this.remove();
    else card.element.after(this.element);
  }

  /** Order the file of this song again. `place` puts the new card's element on the page. Returns the card once it has an id, or
  there is no order. */
  async again(order, place) {
    const card = new Card({ at: Date.now(), name: this.name, order, title: titleOf(order) });
    place(card.element);
    listed();
    card.part("button").focus();
    await card.sendAgain(this.id);
    return card;
  }

  /** Offer the sounds that the song's video can have: a stem, or all others. */
  showVideo(stems) {
    const query = chosen => `${new URLSearchParams(chosen.map(stem => [stem, 1]))}`;
    const others = stems.length > 2 ? stems.map(stem => [query(stems.filter(other => other !== stem)), `all but ${words(stem)}`]) : [];
    if (this.part(".video").hidden) fill(this.part(".video select"), [...stems.map(stem => [query([stem]), words(stem)]), ...others], query(["instrumental"]));
    this.part(".video").hidden = !stems.length;
    if (!this.asking) this.labelVideo("Save video");
  }

  labelVideo(text) {
    if (this.videoText === text) return;
    this.videoText = text;
    this.part(".video button").replaceChildren(text, make("span", { className: "unseen" }, ` of ${this.name}`));
  }

  /** Save the video with the chosen sound; a second click cancels that. */
  async saveVideo() {
    if (this.asking) return this.asking.abort();
    const say = text => { this.part(".video p").textContent = text; };
    this.asking = new AbortController();
    say("");
    this.labelVideo("Making the video: cancel");
    try {
      const file = await fetched(`/songs/${this.id}/video?${this.part(".video select").value}`, this.asking.signal, share => this.labelVideo(`Cancel (${Math.floor(100 * share)} %)`));
      saveAs(file, file.name);
      say(`The video is ready: ${file.name}`);
    } catch (error) {
      if (error instanceof TypeError) lost();
      else if (error.name !== "AbortError") say(`No video: ${error.message}`);
    }
    this.asking = null;
    this.labelVideo("Save video");
  }

  link(name, text, ariaLabel = null, className = "") {
    return make("a", { href: `/songs/${this.id}/${encodeURIComponent(name)}`, ariaLabel, className }, text);
  }

  download(name, text, bytes) {
    const link = Object.assign(this.link(name, ""), { download: "" }); // else a browser takes the click for leaving the page
    const hidden = words => make("span", { className: "unseen" }, words);
    link.append(make("span", { ariaHidden: "true" }, "↓\u00a0"), hidden("Download "), text, make("small", {}, size(bytes)), hidden(` of ${this.name}`));
    return link;
  }
}

/** All cards on the page, newest first. */
function cards() {
  return [...find("ol").children].map(element => element.card);
}

/** Show the list if there are songs in it. */
function listed() {
  find("#songs").hidden = !find("ol").children.length;
}

function size(bytes) {
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

async function poll() {
  clearTimeout(poll.next);
  const round = poll.round = {};
  await Promise.all(cards().filter(card => card.id).map(card => card.refresh()));
  if (round !== poll.round) return; // another round has started meanwhile
  const pending = cards().filter(card => card.id && !card.finished);
  document.title = pending.length ? `${pending.at(-1).text} · ${pending.at(-1).name}` : "Stems";
  if (cards().some(card => card.id)) poll.next = setTimeout(poll, pending.length ? ACTIVE_MS : IDLE_MS);
}

// ------------------------------------------------------------------------------------------------ what is wanted

/** All offers, by the text of their orders. */
const OFFERS = Object.fromEntries([
  ...options.presets, ...options.recipes, ...Object.values(options.tasks).flatMap(task => task.models),
].map(offer => [JSON.stringify(offer.order), offer]));

function words(stem) {
  return stem.replaceAll("_", " ");
}

/** An order in words, for its card. */
function titleOf({ part, format, channels, accept_damaged: rest, ...order }) {
  const { recipe, stems, model } = order, offer = OFFERS[JSON.stringify(model ? { model } : { recipe, stems })];
  const extent = Array.isArray(part) ? [`${clock(part[0])} to ${part[1] === null ? "the end" : clock(part[1])}`] : part ? ["the loudest half minute"] : [];
  const mono = { mono: ["mono"], source: ["channels as in the song"] }[channels] ?? [];
  return [offer ? offer.title : model ?? `${recipe}, ${stems}`, ...extent, options.formats[format]?.title ?? format, ...mono, ...rest ? ["what is there"] : []].join(" · ");
}

function fill(select, values, wanted) {
  select.replaceChildren(...values.map(([value, text]) => make("option", { value, textContent: text })));
  if (values.some(([value]) => value === wanted)) select.value = wanted;
}

/** Offer the formats that can hold so many stems. */
function fillFormats(count) {
  const format = find("#format"), before = format.value;
  for (const option of format.options) {
    const { title, stems } = options.formats[option.value];
    option.disabled = stems !== null && stems !== count;
    option.textContent = option.disabled ? `${title}: needs ${stems} stems` : title;
  }
  if (format.selectedOptions[0]?.disabled) format.selectedIndex = 0;
  if (format.value !== before) find("#announcement").textContent = `Format: ${format.selectedOptions[0].textContent}`;
}

/** Offer mono if the chosen format can be mono. */
function fillChannels() {
  const channels = find("#channels"), { stereo } = options.formats[find("#format").value];
  for (const option of channels.options) option.disabled = stereo && option.value !== "stereo";
  if (channels.selectedOptions[0].disabled) {
    channels.value = "stereo";
    find("#announcement").textContent = "Channels: Stereo";
  }
}

function radio(value, title, hint) {
  const input = make("input", { type: "radio", name: "wanted", value });
  return make("label", { className: "card" }, input, make("b", {}, title), make("small", {}, hint));
}

/** The offers of a task, as options of a select. */
function offersOf(task) {
  if (task === RECIPES) return options.recipes.map(({ order, title, stems }) => [JSON.stringify(order), `${title} (${stems.map(words).join(", ")})`]);
  return options.tasks[task].models.map(({ order, title, models: [name] }) => {
    const { author } = options.facts[name];
    return [JSON.stringify(order), author ? `${title} (${author})` : title];
  });
}

function wanted() {
  const { value } = find("[name=wanted]:checked");
  return value === MORE ? find("#model").value : value;
}

function row(title, ...texts) {
  return [make("dt", {}, title), ...texts.map(text => make("dd", {}, text))];
}

/** What is known about the chosen offer: its stems, quality, licence and download. */
function describe({ stems, models, bytes, missing, by_hand: byHand }) {
  const facts = models.map(name => options.facts[name]), alone = facts.length === 1;
  const named = key => facts.map(fact => alone ? fact[key] : `${fact.title}: ${fact[key]}`);
  const same = new Set(facts.map(({ licence, licence_source: source }) => `${licence}${source ? ` (${source})` : ""}`));
  const licences = same.size === 1 ? [...same] : facts.map(({ title, licence, licence_source: source }) => `${title}: ${licence}${source ? ` (${source})` : ""}`);
  const total = bytes ? `, ${size(bytes)}` : "";
  const download = missing === 0 ? `downloaded${total}` : byHand ? "not here, and must be put into the weights folder by hand"
    : missing ? `${size(missing)}, once, before the first song` : "needed before the first song; its size is not known";
  find("#about dl").replaceChildren(
    ...row("Stems", stems.map(words).join(", ")),
    ...row(alone ? "Model" : "Models", facts.map(({ title, author }) => author ? `${title} by ${author}` : title).join(", ")),
    ...row("Quality", ...named("quality")),
    ...row("Licence", ...licences),
    ...row("Weights", download),
  );
  const free = facts.filter(fact => fact.licence_class === "non-commercial").map(({ title }) => title);
  find("#warnings").textContent = [
    free.length && `⚠ Not for commercial use: the licence of ${free.join(" and ")} forbids it.`,
    ...facts.filter(({ warning }) => warning).map(({ warning }) => `⚠ ${warning.replace(/\.?$/, ".")}`),
  ].filter(Boolean).join(" ");
}

/** Show what is chosen, and remember it. */
function changed() {
  const more = find("[name=wanted]:checked").value === MORE;
  find("#more").hidden = !more;
  describe(OFFERS[wanted()]);
  fillFormats(OFFERS[wanted()].stems.length);
  fillChannels();
  showStart();
  localStorage.setItem("choice", JSON.stringify({
    wanted: find("[name=wanted]:checked").value, task: find("#task").value, model: find("#model").value, format: find("#format").value,
    channels: find("#channels").value,
  }));
}

function showStart() {
  find("#start").disabled = !files.length || Boolean(region.problem);
  const part = region.order, times = Array.isArray(part) ? part.map(time => time === null ? "the end" : clock(time)) : null;
  find("#start").textContent = files.length > 1 ? `Separate ${files.length} songs`
    : times && !region.problem ? `Separate ${times.join(" to ")}` : part === "preview" ? "Separate the loudest half minute" : "Separate";
}

function choose(list) {
  files = [...list];
  const bytes = files.reduce((sum, file) => sum + file.size, 0);
  const what = files.length === 1 ? files[0].name : `${files.length} files`;
  find("#chosen").textContent = files.length ? `${what}, ${size(bytes)}` : "";
  find("#choices").hidden = !files.length;
  if (files.length === 1) region.open(files[0]);
  else region.close();
  showStart();
  if (files.length > 1) find("#start").focus();
}

let files = []; // chosen but not sent yet
const region = new Region(options.preview, () => showStart());
const before = { format: "wav", channels: "stereo", ...JSON.parse(localStorage.getItem("choice")) };
find("#presets").append(
  ...options.presets.map(({ order, title, hint }) => radio(JSON.stringify(order), title, hint)),
  radio(MORE, "More", `${Object.keys(options.facts).length} models for ${Object.keys(options.tasks).length} tasks`),
);
(find(`[name=wanted][value="${CSS.escape(before.wanted ?? "")}"]`) ?? find("[name=wanted]")).checked = true;
const tasks = Object.entries(options.tasks).map(([task, { title }]) => [task, task ? `${words(task)}: ${title}` : title]);
fill(find("#task"), [[RECIPES, "several tasks: recipes"], ...tasks], before.task);
fill(find("#model"), offersOf(find("#task").value), before.model);
fill(find("#format"), Object.entries(options.formats).map(([name, { title }]) => [name, title]), before.format);
find("#channels").value = before.channels;
changed();
const kept = Object.keys(localStorage).filter(key => key.startsWith("song ")).map(key => JSON.parse(localStorage.getItem(key)));
find("ol").append(...kept.filter(({ order }) => order).sort((one, other) => other.at - one.at).map(song => new Card(song).element));
listed();
const hours = options.seconds / 3600;
find("#limits").textContent = `WAV, FLAC, MP3 and OGG; M4A and video if ffmpeg is installed. Up to ${size(options.mib * 2 ** 20)} and `
  + `${hours >= 1 ? `${+hours.toFixed(1)} hours` : `${+(hours * 60).toFixed(1)} minutes`} per song. `
  + `Stems are kept for ${options.keep / 3600} hours after their last download.`;

find("#wanted").onchange = changed;
find("#task").onchange = () => fill(find("#model"), offersOf(find("#task").value)); // then #wanted gets the event
find("#format").onchange = find("#channels").onchange = changed;
find("#files").onchange = event => {
  choose(event.target.files);
  event.target.value = ""; // lets the user choose the same file again
};
find("form").onsubmit = async event => {
  event.preventDefault();
  const order = { ...OFFERS[wanted()].order, format: find("#format").value, channels: find("#channels").value, part: region.order };
  if (region.length !== null) order.seconds = region.length;
  const title = titleOf(order);
  const queue = files.map((file, index) => [new Card({ at: Date.now() - index, name: file.name, order, title }), file]);
  for (const [card] of queue) card.unsent = true;
  find("ol").prepend(...queue.map(([card]) => card.element));
  listed();
  choose([]);
  find("#files").focus({ preventScroll: true });
  queue[0][0].element.scrollIntoView({ block: "nearest" });
  for (const [card, file] of queue) {
    await card.send(file);
    card.unsent = false;
  }
};
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, event => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
  });
}
addEventListener("drop", event => choose(event.dataTransfer.files));
addEventListener("pageshow", poll);
addEventListener("beforeunload", event => { // files that have not arrived would be lost
  if (cards().some(card => card.unsent && !card.finished)) event.preventDefault();
});
