const song = JSON.parse(document.getElementById("song").textContent);
const FADE = 0.01; // seconds; for mute, solo, volume, seeks and segment changes
const SKIP = song.skip ?? 5; // seconds that an arrow key skips

/** Plays all tracks in sync. The page holds each track as MP3 segments. At most three are decoded at a time, because a
phone cannot hold a whole decoded song. Neighbouring segments cross-fade over FADE, and each has extra sound on both sides
(`song.lead`) to absorb the decoder's delay. */
class Player {
  context = null; // created by the first play: phones allow sound only after a tap
  playing = false;
  offset = 0; // seconds; the position while paused, or at the last start
  started = null; // the context's time that corresponds to position 0; null until the first segment is ready
  run = 0; // counts starts and stops; a segment decoded for an earlier run is not played
  sources = [];
  segments = new Map(); // number -> promise of every track's buffer
  count = Math.ceil(song.seconds / song.segment);

  constructor(tracks, changed) {
    this.tracks = tracks.map(track => ({ ...track, muted: false, solo: false, volume: 1 }));
    this.changed = changed;
  }

  get position() {
    if (this.started === null) return this.offset;
    return Math.min(Math.max(this.context.currentTime - this.started, this.offset), song.seconds);
  }

  play() {
    this.connect();
    this.context.resume();
    if (this.position >= song.seconds) this.offset = 0;
    this.playing = true;
    this.start();
    this.changed();
  }

  pause() {
    this.offset = this.position;
    this.playing = false;
    this.stop();
    this.changed();
  }

  seek(seconds) {
    this.stop();
    this.offset = Math.min(Math.max(seconds, 0), song.seconds);
    if (this.playing) this.start();
    this.changed();
  }

  /** Whether a track is audible. The mixture is audible only as a solo, because the stems add up to it. */
  audible(track) {
    return track.solo || !(track.muted || track.mixture || this.tracks.some(other => other.solo));
  }

  set(track, change) {
    Object.assign(track, change);
    if (this.context) for (const each of this.tracks) this.fade(each.gain.gain, this.level(each), this.context.currentTime);
    this.changed();
  }

  level(track) {
    return this.audible(track) ? track.volume ** 2 : 0;
  }

  connect() {
    if (this.context) return;
    if (navigator.audioSession) navigator.audioSession.type = "playback"; // plays even if an iPhone's mute switch is on
    this.context = new AudioContext({ sampleRate: song.rate });
    this.output = this.context.createGain();
    this.output.connect(this.context.destination);
    for (const track of this.tracks) {
      track.gain = this.context.createGain();
      track.gain.gain.value = this.level(track);
      track.analyser = this.context.createAnalyser();
      track.gain.connect(track.analyser).connect(this.output);
    }
  }

  fade(parameter, value, at) {
    parameter.cancelScheduledValues(at);
    parameter.setTargetAtTime(value, at, FADE / 3); // exponential; 95% complete after FADE
  }

  stop() {
    this.run++;
    this.started = null;
    if (!this.context) return;
    const now = this.context.currentTime;
    this.fade(this.output.gain, 0, now);
    for (const source of this.sources) source.stop(now + 2 * FADE);
    this.sources = [];
  }

  /** Plays from `offset` to the end. Each segment is decoded while the one before it plays. */
  async start() {
    const run = ++this.run, rate = this.context.sampleRate;
    this.offset = Math.round(this.offset * rate) / rate; // on a sample, so that nothing is interpolated
    let from = this.offset; // seconds
    let before; // a promise that the previous segment has ended
    for (let number = Math.floor(from / song.segment); number < this.count; number++) {
      let buffers;
      try {
        buffers = await this.decoded(number);
      } catch (error) {
        if (run === this.run) this.fail(error);
      }
      if (run !== this.run) return;
      const end = (number + 1) * song.segment;
      const begin = number * song.segment - song.lead; // position of the buffer's first sample
      const first = this.started === null;
      let sources, ahead = 4 * FADE; // seconds from now; enough for stopped sounds to fade out
      for (let inTime = false; !inTime; ahead *= 2) {
        const now = this.context.currentTime, clock = performance.now();
        if (first || sources || this.started + from < now + FADE) { // if decoding was too slow, the song waits
          this.started = Math.round((now + ahead - from) * rate) / rate;
        }
        sources?.forEach(source => source.disconnect());
        sources = buffers.map((buffer, index) => {
          const source = new AudioBufferSourceNode(this.context, { buffer });
          source.connect(this.tracks[index].gain);
          source.start(this.started + from, from - begin, end + FADE - from);
          return source;
        });
        // If this took too long, some tracks may start later than others: schedule all of them again.
        inTime = now + (performance.now() - clock) / 1000 < this.started + from;
      }
      if (first) this.fade(this.output.gain, 1, this.started + from);
      const ended = new Promise(resolve => { sources[0].onended = resolve; });
      this.sources = [...this.sources.slice(-sources.length), ...sources];
      await before;
      [before, from] = [ended, end];
    }
    await before;
    if (run === this.run) this.finish();
  }

  /** Called at the end of the song. */
  finish() {
    this.pause();
  }

  decoded(number) {
    for (const old of this.segments.keys()) if (Math.abs(old - number) > 1) this.segments.delete(old);
    if (!this.segments.has(number)) {
      this.segments.set(number, Promise.all(this.tracks.map((_, index) => this.decode(index, number))));
    }
    return this.segments.get(number);
  }

  async decode(index, number) {
    const text = document.getElementById(`sound-${index}-${number}`).textContent;
    const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
    const buffer = await this.context.decodeAudioData(bytes.buffer);
    const length = Math.round(FADE * buffer.sampleRate);
    const rise = Math.round(song.lead * buffer.sampleRate);
    const fall = rise + Math.round(song.segment * buffer.sampleRate);
    for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
      const samples = buffer.getChannelData(channel);
      for (let i = 0; i < length; i++) {
        samples[rise + i] *= i / length;
        samples[fall + i] *= 1 - i / length; // past the end of the last segment: no effect
      }
      samples.fill(0, 0, rise); // a source may start or end one sample off, which must not be audible
      samples.fill(0, fall + length);
    }
    return buffer;
  }

  fail(error) {
    this.pause();
    document.getElementById("status").textContent = `This browser cannot play the sound: ${error.message}`;
  }
}

function clock(seconds, digits = 0) {
  const unit = 10 ** digits, whole = Math.floor(seconds * unit + 1e-6);
  return `${Math.floor(whole / unit / 60)}:${((whole / unit) % 60).toFixed(digits).padStart(digits ? digits + 3 : 2, "0")}`;
}

function outline(high, low) {
  const points = [...high.map((y, x) => `${x} ${-y}`), ...low.map((y, x) => `${x} ${-y}`).reverse()];
  return `M${points.join("L")}Z`;
}

/** The current RMS of a track's output, mixed to mono. */
function level(track, samples) {
  track.analyser.getFloatTimeDomainData(samples);
  return Math.sqrt(samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length);
}

/** Shows a track's waveform and spectrogram in its row; a click there goes to that position. */
function showPictures(row, track, name) {
  const find = selector => row.querySelector(selector);
  const [range, rms] = row.querySelectorAll(".lane path");
  find(".lane svg").setAttribute("viewBox", `0 -100 ${Math.max(1, track.high.length - 1)} 200`);
  find(".lane svg").setAttribute("aria-label", `Waveform of ${name}`);
  range.setAttribute("d", outline(track.high, track.low));
  rms.setAttribute("d", outline(track.rms, track.rms.map(y => -y)));
  find(".lane img").src = `data:image/png;base64,${track.spectrogram}`;
  find(".lane img").alt = `Spectrogram of ${name}`;
  find(".lane span").textContent = track.magnified > 1 ? `×${track.magnified}` : "";
  find(".lane").onclick = event => {
    const box = event.currentTarget.getBoundingClientRect();
    player.seek((event.clientX - box.left) / box.width * song.seconds);
  };
}

const play = document.getElementById("play");
const slider = document.getElementById("position");
let sliding = false; // while dragged, the slider shows its own position

function toggle() {
  if (play.disabled) return;
  if (player.playing) player.pause();
  else player.play();
}

function showTransport() {
  document.body.classList.toggle("playing", player.playing);
  play.setAttribute("aria-label", player.playing ? "Pause" : "Play");
  draw();
}

function draw() {
  const at = sliding ? slider.valueAsNumber : player.position;
  document.body.style.setProperty("--at", at / song.seconds);
  document.querySelector("#clock b").textContent = clock(at, 1);
  if (!sliding) slider.value = at;
  slider.setAttribute("aria-valuetext", clock(at));
  player.tracks.forEach((track, index) => {
    const decibels = player.playing ? 20 * Math.log10(level(track, views[index].samples)) : -Infinity;
    views[index].meter.style.transform = `scaleX(${Math.max(0, 1 + decibels / 60)})`;
  });
  cancelAnimationFrame(draw.next);
  if (player.playing) draw.next = requestAnimationFrame(draw);
}

/** Plays, pauses or seeks for a key; returns whether the key was one of these. */
function transportKey(event) {
  const isSlider = event.target.type === "range" && event.target !== slider;
  if (event.key === " " && event.target.tagName !== "BUTTON") toggle();
  else if (event.key === "ArrowLeft" && !isSlider) player.seek(player.position - SKIP);
  else if (event.key === "ArrowRight" && !isSlider) player.seek(player.position + SKIP);
  else if (event.key === "Home" && !isSlider) player.seek(0);
  else return false;
  return true;
}

function showSong(about) {
  document.title = song.title;
  document.querySelector("h1").textContent = song.title;
  document.getElementById("about").textContent = about;
  document.querySelector("#clock span").textContent = `/ ${clock(song.seconds, 1)}`;
  for (const tick of song.ticks) {
    const label = document.createElement("span");
    label.textContent = song.seconds < 5 ? `${+tick.toPrecision(6)} s` : clock(tick);
    label.style.left = `${100 * tick / song.seconds}%`;
    document.querySelector(".time").append(label);
  }
  play.onclick = toggle;
  slider.max = song.seconds;
  slider.oninput = () => { sliding = true; draw(); };
  slider.onchange = () => { sliding = false; player.seek(slider.valueAsNumber); };
  addEventListener("DOMContentLoaded", () => { play.disabled = false; }); // the sound comes after this script
}
