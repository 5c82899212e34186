/**
 * Separates songs with the container on Replicate. Copy this file unchanged; its only dependency is npm's `replicate`.
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

/** The container's inputs besides the song. All are optional; the container has defaults. */
export interface Inputs<S extends StemsChoice = StemsChoice, T extends TwoStems = TwoStems> {
  /** The stems to extract; default vocals_instrumental. */
  stems?: S;
  /** wav (32-bit float, the default), mp3, or flac (24 bit). */
  output_format?: "wav" | "mp3" | "flac";
  /** Seconds, 4 to 30. */
  chunk_size?: number;
  /** Seconds that neighbouring chunks share, 1 to 8 and less than chunk_size. */
  overlap?: number;
  sample_rate?: 44100 | 48000;
  /** kbit/s */
  mp3_bitrate?: 128 | 192 | 320;
  /** This stem and the song minus it, instead of `stems`. */
  two_stems?: T;
  recipe?: "default" | "standard" | "sw" | "demo";
}

/** The URL of each stem by its name. The names follow from the inputs. */
export type StemUrls<S extends StemsChoice = StemsChoice, T extends TwoStems = TwoStems> = T extends "none"
  ? S extends StemsChoice
    ? Record<(typeof STEMS)[S][number], string>
    : never
  : Record<T | `no_${T}`, string>;

/**
 * A song: an http(s) URL, or the file's content, which is first uploaded to Replicate. A data URI works too, but every
 * webhook repeats it, and worker.ts refuses webhooks of more than 1 MiB.
 */
export type Song = string | Blob | Uint8Array<ArrayBuffer>;

export interface WaitOptions {
  /** A webhook that Replicate calls in addition. */
  webhook?: string;
  /** Cancels the prediction on the server; `separate` then throws the signal's reason. */
  signal?: AbortSignal;
  /** Called with the share of the job that is done, 0 to 1, whenever it has grown. */
  onProgress?: (share: number) => void;
  /** Seconds between two polls; default 1. */
  pollSeconds?: number;
}

/** The prediction failed or was canceled. The message is the server's error, if there is one. */
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

/** The prediction succeeded, but its stems are not the requested ones. */
export class StemsError extends Error {
  override readonly name = "StemsError";
}

export class Separator {
  readonly #model: { version: string } | { model: string };
  readonly #replicate: Replicate;

  /**
   * @param options.model "owner/name:version", or "owner/name" for official models of Replicate.
   * @param options.auth Replicate's token; default: the environment variable REPLICATE_API_TOKEN.
   * @param options.baseUrl The URL of a container that runs outside Replicate.
   */
  constructor({ model, ...options }: { model: `${string}/${string}`; auth?: string; baseUrl?: string }) {
    const version = model.split(":")[1];
    this.#model = version === undefined ? { model } : { version };
    this.#replicate = new Replicate(options);
  }

  /**
   * Separates a song and waits for its stems, however long it takes.
   *
   * @throws PredictionError if the prediction failed or somebody else canceled it.
   * @throws StemsError if a stem is missing or duplicated.
   */
  async separate<S extends StemsChoice = "vocals_instrumental", T extends TwoStems = "none">(
    song: Song,
    options: Inputs<S, T> & WaitOptions = {},
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

  /** Starts a separation and returns the prediction's id. The webhook is called once, at the end. */
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

  // `predictions.create` could upload the file, too. But if that fails, it puts files of up to 10 MB into the request.
  async #upload(song: Blob | Uint8Array<ArrayBuffer>): Promise<string> {
    const file = await this.#replicate.files.create(song instanceof Blob ? song : new Blob([song]));
    return file.urls.get;
  }
}

/** The names of the stems for these inputs, in the order of the contract. */
export function expectedStems(inputs: { stems?: string; two_stems?: string }): readonly string[] {
  const { stems = "vocals_instrumental", two_stems = "none" } = inputs;
  if (two_stems !== "none") return [two_stems, `no_${two_stems}`];
  if (!Object.hasOwn(STEMS, stems)) throw new StemsError(`unknown choice of stems: ${stems}`);
  return STEMS[stems as StemsChoice];
}

/**
 * A prediction's output by stem. File names identify the stems, because the list has the order in which the uploads
 * happened to end.
 *
 * A container outside Replicate returns data URIs, which have no names. It encodes the files one after another, so only
 * in this case the order is that of the contract.
 *
 * @throws StemsError if the names are not exactly the expected ones.
 */
export function stemsByName(output: unknown, expected: readonly string[]): Record<string, string> {
  if (!Array.isArray(output) || !output.every((url) => typeof url === "string")) {
    throw new StemsError(`the prediction's output is not a list of URLs: ${JSON.stringify(output)?.slice(0, 200)}`);
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

/** "vocals" for "https://host/path/vocals.wav?query", and "(no name)" for a URL that is not a stem's. */
function fileStem(url: string): string {
  const path = URL.canParse(url) ? new URL(url).pathname : "";
  return /\/([a-z_]+)\.(?:wav|mp3|flac)$/.exec(path)?.[1] ?? "(no name)";
}

/** Waits for some seconds or until the signal is aborted. */
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
