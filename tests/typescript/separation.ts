/**
 * Separates songs with the container on Replicate. Copy this file as it is; all that it needs is npm's `replicate`.
 *
 *     const separator = new Separator({ model: "owner/name:version" });
 *     const { vocals, drums } = await separator.separate(songUrl, { stems: "all_4", output_format: "mp3" });
 *     const id = await separator.start(songUrl, { stems: "all_4", webhook: "https://example.com/stems" });
 */
import Replicate, { parseProgressFromLogs, type Prediction } from "replicate";

const STEMS = {
  vocals_instrumental: ["vocals", "instrumental"],
  all_4: ["vocals", "drums", "bass", "other"],
  all_6: ["vocals", "drums", "bass", "guitar", "piano", "other"],
  drum_kit: ["kick", "snare", "toms", "hihat", "cymbals"],
} as const;

export type StemsChoice = keyof typeof STEMS;
export type TwoStems = "none" | "vocals" | "drums" | "bass" | "other" | "guitar" | "piano";

/** The container's inputs beside the song. Left out, each has the container's default. */
export interface Inputs<S extends StemsChoice = StemsChoice, T extends TwoStems = TwoStems> {
  /** Which stems to extract; vocals_instrumental unless given. */
  stems?: S;
  /** wav (32-bit float) unless given; flac is 24 bit. */
  output_format?: "wav" | "mp3" | "flac";
  /** Seconds, 4 to 30. */
  chunk_size?: number;
  /** Seconds that neighbouring chunks share, 1 to 8 and below chunk_size. */
  overlap?: number;
  sample_rate?: 44100 | 48000;
  /** kbit/s */
  mp3_bitrate?: 128 | 192 | 320;
  /** This stem and the song minus it, in place of `stems`. */
  two_stems?: T;
  recipe?: "default" | "standard" | "sw" | "demo";
}

/** A URL a stem, by the stem's name: exactly the names that the choice of stems gives. */
export type StemUrls<S extends StemsChoice = StemsChoice, T extends TwoStems = TwoStems> = T extends "none"
  ? S extends StemsChoice
    ? Record<(typeof STEMS)[S][number], string>
    : never
  : Record<T | `no_${T}`, string>;

/**
 * A song: an http(s) URL, or the file itself, which is uploaded to Replicate first. A data URI works too, but every
 * webhook repeats it, and worker.ts takes none of more than 1 MiB.
 */
export type Song = string | Blob | Uint8Array<ArrayBuffer>;

export interface Waiting {
  /** Replicate calls it as well as this one waits, if it is given. */
  webhook?: string;
  /** Cancels the prediction on the server; `separate` then throws the signal's reason. */
  signal?: AbortSignal;
  /** Told the share of the job that is done, from 0 to 1, whenever it has grown. */
  onProgress?: (share: number) => void;
  /** Seconds between two looks at the prediction; 1 unless given. */
  pollSeconds?: number;
}

/** A prediction that failed or was canceled; the message is the server's own sentence where it gave one. */
export class PredictionError extends Error {
  override readonly name = "PredictionError";
  readonly predictionId: string;
  readonly status: Prediction["status"];

  constructor({ id, status, error }: Pick<Prediction, "id" | "status" | "error">) {
    super(error ? String(error) : `prediction ${id} was ${status}`);
    this.predictionId = id;
    this.status = status;
  }
}

/** A prediction that succeeded, but not with the stems that were asked for. */
export class StemsError extends Error {
  override readonly name = "StemsError";
}

export class Separator {
  readonly #model: { version: string } | { model: string };
  readonly #replicate: Replicate;

  /**
   * @param options.model "owner/name:version"; "owner/name" alone if Replicate lists the model as an official one.
   * @param options.auth Replicate's token; the environment's REPLICATE_API_TOKEN unless given.
   * @param options.baseUrl A container's own address, where there is no Replicate around it.
   */
  constructor({ model, ...options }: { model: `${string}/${string}`; auth?: string; baseUrl?: string }) {
    const version = model.split(":")[1];
    this.#model = version === undefined ? { model } : { version };
    this.#replicate = new Replicate(options);
  }

  /**
   * Separates a song and waits for it, however long it takes.
   *
   * @throws PredictionError if the prediction failed or was canceled by somebody else.
   * @throws StemsError if an expected stem is missing, or one came twice.
   */
  async separate<S extends StemsChoice = "vocals_instrumental", T extends TwoStems = "none">(
    song: Song,
    options: Inputs<S, T> & Waiting = {},
  ): Promise<StemUrls<S, T>> {
    const { webhook, signal, onProgress, pollSeconds = 1, ...inputs } = options;
    signal?.throwIfAborted();
    let prediction = await this.#create(song, inputs, webhook);
    let share = -1;
    for (;;) {
      const progress = parseProgressFromLogs(prediction)?.percentage ?? share;
      if (progress > share) onProgress?.((share = progress));
      if (!["starting", "processing"].includes(prediction.status)) break;
      await pause(pollSeconds, signal);
      if (signal?.aborted) {
        await this.#replicate.predictions.cancel(prediction.id);
        throw signal.reason;
      }
      prediction = await this.#replicate.predictions.get(prediction.id);
    }
    if (prediction.status !== "succeeded") throw new PredictionError(prediction);
    return stemsByName(prediction.output, expectedStems(inputs)) as StemUrls<S, T>;
  }

  /** Starts a separation and returns the prediction's id; the webhook is called once, when it is over. */
  async start(song: Song, { webhook, ...inputs }: Inputs & { webhook: string }): Promise<string> {
    return (await this.#create(song, inputs, webhook)).id;
  }

  async #create(song: Song, inputs: Inputs, webhook: string | undefined): Promise<Prediction> {
    const audio = typeof song === "string" ? song : await this.#upload(song);
    return this.#replicate.predictions.create({
      ...this.#model,
      input: { audio, ...inputs },
      ...(webhook === undefined ? {} : { webhook, webhook_events_filter: ["completed"] }),
    });
  }

  // Not left to `predictions.create`: where an upload fails it sends the file within the request, up to 10 MB, instead.
  async #upload(song: Blob | Uint8Array<ArrayBuffer>): Promise<string> {
    const file = await this.#replicate.files.create(song instanceof Blob ? song : new Blob([song]));
    return file.urls.get;
  }
}

/** The names of the stems that these inputs give, in the order of the contract. */
export function expectedStems(inputs: { stems?: string; two_stems?: string }): readonly string[] {
  const { stems = "vocals_instrumental", two_stems = "none" } = inputs;
  if (two_stems !== "none") return [two_stems, `no_${two_stems}`];
  if (!Object.hasOwn(STEMS, stems)) throw new StemsError(`unknown choice of stems: ${stems}`);
  return STEMS[stems as StemsChoice];
}

/**
 * A prediction's output by the names of its stems, told from the files' names: the order of the list is that in which
 * the uploads happened to end.
 *
 * A container that runs without Replicate around it answers with data URIs, which have no names. It encodes one file
 * after the other, so there, and only there, the order is the contract's.
 *
 * @throws StemsError if the names are not exactly the expected ones.
 */
export function stemsByName(output: unknown, expected: readonly string[]): Record<string, string> {
  if (!Array.isArray(output) || !output.every((url) => typeof url === "string")) {
    throw new StemsError(`the prediction's output is not a list of URLs but ${JSON.stringify(output)?.slice(0, 200)}`);
  }
  const urls: string[] = output;
  const nameless = urls.length === expected.length && urls.every((url) => url.startsWith("data:"));
  const names = nameless ? expected : urls.map(fileStem);
  const stems = Object.fromEntries(names.map((name, index) => [name, urls[index]!]));
  if (names.length !== expected.length || !expected.every((name) => Object.hasOwn(stems, name))) {
    throw new StemsError(`expected the stems ${expected.join(", ")}, got ${names.join(", ") || "none"}`);
  }
  return stems;
}

/** "vocals" of "https://host/path/vocals.wav?query"; a URL of anything else but a stem is called "(no name)". */
function fileStem(url: string): string {
  const path = URL.canParse(url) ? new URL(url).pathname : "";
  return /\/([a-z_]+)\.(?:wav|mp3|flac)$/.exec(path)?.[1] ?? "(no name)";
}

/** Waits, but not longer than until the signal. */
function pause(seconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve) => {
    const wake = (): void => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", wake);
      resolve();
    };
    const timer = setTimeout(wake, signal?.aborted ? 0 : seconds * 1000);
    signal?.addEventListener("abort", wake);
  });
}
