/** The sound of a WAV file of 32-bit floats in two channels: its only track. */
class WavSound extends StretchedSound {
  /** Find the samples in the file. */
  async open(file) {
    const header = new DataView(await file.slice(0, 1 << 16).arrayBuffer());
    const size = at => header.getUint32(at + 4, true);
    let at = 12; // the first chunk, which describes the format
    this.rate = header.getUint32(at + 12, true);
    while (header.getUint32(at) !== 0x64617461) at += 8 + size(at) + size(at) % 2; // "data"
    this.samples = file.slice(at + 8, at + 8 + size(at));
    this.total = this.samples.size / 8;
  }

  async read(tracks, from, to) {
    const first = Math.min(Math.max(from, 0), this.total), last = Math.min(Math.max(to, 0), this.total);
    const found = new Float32Array(await this.samples.slice(8 * first, 8 * last).arrayBuffer());
    return [0, 1].map(channel => {
      const samples = new Float32Array(to - from);
      for (let i = 0; i < last - first; i++) samples[first - from + i] = found[2 * i + channel];
      return samples;
    });
  }
}

const FETCHED = 0.2; // share of the progress until the server's mix is here, if it is then stretched

/** A mix of the stems' own files in 32-bit float, which the server makes. Another tempo or pitch is made of it here. */
class ServedMix extends Mixdown {
  static quality = "as WAV, from the stems";
  asking = new AbortController();

  constructor(player, progress) {
    super(player, progress);
    const levels = player.tracks.flatMap(({ name }, index) => this.levels[index] ? [[name, this.levels[index]]] : []);
    const times = player.loop ? [["start", this.start / song.rate], ["end", this.end / song.rate]] : [];
    this.isStretched = this.sound.tempo !== 1 || this.sound.semitones !== 0;
    this.url = `${song.mix}?${new URLSearchParams([...levels, ...times])}`;
    this.videoUrl = `${song.video}?${new URLSearchParams(levels)}`;
  }

  cancel() {
    super.cancel();
    this.asking.abort();
  }

  async file() {
    try {
      const file = await fetched(this.url, this.asking.signal, share => this.progress(this.isStretched ? FETCHED * share : share));
      return this.isStretched ? await this.stretched(file) : file;
    } catch (error) {
      if (this.isCancelled) return null;
      throw error;
    } finally {
      this.sound.end();
    }
  }

  /** A mix at the player's tempo and pitch; null if cancelled. */
  async stretched(file) {
    const { sound: { tempo, semitones }, progress } = this;
    this.progress = share => progress(FETCHED + (1 - FETCHED) * share);
    this.sound = Object.assign(new WavSound(), { tempo, semitones });
    await this.sound.open(file);
    Object.assign(this, { levels: [1], start: 0, end: this.sound.total });
    const mix = await this.rendered(Float32Array, 1, 0);
    return mix && new Blob([wavHeader(mix.length, this.sound.rate, true), ...mix.parts], { type: "audio/wav" });
  }

  problem(error) {
    const { what } = this.constructor;
    return error instanceof TypeError ? `The server does not respond: start it, and save the ${what} again.` : `No ${what}: ${error.message}`;
  }
}

/** The video that the song came from, whole, with the mix as its sound, which the server makes. */
class ServedVideo extends ServedMix {
  static what = "video";

  static refusal({ tracks, sound: { tempo, semitones } }) {
    if (tracks.some(({ mixture, solo }) => mixture && solo)) return "The video that you have has this sound: choose stems, not the mixture.";
    if (tempo !== 1 || semitones !== 0) return "A video keeps its tempo and pitch: set them to 100 % and 0 first.";
    return super.refusal({ tracks });
  }

  constructor(player, progress) {
    super(player, progress);
    this.isStretched = false;
    this.url = this.videoUrl;
  }

  async file() {
    const file = await super.file();
    if (file) this.name = file.name;
    return file;
  }
}

// The server has the stems, but not the mixture. A copy of this page, opened from a disk, has no server.
mixdownFor = ({ tracks }) => location.protocol === "file:" || tracks.some(({ mixture, solo }) => mixture && solo) ? Mixdown : ServedMix;

if (song.video && location.protocol !== "file:") {
  const [box, button] = ["div", "button"].map(tag => document.createElement(tag));
  Object.assign(button, { id: "save-video", className: "save", textContent: "Save video", onclick: () => save(button, ServedVideo) });
  box.append(button, " whole, with this mix");
  document.querySelector(".tools").append(box);
}
