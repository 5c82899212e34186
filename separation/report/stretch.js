"use strict";
/* Changes the tempo and the pitch of all tracks of a song, in a worker. Each message with settings starts anew; each one
with sound gets the sound that is ready in return.

The pitch changes by resampling, and the length by a phase vocoder with a fixed hop between the frames of its output. A
frame of input is compared, HOP samples earlier, with the output's last frame. In each region around a peak of the spectrum,
one rotation aligns the two best, so that tones go on without a break and the phases around a peak stay as they are
("identity phase locking": Laroche and Dolson, Improved phase vocoder time-scale modification of audio, 1999). Where the
energy rises suddenly, the phases start anew; in slower sound also only as loud as before, until the attack reaches the middle
of the frame, so that it sounds once (Röbel, A new approach to transient processing in the phase vocoder, 2003). Both channels
have the same rotation, which keeps the stereo image. */
const SIZE = 4096; // samples of a frame
const HALF = SIZE / 2;
const HOP = SIZE / 4; // between frames of the output
const PEAK = 2; // a peak is the largest of so many bins on both sides
const ATTACK = 4; // by what factor the energy of a region rises within HOP in an attack
const CROSSINGS = 24; // of the resampler's sinc, on each side
const STEPS = 512; // of the resampler's table between two crossings

/** In-place Fourier transform of SIZE complex numbers, which must be a power of four. */
class Fourier {
  cosines = Float64Array.from({ length: SIZE }, (_, i) => Math.cos(2 * Math.PI * i / SIZE));
  sines = Float64Array.from({ length: SIZE }, (_, i) => Math.sin(2 * Math.PI * i / SIZE));
  reversed = new Uint16Array(SIZE); // each index with its digits of base 4 in reverse

  constructor() {
    for (let i = 1; i < SIZE; i++) this.reversed[i] = (this.reversed[i >> 2] >> 2) + (i & 3) * SIZE / 4;
  }

  forward(real, imaginary) {
    const { cosines, sines, reversed } = this;
    for (let i = 0; i < SIZE; i++) {
      const j = reversed[i];
      if (i >= j) continue;
      const x = real[i], y = imaginary[i];
      real[i] = real[j];
      imaginary[i] = imaginary[j];
      real[j] = x;
      imaginary[j] = y;
    }
    for (let part = 1, step = SIZE / 4; part < SIZE; part *= 4, step /= 4) {
      for (let k = 0; k < part; k++) {
        const c1 = cosines[k * step], c2 = cosines[2 * k * step], c3 = cosines[3 * k * step];
        const s1 = sines[k * step], s2 = sines[2 * k * step], s3 = sines[3 * k * step];
        for (let i = k; i < SIZE; i += 4 * part) {
          const j = i + part, l = j + part, m = l + part;
          const x1 = real[j] * c1 + imaginary[j] * s1, y1 = imaginary[j] * c1 - real[j] * s1;
          const x2 = real[l] * c2 + imaginary[l] * s2, y2 = imaginary[l] * c2 - real[l] * s2;
          const x3 = real[m] * c3 + imaginary[m] * s3, y3 = imaginary[m] * c3 - real[m] * s3;
          const evenX = real[i] + x2, evenY = imaginary[i] + y2, oddX = real[i] - x2, oddY = imaginary[i] - y2;
          real[i] = evenX + x1 + x3;
          imaginary[i] = evenY + y1 + y3;
          real[j] = oddX + y1 - y3;
          imaginary[j] = oddY - x1 + x3;
          real[l] = evenX - x1 - x3;
          imaginary[l] = evenY - y1 - y3;
          real[m] = oddX - y1 + y3;
          imaginary[m] = oddY + x1 - x3;
        }
      }
    }
  }

  /** The inverse, times SIZE. */
  inverse(real, imaginary) {
    this.forward(imaginary, real);
  }
}

const fourier = new Fourier();
const hann = Float64Array.from({ length: SIZE }, (_, i) => 0.5 - 0.5 * Math.cos(2 * Math.PI * i / SIZE));

/** The spectra of both channels of a frame in one: that of left + i * right. */
class Spectrum {
  real = new Float64Array(SIZE);
  imaginary = new Float64Array(SIZE);

  of([left, right], start) {
    for (let i = 0; i < SIZE; i++) {
      this.real[i] = left[start + i] * hann[i];
      this.imaginary[i] = right[start + i] * hann[i];
    }
    fourier.forward(this.real, this.imaginary);
  }

  /** The energy of a bin, of both channels. */
  energy(bin) {
    const other = SIZE - bin & SIZE - 1;
    return this.real[bin] ** 2 + this.imaginary[bin] ** 2 + this.real[other] ** 2 + this.imaginary[other] ** 2;
  }
}

/** The output of one track: overlapping frames of both channels. */
class Vocoder {
  input = new Spectrum();
  earlier = new Spectrum(); // of the input HOP samples before
  output = new Spectrum();
  energies = new Float64Array(HALF + 1);
  borders = new Uint16Array(HALF + 2); // first bin of each region
  sums = [new Float64Array(SIZE), new Float64Array(SIZE)];
  isFirst = true;

  constructor(isSlower) {
    this.isSlower = isSlower;
  }

  /** Add the frame of input that starts at `start` to the output. Returns the HOP samples of both channels that it completes. */
  add(channels, start) {
    this.input.of(channels, start);
    if (this.isFirst) {
      this.output.real.set(this.input.real);
      this.output.imaginary.set(this.input.imaginary);
      this.isFirst = false;
    } else {
      this.earlier.of(channels, start - HOP);
      this.turn();
    }
    return this.overlap();
  }

  /** The output's next frame: each region of the input, rotated. */
  turn() {
    const { input, earlier, output, borders } = this;
    const count = this.divide();
    for (let region = 0; region < count; region++) {
      let x = 0, y = 0, rise = 0, before = 0;
      for (let bin = borders[region]; bin < borders[region + 1]; bin++) {
        const other = SIZE - bin & SIZE - 1;
        x += output.real[bin] * earlier.real[bin] + output.imaginary[bin] * earlier.imaginary[bin];
        x += output.real[other] * earlier.real[other] + output.imaginary[other] * earlier.imaginary[other];
        y += output.imaginary[bin] * earlier.real[bin] - output.real[bin] * earlier.imaginary[bin];
        y -= output.imaginary[other] * earlier.real[other] - output.real[other] * earlier.imaginary[other];
        rise += this.energies[bin];
        before += earlier.energy(bin);
      }
      const length = Math.hypot(x, y);
      let gain = 1;
      if (rise > ATTACK * before) {
        [x, y] = [length, 0];
        if (this.isSlower) gain = Math.sqrt(ATTACK * before / rise);
      }
      if (length) this.rotate(borders[region], borders[region + 1], gain * x / length, gain * y / length);
      else this.rotate(borders[region], borders[region + 1], gain, 0);
    }
  }

  /** Find the regions around the peaks of the input. They meet at the smallest bin between two peaks. Returns their number. */
  divide() {
    const { energies, borders } = this;
    for (let bin = 0; bin <= HALF; bin++) energies[bin] = this.input.energy(bin);
    let count = 0, lowest = 0;
    borders[0] = 0;
    for (let bin = 0; bin <= HALF; bin++) {
      if (energies[bin] < energies[lowest]) lowest = bin;
      let isPeak = true;
      for (let other = Math.max(0, bin - PEAK); isPeak && other <= Math.min(HALF, bin + PEAK); other++) {
        isPeak = energies[other] < energies[bin] || other === bin;
      }
      if (!isPeak) continue;
      if (count) borders[count] = lowest;
      count++;
      lowest = bin;
    }
    count = Math.max(1, count);
    borders[count] = HALF + 1;
    return count;
  }

  rotate(first, end, x, y) {
    const { input, output } = this;
    for (let bin = first; bin < end; bin++) {
      const other = SIZE - bin & SIZE - 1;
      const sine = bin === other ? 0 : y, cosine = bin === other ? Math.hypot(x, y) : x; // real: constant and highest frequency
      const [real, imaginary] = [input.real[bin], input.imaginary[bin]];
      output.real[other] = cosine * input.real[other] + sine * input.imaginary[other];
      output.imaginary[other] = cosine * input.imaginary[other] - sine * input.real[other];
      output.real[bin] = cosine * real - sine * imaginary;
      output.imaginary[bin] = cosine * imaginary + sine * real;
    }
  }

  overlap() {
    const frame = [this.output.real.slice(), this.output.imaginary.slice()];
    fourier.inverse(...frame);
    return this.sums.map((sum, channel) => {
      for (let i = 0; i < SIZE; i++) sum[i] += frame[channel][i] * hann[i] / SIZE;
      const done = sum.slice(0, HOP);
      sum.copyWithin(0, HOP);
      sum.fill(0, SIZE - HOP);
      return done;
    });
  }
}

/** Resamples channels so that sample i of the output is at `origin + i * ratio` in the input, from i = -margin on. */
class Resampler {
  constructor(ratio, origin, margin) {
    this.ratio = ratio;
    this.next = origin - margin * ratio; // position of the next output in the input
    this.cutoff = Math.min(1, 1 / ratio);
    this.reach = Math.ceil(CROSSINGS / this.cutoff);
    this.table = Float64Array.from({ length: CROSSINGS * STEPS + 2 }, (_, i) => {
      const x = i / STEPS, angle = Math.PI * x;
      return x >= CROSSINGS ? 0 : this.cutoff * (x ? Math.sin(angle) / angle : 1) * Math.cos(angle / CROSSINGS / 2) ** 2;
    });
  }

  /** What `input`, whose first sample is at `start`, allows. `input` and the result hold an array per channel. */
  process(input, start) {
    const { ratio, reach, cutoff, table } = this;
    const count = Math.max(0, Math.floor((start + input[0].length - reach - 1 - this.next) / ratio));
    if (ratio === 1) {
      const first = Math.round(this.next) - start;
      this.next += count;
      return input.map(samples => samples.slice(first, first + count));
    }
    const outputs = input.map(() => new Float32Array(count));
    const weights = new Float64Array(2 * reach);
    for (let i = 0; i < count; i++) {
      const at = this.next - start + i * ratio, first = Math.floor(at) - reach + 1;
      for (let j = 0; j < 2 * reach; j++) {
        const x = Math.min(Math.abs(first + j - at) * cutoff, CROSSINGS) * STEPS, k = Math.floor(x);
        weights[j] = table[k] + (table[k + 1] - table[k]) * (x - k);
      }
      for (let channel = 0; channel < input.length; channel++) {
        const samples = input[channel];
        let sum = 0;
        for (let j = 0; j < 2 * reach; j++) sum += weights[j] * samples[first + j];
        outputs[channel][i] = sum;
      }
    }
    this.next += count * ratio;
    return outputs;
  }
}

function joined(parts) {
  const whole = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** All tracks of a song at another tempo (1: as it is) and pitch (2: an octave up). The output starts at sample `origin` of
the input. */
class Stretcher {
  constructor({ tempo, pitch, origin }) {
    this.step = HOP * tempo / pitch; // between frames of the resampled input
    this.resampler = new Resampler(pitch, origin, HALF + HOP);
    this.start = 0; // position of the first sample in `waiting`
    this.waiting = null; // channels of input
    this.first = -HALF - HOP; // position of the first sample in `ready`
    this.ready = null; // channels of resampled input
    this.frame = 0;
    this.weights = new Float64Array(SIZE); // sum of the windows
    this.vocoders = null;
  }

  /** Channels of input, two per track. Returns the channels of output that are complete. */
  process(channels) {
    this.vocoders ??= Array.from({ length: channels.length / 2 }, () => new Vocoder(this.step < HOP));
    this.resample(channels);
    const outputs = channels.map(() => []);
    for (;;) {
      const start = Math.round(this.frame * this.step) - HALF - this.first;
      if (start + SIZE > this.ready[0].length) break;
      this.add(start, outputs);
      this.frame++;
    }
    const next = Math.round(this.frame * this.step) - HALF - HOP;
    const unneeded = Math.min(next - this.first, this.ready[0].length);
    this.ready = this.ready.map(samples => samples.slice(unneeded));
    this.first += unneeded;
    return outputs.map(joined);
  }

  resample(channels) {
    this.waiting = channels.map((samples, i) => joined([this.waiting?.[i] ?? [], samples]));
    const resampled = this.resampler.process(this.waiting, this.start);
    this.ready = resampled.map((samples, i) => joined([this.ready?.[i] ?? [], samples]));
    const next = Math.max(this.start, Math.floor(this.resampler.next) - this.resampler.reach);
    const unneeded = Math.min(next - this.start, this.waiting[0].length);
    this.waiting = this.waiting.map(samples => samples.slice(unneeded));
    this.start += unneeded;
  }

  add(start, outputs) {
    for (let i = 0; i < SIZE; i++) this.weights[i] += hann[i] ** 2;
    this.vocoders.forEach((vocoder, track) => {
      vocoder.add(this.ready.slice(2 * track, 2 * track + 2), start).forEach((samples, channel) => {
        if (this.frame >= 2) outputs[2 * track + channel].push(samples.map((sample, i) => sample / this.weights[i]));
      });
    });
    this.weights.copyWithin(0, HOP);
    this.weights.fill(0, SIZE - HOP);
  }
}

let stretcher;
onmessage = ({ data: { settings, channels } }) => {
  if (settings) stretcher = new Stretcher(settings);
  else {
    const outputs = stretcher.process(channels);
    postMessage(outputs, outputs.map(samples => samples.buffer));
  }
};
