const SHORTEST = Math.round(0.1 * song.rate); // samples of a loop
const FED = 1 << 14; // samples of the song that are stretched at once
const MARGIN = 1 << 13; // samples before a position that the stretcher needs
const TONICS = {
  major: ["C", "D♭", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B"],
  minor: ["C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "G♯", "A", "B♭", "B"],
};
const LOOP_FIELDS = ["from", "to"].map(id => document.getElementById(id));

/** The sound of the tracks at another tempo (1 is as it was) and pitch, which a worker computes: stretch.js. */
class StretchedSound extends Sound {
  semitones = 0;
  worker = null; // created when it is needed
  waiting = []; // what to call with its answers, in order

  pieces(tracks, from, to, lead) {
    return this.tempo === 1 && this.semitones === 0 ? super.pieces(tracks, from, to, lead) : this.stretched(tracks, from, to, lead);
  }

  /** Like `pieces`, with the lead in samples of what comes out. */
  async *stretched(tracks, from, to, lead) {
    const { tempo } = this, total = Math.round((to - from) / tempo);
    let next = Math.round(from - lead * tempo) - MARGIN; // sample of the song for the worker
    this.start({ tempo, pitch: 2 ** (this.semitones / 12), origin: MARGIN });
    let channels = tracks.flatMap(() => [new Float32Array(0), new Float32Array(0)]);
    for (let done = 0; done < total; next += FED) {
      const more = await this.process(await this.read(tracks, next, next + FED));
      channels = channels.map((samples, i) => joined(samples, more[i]));
      let length = Math.min(channels[0].length - lead, total - done);
      if (done + length < total) length = Math.min(length, total - done - LEAD);
      if (length < LEAD && done + length < total) continue; // no piece is shorter than a fade
      yield { at: from + done * tempo, channels: channels.map(samples => samples.slice(0, lead + length)) };
      channels = channels.map(samples => samples.slice(length));
      done += length;
    }
  }

  /** Begin anew, with these settings. */
  start(settings) {
    if (!this.worker) {
      const code = new Blob([document.getElementById("stretch").textContent], { type: "text/javascript" });
      this.worker = new Worker(URL.createObjectURL(code));
      this.worker.onmessage = ({ data }) => this.waiting.shift()(data);
      this.failure = new Promise((_, reject) => {
        this.worker.onerror = ({ message }) => reject(new Error(message ?? "no worker starts, which tempo and pitch need"));
      });
    }
    this.worker.postMessage({ settings });
  }

  process(channels) {
    this.worker.postMessage({ channels }, channels.map(samples => samples.buffer));
    return Promise.race([this.failure, new Promise(resolve => this.waiting.push(resolve))]);
  }

  end() {
    this.worker?.terminate();
  }
}

function joined(first, second) {
  const whole = new Float32Array(first.length + second.length);
  whole.set(first);
  whole.set(second, first.length);
  return whole;
}

/** A WAV file of what the player plays now: its levels, its loop, its tempo and pitch. It is made in parts, so that no whole
song is in memory, and from sound of its own, so that the player goes on. `progress` gets shares. */
class Mixdown {
  static what = "mix";
  static quality = "as WAV, from MP3";
  name = `${song.title} mix.wav`; // of the file
  isCancelled = false;

  constructor(player, progress) {
    this.progress = progress;
    this.levels = player.tracks.map(track => player.level(track));
    this.sound = new StretchedSound();
    ({ tempo: this.sound.tempo, semitones: this.sound.semitones } = player.sound);
    ({ start: this.start, end: this.end } = player.loop ?? { start: 0, end: this.sound.total });
  }

  cancel() {
    this.isCancelled = true;
  }

  /** The file, or null if cancelled. */
  async file() {
    try {
      let mix = await this.rendered(Int16Array, 1, 0);
      if (mix?.peak > 1) mix = await this.rendered(Int16Array, 1 / mix.peak, 0.5); // louder than a file can be: again, quieter
      return mix && new Blob([wavHeader(mix.length, song.rate), ...mix.parts], { type: "audio/wav" });
    } finally {
      this.sound.end();
    }
  }

  /** What has to change before there can be a file, in words; empty if nothing. */
  static refusal({ tracks }) {
    return tracks.some(track => player.level(track)) ? "" : `No track is audible: unmute one to save a ${this.what}.`;
  }

  /** Why there is no file, in words. */
  problem(error) {
    return `This browser cannot make the mix: ${error.message}`;
  }

  /** The parts of the file, as an Int16Array or a Float32Array each, its length in samples, and the largest sample. Null if
  cancelled. */
  async rendered(Samples, gain, done) {
    const tracks = this.levels.flatMap((level, index) => level ? [index] : []), isFloat = Samples === Float32Array;
    const parts = [];
    let length = 0, peak = 0;
    for await (const { at, channels } of this.sound.pieces(tracks, this.start, this.end, 0)) {
      if (this.isCancelled) return null;
      this.progress(Math.max(done, (at - this.start) / (this.end - this.start)));
      const samples = new Samples(2 * channels[0].length);
      for (let i = 0; i < samples.length; i++) {
        const mixed = tracks.reduce((sum, index, j) => sum + this.levels[index] * channels[2 * j + i % 2][i >> 1], 0);
        peak = Math.max(peak, Math.abs(mixed));
        samples[i] = isFloat ? gain * mixed : Math.round(32767 * Math.max(-1, Math.min(1, gain * mixed)));
      }
      parts.push(new Blob([samples])); // which the browser may keep on disk
      length += channels[0].length;
    }
    return { parts, length, peak };
  }
}

/** The head of a WAV file with so many samples of two channels, in 16 bits or as 32-bit floats. */
function wavHeader(length, rate, isFloat = false) {
  const header = new DataView(new ArrayBuffer(44)), size = isFloat ? 8 : 4, bytes = size * length;
  const words = [[0, "RIFF"], [8, "WAVE"], [12, "fmt "], [36, "data"]];
  for (const [at, word] of words) [...word].forEach((letter, i) => header.setUint8(at + i, letter.charCodeAt(0)));
  const numbers = [[4, 36 + bytes], [16, 16], [24, rate], [28, size * rate], [40, bytes]];
  for (const [at, number] of numbers) header.setUint32(at, number, true);
  for (const [at, number] of [[20, isFloat ? 3 : 1], [22, 2], [32, size], [34, 4 * size]]) header.setUint16(at, number, true);
  return header;
}

/** Seconds from text such as 83, 1:23 or 1:23.4; null if it is none. */
function secondsFrom(text) {
  const match = /^\s*(?:(\d+):)?(\d+(?:[.,]\d*)?)\s*$/.exec(text);
  return match && 60 * (match[1] ?? 0) + Number(match[2].replace(",", "."));
}

/** Repeat from one position to another, in seconds and in any order. */
function setLoop(first, second) {
  const [start, end] = [first, second].sort((a, b) => a - b).map(each => Math.round(each * song.rate));
  const last = Math.min(Math.max(end, start + SHORTEST), player.sound.total);
  player.repeat({ start: Math.max(0, Math.min(start, last - SHORTEST)), end: last });
}

function loopSeconds() {
  return player.loop && [player.loop.start / song.rate, player.loop.end / song.rate];
}

/** Shows a part of the song on all lanes: the loop, or the one that is being drawn. */
function showRegion(region) {
  document.body.classList.toggle("looping", Boolean(region));
  region?.forEach((seconds, i) => document.body.style.setProperty(["--from", "--to"][i], seconds / song.seconds));
}

/** Dragging on a lane draws a loop, or moves its nearest end if it begins there. */
function drawLoops(lane) {
  let from = null, isDrawn = false;
  const seconds = event => {
    const box = lane.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * song.seconds;
  };
  lane.onpointerdown = event => {
    if (event.button || !event.isPrimary) return;
    const reach = 8 / lane.clientWidth * song.seconds, at = seconds(event);
    const grabbed = loopSeconds()?.findIndex(each => Math.abs(each - at) < reach) ?? -1;
    [from, isDrawn] = [grabbed < 0 ? at : loopSeconds()[1 - grabbed], false];
    from = { at: from, x: event.clientX };
    lane.setPointerCapture(event.pointerId);
  };
  lane.onpointermove = event => {
    if (!from) return;
    isDrawn ||= Math.abs(event.clientX - from.x) > 5;
    if (isDrawn) showRegion([from.at, seconds(event)].sort((a, b) => a - b));
  };
  lane.onpointerup = event => {
    if (from && isDrawn) setLoop(from.at, seconds(event));
    from = null;
  };
  lane.onpointercancel = () => {
    [from, isDrawn] = [null, false];
    showRegion(loopSeconds());
  };
  const seek = lane.onclick;
  lane.onclick = event => { if (!isDrawn) seek(event); };
}

/** Tempo and key, as they are on the page and as they sound now. */
function songFacts(tempo, semitones) {
  const facts = [];
  if (song.tempo !== null) {
    const bpms = tempo === 1 ? [song.tempo] : [song.tempo, song.tempo * tempo];
    facts.push(`${bpms.map(bpm => bpm.toFixed(1)).join(" → ")} BPM`);
  }
  if (song.key !== null) facts.push(transposed(semitones));
  return facts;
}

/** The song's key, and the one that is so many semitones higher, with the rest in cents. */
function transposed(semitones) {
  const [tonic, mode] = song.key.replace("#", "♯").replace(/^(.)b/, "$1♭").split(" ");
  const natural = TONICS.major.indexOf(tonic[0]), accidental = { "♯": 1, "♭": -1 }[tonic[1]] ?? 0;
  const steps = Math.round(semitones), cents = Math.round(100 * (semitones - steps));
  const moved = TONICS[mode][(natural + accidental + steps + 24) % 12];
  const keys = steps % 12 ? [tonic, moved] : [tonic];
  return keys.map(each => `${each} ${mode}`).join(" → ") + (cents ? ` ${signed(cents)} cents` : "");
}

function signed(number) {
  return `${number > 0 ? "+" : ""}${number}`.replace("-", "−");
}

/** The sliders, their fields and the facts for a tempo and a pitch. */
function showSound(tempo, semitones) {
  for (const each of document.querySelectorAll(".tempo input")) each.value = Math.round(1000 * tempo) / 10;
  for (const each of document.querySelectorAll(".pitch input")) each.value = Math.round(100 * semitones) / 100;
  document.getElementById("tempo").setAttribute("aria-valuetext", `${Math.round(1000 * tempo) / 10} percent`);
  document.getElementById("pitch").setAttribute("aria-valuetext", `${signed(semitones)} semitones`);
  const about = [clock(song.seconds), `${song.tracks.length - 1} stems`, ...songFacts(tempo, semitones)];
  document.getElementById("about").textContent = about.join(" · ");
}

function showTools() {
  const loop = loopSeconds();
  showRegion(loop);
  LOOP_FIELDS.forEach((field, i) => { field.value = loop ? clock(loop[i], 1) : ""; });
  document.getElementById("clear").disabled = !loop;
  document.getElementById("quality").textContent = mixdownFor(player).quality;
  showSound(sound.tempo, sound.semitones);
}

/** Plays at another tempo or pitch from here on. */
function change(values) {
  const { position } = player;
  Object.assign(sound, values);
  player.seek(position);
}

/** A slider and a field of the same number. While the slider moves, only what is shown changes. */
function connectNumber(name, preview, commit) {
  for (const input of document.querySelectorAll(`.${name} input`)) {
    const value = () => Math.min(Math.max(input.valueAsNumber, input.min), input.max);
    if (input.type === "range") input.oninput = () => preview(value());
    input.onchange = () => Number.isFinite(value()) ? commit(value()) : showTools();
    if (input.type === "range") input.ondblclick = () => commit(Number(input.defaultValue));
  }
}

function loopField(field, index) {
  const seconds = secondsFrom(field.value);
  if (seconds === null) return showTools();
  const ends = loopSeconds() ?? [0, song.seconds];
  ends[index] = Math.min(seconds, song.seconds);
  setLoop(...ends);
}

/** Sets or clears the loop for a key; returns whether the key was one of these. */
function toolKey(event) {
  const { position } = player, [start, end] = loopSeconds() ?? [0, song.seconds];
  if (event.key === "a") setLoop(position, position < end ? end : song.seconds);
  else if (event.key === "b") setLoop(position > start ? start : 0, position);
  else if (event.key === "x") player.repeat(null);
  else return false;
  say(player.loop ? `Loop from ${loopSeconds().map(each => clock(each, 1)).join(" to ")}` : "No loop");
  return true;
}

let mixdown = null; // the one that is being made
let mixdownFor = () => Mixdown; // a kind of Mixdown for what a player plays

/** Saves a file of a kind of Mixdown, or cancels it while it is being made. `button` does both. */
async function save(button, Kind) {
  const status = document.getElementById("status"), buttons = document.querySelectorAll(".save");
  if (mixdown) {
    mixdown.cancel();
    return;
  }
  status.textContent = Kind.refusal(player);
  if (status.textContent) return;
  const label = button.textContent;
  mixdown = new Kind(player, share => { button.textContent = `Cancel (${Math.floor(100 * share)} %)`; });
  mixdown.progress(0);
  for (const other of buttons) other.disabled = other !== button;
  try {
    const file = await mixdown.file();
    if (file) {
      saveAs(file, mixdown.name);
      status.textContent = `The ${Kind.what} is ready: ${mixdown.name}`;
    }
  } catch (error) {
    status.textContent = mixdown.problem(error);
  }
  mixdown = null;
  button.textContent = label;
  for (const other of buttons) other.disabled = false;
}

function connectTools() {
  for (const lane of document.querySelectorAll(".lane")) drawLoops(lane);
  LOOP_FIELDS.forEach((field, index) => { field.onchange = () => loopField(field, index); });
  document.getElementById("clear").onclick = () => player.repeat(null);
  connectNumber("tempo", value => showSound(value / 100, sound.semitones), value => change({ tempo: value / 100 }));
  connectNumber("pitch", value => showSound(sound.tempo, value), value => change({ semitones: value }));
  document.getElementById("save").onclick = event => save(event.currentTarget, mixdownFor(player));
}
