import { SeparationError } from "./errors.js";
import type { StemsChoice, TwoStems } from "./stems.js";

/** The container's inputs besides the song. All are optional; the container has defaults. */
export interface Inputs<S extends StemsChoice = StemsChoice, T extends TwoStems = TwoStems> {
  /** The stems to extract; default vocals_instrumental. */
  stems?: S | undefined;
  /** wav (32-bit float, the default), mp3, or flac (24 bit). */
  outputFormat?: "wav" | "mp3" | "flac" | undefined;
  /** Seconds, 4 to 30. */
  chunkSize?: number | undefined;
  /** Seconds that neighbouring chunks share, 1 to 8 and less than chunkSize. */
  overlap?: number | undefined;
  sampleRate?: 44100 | 48000 | undefined;
  /** kbit/s */
  mp3Bitrate?: 128 | 192 | 320 | undefined;
  /** This stem and the song minus it, instead of `stems`. */
  twoStems?: T | undefined;
  recipe?: "default" | "standard" | "sw" | "demo" | undefined;
  /** Separate only from this second of the song on. */
  start?: number | undefined;
  /** Separate only up to this second. */
  end?: number | undefined;
  /** Separate only the loudest 30 seconds. */
  preview?: boolean | undefined;
  /** Also find tempo, key and loudness, for `onAnalysis` and the `analysis` of a `Separation`. */
  analyse?: boolean | undefined;
}

/** A prediction's input with the API's names. */
export type ApiInput = Record<string, unknown>;

const API_NAMES: Record<keyof Inputs, string> = {
  stems: "stems",
  outputFormat: "output_format",
  chunkSize: "chunk_size",
  overlap: "overlap",
  sampleRate: "sample_rate",
  mp3Bitrate: "mp3_bitrate",
  twoStems: "two_stems",
  recipe: "recipe",
  start: "start",
  end: "end",
  preview: "preview",
  analyse: "analyse",
};

/**
 * Renames the inputs as the API has them, and leaves out those that are undefined.
 *
 * @throws SeparationError for an unknown name: the container would ignore it silently.
 */
export function apiInput(inputs: Inputs): ApiInput {
  const given = Object.entries(inputs).filter(([, value]) => value !== undefined && value !== null);
  return Object.fromEntries(given.map(([name, value]) => [apiName(name), value]));
}

function apiName(name: string): string {
  if (Object.hasOwn(API_NAMES, name)) return API_NAMES[name as keyof Inputs];
  const meant = Object.entries(API_NAMES).find(([, apiName]) => apiName === name);
  throw new SeparationError(
    `there is no option ${name}: ${meant ? `write ${meant[0]}` : `use ${Object.keys(API_NAMES).join(", ")}`}`,
    "options",
  );
}
