const song = JSON.parse(document.getElementById("song").textContent);
const FADE = 0.01; // seconds; for mute, solo, volume, seeks, and from a piece of sound to the next
const LEAD = Math.round(FADE * song.rate); // samples before a piece, which fade in while the piece before fades out
const PIECE = 2 * song.rate; // samples that are scheduled at once
const AHEAD = 5; // seconds that are scheduled; a busy browser then does not interrupt the sound
const KEPT = 20 * song.rate; // samples of a loop that stays in memory
const SKIP = song.skip ?? 5; // seconds that an arrow key skips

/** The decoded sound of the tracks. The page holds each as MP3 segments. At most three of a track are kept decoded, because a
phone cannot hold a whole decoded song. Neighbouring segments cross-fade over FADE, and each has extra sound on both sides
(`song.lead`) to absorb the decoder's delay. */
class Sound {
  tempo = 1; // of what `pieces` gives
  segments = new Map(); // "track-number" -> promise of a buffer, the least recently used first
  decoder = new OfflineAudioContext(2, 1, song.rate); // needs no tap, unlike an AudioContext
  size = Math.round(song.segment * song.rate); // samples of a segment
  total = Math.round(song.seconds * song.rate);

  /** Samples [from, to) of both channels of these tracks, in an array; silence outside of the song. */
  async read(tracks, from, to) {
    const channels = tracks.flatMap(() => [new Float32Array(to - from), new Float32Array(to - from)]);
    const last = Math.min(Math.ceil(to / this.size), Math.ceil(this.total / this.size)) - 1;
    for (let number = Math.max(0, Math.floor((from - LEAD) / this.size)); number <= last; number++) {
      const buffers = await Promise.all(tracks.map(index => this.decoded(index, number, 3 * tracks.length)));
      channels.forEach((samples, i) => this.add(samples, from, number, buffers[i >> 1].getChannelData(i & 1)));
    }
    return channels;
  }

  /** Add what a decoded segment has of the samples from `from` on. */
  add(samples, from, number, decoded) {
    const start = number * this.size, end = Math.min(start + this.size + LEAD, this.total);
    const offset = start - Math.round(song.lead * song.rate); // position of the segment's first decoded sample
    for (let at = Math.max(from, start); at < Math.min(from + samples.length, end); at++) {
      let gain = 1;
      if (number && at < start + LEAD) gain = (at - start) / LEAD;
      else if (at >= start + this.size) gain = 1 - (at - start - this.size) / LEAD;
      samples[at - from] += gain * decoded[at - offset];
    }
  }

  /** A segment of a track, decoded. At most `most` of all tracks are kept. */
  decoded(index, number, most) {
    const name = `${index}-${number}`, found = this.segments.get(name) ?? this.decode(name);
    this.segments.delete(name);
    this.segments.set(name, found);
    for (const oldest of this.segments.keys()) if (this.segments.size > most) this.segments.delete(oldest);
    return found;
  }

  decode(name) {
    const bytes = Uint8Array.from(atob(document.getElementById(`sound-${name}`).textContent), each => each.charCodeAt(0));
    return this.decoder.decodeAudioData(bytes.buffer);
  }

  /** Samples [from, to) of these tracks in pieces. `at` is a piece's position; the `lead` samples before it are there, too. */
  async *pieces(tracks, from, to, lead) {
    for (let at = from, end; at < to; at = end) {
      end = at + PIECE + LEAD < to ? at + PIECE : to; // no piece is shorter than a fade
      yield { at, channels: await this.read(tracks, at - lead, end) };
    }
  }
}

/** Plays all tracks in sync, and a part of them again and again if there is a loop. */
class Player {
  context = null; // created by the first play: phones allow sound only after a tap
  playing = false;
  offset = 0; // seconds; the position while paused, or at the last start
  run = 0; // counts starts and stops; sound that was made for an earlier run is not played
  scheduled = []; // pieces of sound that play or will play
  loop = null; // its start and end in samples

  constructor(tracks, sound, changed) {
    this.tracks = tracks.map(track => ({ ...track, muted: false, solo: false, volume: 1 }));
    this.sound = sound;
    this.changed = changed;
  }

  get position() {
    if (!this.scheduled.length) return this.offset;
    const now = this.context.currentTime;
    const piece = this.scheduled.findLast(each => each.time <= now) ?? this.scheduled[0];
    const played = Math.min(Math.max(now - piece.time, 0), piece.seconds) * piece.tempo;
    return Math.min(piece.at + played, song.seconds);
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

  /** Repeat a part of the song, or nothing. If the position is outside of that part, it moves to the start. */
  repeat(loop) {
    const position = this.position, at = position * song.rate;
    this.loop = loop;
    this.seek(loop && !(at >= loop.start && at < loop.end) ? loop.start / song.rate : position);
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
    if (!this.context) return;
    const now = this.context.currentTime;
    this.fade(this.output.gain, 0, now);
    for (const source of this.scheduled.flatMap(piece => piece.sources)) source.stop(now + 2 * FADE);
    this.scheduled = [];
  }

  /** Plays from `offset` to the end. Pieces are made while those before them play. */
  async start() {
    const run = ++this.run;
    let last; // the piece that was scheduled last
    try {
      for await (const piece of this.pieces()) {
        if (run !== this.run) return;
        last = this.schedule(piece, last);
        while (last.time + last.seconds - this.context.currentTime > AHEAD) {
          await this.scheduled[0].ended;
          if (run !== this.run) return;
          this.scheduled.shift();
        }
      }
    } catch (error) {
      if (run === this.run) this.fail(error);
      return;
    }
    await last.ended;
    if (run === this.run) this.pause();
  }

  /** The sound from `offset` on. In a loop, it never ends, and the pieces of a short loop are made only once. */
  async *pieces() {
    const { sound, loop } = this, all = this.tracks.map((_, index) => index);
    const from = Math.round(this.offset * song.rate);
    if (!loop || from >= loop.end) return yield* sound.pieces(all, from, sound.total + LEAD, LEAD); // silence fades out
    if (from !== loop.start) yield* sound.pieces(all, from, loop.end, LEAD);
    const kept = [];
    while (!kept.length) {
      for await (const piece of sound.pieces(all, loop.start, loop.end, LEAD)) {
        if (loop.end - loop.start <= KEPT) kept.push(piece);
        yield piece;
      }
    }
    for (;;) yield* kept;
  }

  /** Let a piece follow the one before, at a sample of the context, so that nothing is interpolated. */
  schedule(sound, before) {
    const buffers = sound.buffers ??= this.tracks.map(() => this.buffer(sound.channels.splice(0, 2)));
    let time = before && before.time + before.seconds; // of the context, when the piece starts, after its lead
    let sources, ahead = 4 * FADE; // seconds from now; enough for stopped sounds to fade out
    for (let inTime = false; !inTime; ahead *= 2) {
      const now = this.context.currentTime, clock = performance.now();
      if (!before || sources || time < now + 2 * FADE) { // if the sound was not ready in time, the song waits
        time = Math.round((now + ahead) * song.rate) / song.rate;
      }
      sources?.forEach(source => source.disconnect());
      sources = buffers.map((buffer, index) => {
        const source = new AudioBufferSourceNode(this.context, { buffer });
        source.connect(this.tracks[index].gain);
        source.start(Math.round(time * song.rate - LEAD) / song.rate);
        return source;
      });
      // If this took too long, some tracks may start later than others: schedule all of them again.
      inTime = now + (performance.now() - clock) / 1000 < time - FADE;
    }
    if (!before) this.fade(this.output.gain, 1, time - FADE);
    const ended = new Promise(resolve => { sources[0].onended = resolve; });
    const seconds = buffers[0].length / song.rate - FADE;
    const piece = { time, seconds, at: sound.at / song.rate, tempo: this.sound.tempo, sources, ended };
    this.scheduled.push(piece);
    return piece;
  }

  /** A buffer that fades in and out. */
  buffer(channels) {
    const length = channels[0].length;
    const buffer = new AudioBuffer({ length, numberOfChannels: 2, sampleRate: song.rate });
    channels.forEach((samples, channel) => {
      for (let i = 0; i < Math.min(LEAD, length); i++) {
        samples[i] *= i / LEAD;
        samples[length - 1 - i] *= (i + 1) / LEAD;
      }
      buffer.copyToChannel(samples, channel);
    });
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
  const text = `${clock(at)} of ${clock(song.seconds)}`;
  if (slider.ariaValueText !== text) slider.ariaValueText = text; // screen readers hear of each change
  player.tracks.forEach((track, index) => {
    const decibels = player.playing ? 20 * Math.log10(level(track, views[index].samples)) : -Infinity;
    views[index].meter.style.transform = `scaleX(${Math.max(0, 1 + decibels / 60)})`;
  });
  cancelAnimationFrame(draw.next);
  if (player.playing) draw.next = requestAnimationFrame(draw);
}

/** Tells screen readers what a key has done. */
function say(text) {
  document.getElementById("now").textContent = text;
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

/** Calls `act` for keys, unless a field or the browser needs them. `act` returns whether it used the key. */
function onKeys(act) {
  addEventListener("pointerup", () => { // so that keys control the player again
    if (document.activeElement?.matches("button, [type=range]")) document.activeElement.blur();
  });
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("select, textarea, input:not([type=range])")) return;
    if (act(event)) event.preventDefault();
  });
}

function showSong() {
  document.title = song.title;
  document.querySelector("h1").textContent = song.title;
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
