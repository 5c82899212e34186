import { PredictionError, SeparationError, StemsError, type ErrorKind } from "./errors.js";
import { expectedStems, stemsByName, type SomeStemUrls, type StemName } from "./stems.js";

const STATUSES = ["starting", "processing", "succeeded", "failed", "canceled", "aborted"] as const;
export type Status = (typeof STATUSES)[number];

/** What a song is like. Whatever could not be told is null, such as the tempo of a song without drums. */
export interface Analysis {
  /** Beats per minute. */
  tempoBpm: number | null;
  /** Such as "F# minor" or "Bb major". */
  key: string | null;
  /** Integrated loudness of the song (EBU R128), in LUFS. */
  loudnessLufs: number | null;
}

/** A prediction at some moment. */
export interface Separation<Stems = SomeStemUrls> {
  id: string;
  status: Status;
  /** The share of the job that is done, 0 to 1. */
  progress: number;
  /** The URL of each stem after a success, else null. */
  stems: Stems | null;
  /** What `analyse` found; null if it was not asked for or found nothing. */
  analysis: Analysis | null;
  /** A PredictionError if it failed or was canceled, a StemsError if its stems are not as expected, else null. */
  error: SeparationError | null;
}

/** Whether a prediction has ended. */
export function isOver({ status }: Separation): boolean {
  return status !== "starting" && status !== "processing";
}

/**
 * Reads a prediction as the API and its webhooks send it. Returns null if it is none.
 *
 * @param choice the inputs that decide which stems are expected; default: the prediction's own.
 */
export function readPrediction(
  prediction: unknown,
  choice?: { stems?: unknown; two_stems?: unknown },
): Separation | null {
  if (typeof prediction !== "object" || prediction === null) return null;
  const { id, status, input, output, error, logs, metrics, data_removed } = prediction as Record<string, unknown>;
  if (typeof id !== "string" || !id || !STATUSES.includes(status as Status)) return null;
  const found: Separation = {
    id,
    status: status as Status,
    progress: status === "succeeded" ? 1 : progressInLogs(logs),
    stems: null,
    analysis: null,
    error: null,
  };
  if (!isOver(found)) return found;
  if (status !== "succeeded") return { ...found, error: predictionError(id, String(status), error) };
  if (data_removed === true) {
    const text = `the stems of prediction ${id} have been deleted: fetch them within an hour, or separate the song again`;
    return { ...found, error: new StemsError(text, id) };
  }
  try {
    const expected = expectedStems(choice ?? (typeof input === "object" && input !== null ? input : {}));
    const stems = stemsByName(output, expected as readonly StemName[]);
    return { ...found, stems, analysis: readAnalysis(metrics) };
  } catch (reason) {
    if (!(reason instanceof StemsError)) throw reason;
    return { ...found, error: new StemsError(reason.message, id) };
  }
}

function readAnalysis(metrics: unknown): Analysis | null {
  const { tempo_bpm, key, loudness_lufs } = (metrics ?? {}) as Record<string, unknown>;
  const analysis = {
    tempoBpm: typeof tempo_bpm === "number" ? tempo_bpm : null,
    key: typeof key === "string" ? key : null,
    loudnessLufs: typeof loudness_lufs === "number" ? loudness_lufs : null,
  };
  return Object.values(analysis).some((value) => value !== null) ? analysis : null;
}

/** The last progress bar in a prediction's log, such as " 35%|███    | 7/20", as a share of 1. */
function progressInLogs(logs: unknown): number {
  if (typeof logs !== "string") return 0;
  const bars = logs.split("\n").map((line) => /^\s*(\d+)%\s*\|.+?\|\s*\d+\/\d+/.exec(line)?.[1]);
  return Number(bars.filter((percent) => percent !== undefined).at(-1) ?? 0) / 100;
}

// The container's exceptions, by their names in Python.
const KINDS: Record<string, ErrorKind> = {
  InputError: "input",
  AudioError: "audio",
  RecipeError: "recipe",
  CheckpointError: "checkpoint",
  DownloadError: "download",
  EstimateError: "estimate",
  OutputError: "output",
  SeparationError: "server",
};

function predictionError(id: string, status: string, error: unknown): PredictionError {
  if (status !== "failed") return new PredictionError(`prediction ${id} was ${status}`, "canceled", id);
  const text = typeof error === "string" ? error : error ? JSON.stringify(error) : `prediction ${id} failed`;
  // Cog's server puts one or two prefixes before the sentence, and the exception's name.
  const sentence = text.replace(/^(?:(?:Async p|P)rediction failed: )+/, "");
  const [, name = "", rest = ""] = /^(\w+): ([^]+)$/.exec(sentence) ?? [];
  if (Object.hasOwn(KINDS, name)) return new PredictionError(rest, KINDS[name]!, id);
  return new PredictionError(sentence, sentence.startsWith("Failed to upload output") ? "output" : "server", id);
}
