"use strict";
const WAVE_RATE = 16000; // hertz, of the sound that is drawn and played here: good enough to find a place in a song
const COLUMNS = 2000; // of the waveform
const SHORTEST = 1; // second
// Decoding takes the memory of the whole song as floats, so larger files get no waveform. In bytes, by suffix.
const LARGEST = { wav: 2e8, aif: 2e8, aiff: 2e8, flac: 8e7 }, LARGEST_LOSSY = 2.5e7;

/** Seconds as m:ss or h:mm:ss, with tenths if there are any. */
function clock(seconds) {
  const tenths = Math.round(seconds * 10), whole = Math.floor(tenths / 10);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const [first, ...rest] = parts[0] ? parts : parts.slice(1);
  return [first, ...rest.map(part => String(part).padStart(2, "0"))].join(":") + (tenths % 10 ? `.${tenths % 10}` : "");
}

/** The seconds that a text such as 1:20, 80, 1:02:03 or 1:20.5 stands for; null for any other text. */
function seconds(text) {
  if (!/^(\d{1,3}:){0,2}\d{1,6}([.,]\d{1,3})?$/.test(text)) return null;
  return text.replace(",", ".").split(":").reduce((sum, part) => sum * 60 + Number(part), 0);
}

/** The choice of how much of a song is wanted: on its waveform, with two sliders, or as times. `changed` is called
after each change. */
class Region {
  constructor(preview, changed) {
    Object.assign(this, { preview, changed, length: null });
    this.element = document.getElementById("region");
    this.canvas = this.part("canvas");
    for (const radio of this.element.querySelectorAll("[name=extent]")) radio.onchange = () => this.show();
    this.part("#play").onclick = () => (this.playing ? this.stop() : this.play());
    this.part("#loudest").onclick = () => this.chooseLoudest();
    for (const name of ["from", "to"]) this.part(`#${name}`).oninput = () => this.typed();
    this.part("#start-slider").oninput = ({ target }) => this.select(Number(target.value), Math.max(this.end, Number(target.value) + SHORTEST));
    this.part("#end-slider").oninput = ({ target }) => this.select(Math.min(this.start, Number(target.value) - SHORTEST), Number(target.value));
    this.canvas.onpointerdown = event => this.drag(event);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.close();
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  get isPart() {
    return !this.element.hidden && this.part("[value=part]").checked;
  }

  /** What the server is told: nothing for the whole song, `preview`, or [start, end]. */
  get order() {
    if (!this.isPart) return undefined;
    return this.isPreview ? "preview" : [this.start, this.end];
  }

  /** What is wrong with the times, or an empty text. */
  get problem() {
    if (!this.isPart || this.isPreview) return "";
    if (this.start === null) return "The start is not a time: write it as 1:20.";
    if (this.end === undefined) return "The end is not a time: write it as 1:50, or leave it empty for the end of the song.";
    if (this.end !== null && this.end <= this.start) return "The end must come after the start.";
    if (this.length !== null && this.start >= this.length) return `The song is over at ${clock(this.length)}: choose an earlier start.`;
    return "";
  }

  close() {
    this.stop();
    this.element.hidden = true;
    this.opening = null;
    this.peaks = this.energies = this.length = this.sound = null;
    this.part("[value=whole]").checked = true;
  }

  /** Offer the parts of a file, with its waveform if the browser can decode it. */
  async open(file) {
    this.close();
    const opening = this.opening = {};
    this.element.hidden = false;
    Object.assign(this, { start: 0, end: null, isPreview: true });
    this.note("Drawing the waveform …");
    this.show();
    let note = "";
    try {
      const suffix = file.name.split(".").pop().toLowerCase();
      if (file.size > (LARGEST[suffix] ?? LARGEST_LOSSY)) throw new RangeError("too large");
      const sound = await new OfflineAudioContext(1, 1, WAVE_RATE).decodeAudioData(await file.arrayBuffer());
      if (opening !== this.opening) return; // another file was chosen meanwhile
      this.measure(sound);
      this.chooseLoudest();
    } catch (error) {
      note = error instanceof RangeError ? "This file is too large to draw its waveform here."
        : "This browser cannot draw the waveform of this file; the server may still read it.";
    }
    if (opening === this.opening) {
      this.note(note);
      this.show();
    }
  }

  note(text) {
    this.part("#wave-note").textContent = text;
    this.part("#wave-note").hidden = !text;
  }

  /** Keep the sound in mono, and find its length, the largest sample of each column and the energy of each second. */
  measure(sound) {
    const channels = Array.from({ length: sound.numberOfChannels }, (_, channel) => sound.getChannelData(channel));
    const { length } = sound, column = Math.max(1, length / COLUMNS);
    this.length = sound.duration;
    this.sound = new AudioBuffer({ length, sampleRate: WAVE_RATE });
    const mono = this.sound.getChannelData(0);
    this.peaks = new Float32Array(Math.min(COLUMNS, length));
    this.energies = new Float64Array(Math.ceil(length / WAVE_RATE));
    for (const samples of channels) {
      for (let i = 0; i < length; i++) {
        const place = Math.min(this.peaks.length - 1, Math.floor(i / column)), size = Math.abs(samples[i]);
        if (size > this.peaks[place]) this.peaks[place] = size;
        this.energies[Math.floor(i / WAVE_RATE)] += size * size;
        mono[i] += samples[i] / channels.length;
      }
    }
    const loudest = this.peaks.reduce((most, peak) => Math.max(most, peak), 1e-6);
    this.peaks = this.peaks.map(peak => peak / loudest);
  }

  /** Choose the loudest half minute; if the browser does not know the song, the server finds it. */
  chooseLoudest() {
    if (!this.energies) {
      this.isPreview = true;
      this.show();
      return;
    }
    let best = 0, most = -1;
    for (let start = 0; start + this.preview <= Math.max(this.length, this.preview); start++) {
      const energy = this.energies.slice(start, start + this.preview).reduce((sum, each) => sum + each, 0);
      if (energy > most) [best, most] = [start, energy];
    }
    this.select(best, best + this.preview);
  }

  /** Play the part, in the quality that the waveform is drawn from. */
  play() {
    const context = new AudioContext(), source = new AudioBufferSourceNode(context, { buffer: this.sound });
    const playing = this.playing = { context, from: this.start };
    source.connect(context.destination);
    source.start(0, this.start, (this.end ?? this.length) - this.start);
    source.onended = () => { if (playing === this.playing) this.stop(); };
    this.part("#play").textContent = "Stop";
    const follow = () => {
      if (playing !== this.playing) return;
      this.draw();
      requestAnimationFrame(follow);
    };
    follow();
  }

  stop() {
    this.playing?.context.close();
    this.playing = null;
    this.part("#play").textContent = "Play";
    this.draw();
  }

  select(start, end) {
    const tenth = time => Math.round(time * 10) / 10;
    this.isPreview = false;
    this.start = tenth(Math.max(0, Math.min(start, this.length - SHORTEST)));
    this.end = tenth(Math.min(this.length, Math.max(end, this.start + SHORTEST)));
    this.show();
  }

  typed() {
    const [from, to] = ["#from", "#to"].map(selector => this.part(selector).value.trim());
    this.isPreview = false;
    this.start = from ? seconds(from) : 0;
    this.end = to ? seconds(to) ?? undefined : null;
    this.show(false);
  }

  /** Choose a part with a mouse, a finger or a pen. Without a movement, the part moves there. */
  drag(event) {
    const time = ({ clientX }) => {
      const box = this.canvas.getBoundingClientRect();
      return Math.max(0, Math.min(1, (clientX - box.left) / box.width)) * this.length;
    };
    const first = time(event), { end } = this, half = (Math.min(end ?? this.preview, this.length) - this.start) / 2 || this.preview / 2;
    this.canvas.setPointerCapture(event.pointerId);
    this.part("[value=part]").checked = true;
    this.canvas.onpointermove = move => {
      const last = time(move);
      if (Math.abs(last - first) > this.length / 200) this.select(Math.min(first, last), Math.max(first, last));
    };
    const before = `${this.start} ${this.end}`;
    this.canvas.onpointerup = () => {
      this.canvas.onpointermove = this.canvas.onpointerup = null;
      if (before !== `${this.start} ${this.end}`) return;
      const start = Math.max(0, Math.min(first - half, this.length - 2 * half));
      this.select(start, start + 2 * half);
    };
    this.canvas.onpointercancel = () => { this.canvas.onpointermove = this.canvas.onpointerup = null; };
    this.show();
  }

  /** Show the choice; `texts` is false while somebody types it. */
  show(texts = true) {
    const known = this.length !== null, { isPart, problem } = this;
    this.part("#part").hidden = !isPart;
    if (this.playing && (!isPart || problem || this.playing.from !== this.start)) this.stop();
    this.part("#wave").hidden = this.part("#sliders").hidden = this.part("#play").hidden = !known;
    this.part("#play").disabled = Boolean(problem);
    if (texts) {
      this.part("#from").value = this.isPreview ? "" : clock(this.start ?? 0);
      this.part("#to").value = this.isPreview || this.end === null ? "" : clock(this.end);
    }
    this.part("#from").setAttribute("aria-invalid", /start|over/.test(problem) && !/^The end/.test(problem));
    this.part("#to").setAttribute("aria-invalid", /^The end/.test(problem));
    if (known && !problem) {
      const [start, end] = [this.start, this.end ?? this.length];
      for (const [name, value] of [["#start-slider", start], ["#end-slider", end]]) {
        Object.assign(this.part(name), { max: Math.ceil(this.length * 10) / 10, value });
        this.part(name).setAttribute("aria-valuetext", clock(value));
      }
    }
    this.part("#part-note").textContent = problem || (this.isPreview
      ? "The loudest half minute, which is found when the song arrives. Or write times, such as 1:20."
      : `${clock(Math.max(0, (this.end ?? this.length ?? this.start) - this.start))} of music${known ? ` of ${clock(this.length)}` : ""}. The rest can follow, without another upload.`);
    if (!problem && !this.isPreview && this.end === null && !known) this.part("#part-note").textContent = "Up to the end of the song.";
    this.draw();
    this.changed();
  }

  draw() {
    if (!this.peaks || !this.canvas.clientWidth) return;
    const ratio = devicePixelRatio, width = Math.round(this.canvas.clientWidth * ratio), height = Math.round(this.canvas.clientHeight * ratio);
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = name => style.getPropertyValue(`--${name}`);
    const whole = !this.isPart || this.problem;
    const [start, stop] = (whole ? [0, this.length] : [this.start, this.end ?? this.length]).map(time => time / this.length * width);
    if (!whole) {
      context.fillStyle = colour("wash");
      context.fillRect(start, 0, stop - start, height);
    }
    for (let x = 0; x < width; x++) {
      const size = Math.max(1, this.peaks[Math.floor(x / width * this.peaks.length)] * height * 0.9);
      context.fillStyle = x >= start && x < stop ? colour("accent") : colour("edge");
      context.fillRect(x, (height - size) / 2, 1, size);
    }
    if (!whole) {
      context.fillStyle = colour("ink");
      const now = this.playing ? [(this.playing.from + this.playing.context.currentTime) / this.length * width] : [];
      for (const x of [start, stop - 2 * ratio, ...now]) context.fillRect(x, 0, 2 * ratio, height);
    }
  }
}
