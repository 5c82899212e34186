import type { Analysis } from "./prediction.js";
import type { ApiInput } from "./inputs.js";
import type { Song } from "./song.js";

export interface StartOptions {
  /** Called once by the server, when the prediction has ended. */
  webhook?: string | undefined;
  /** Cancels the prediction on the server, or prevents it; an AbortError is thrown. */
  signal?: AbortSignal | undefined;
}

export interface WaitOptions {
  /** Cancels the prediction on the server, or prevents it; an AbortError is thrown. */
  signal?: AbortSignal | undefined;
  /** Called with the share of the job that is done, 0 to 1, whenever it has grown. */
  onProgress?: ((share: number) => void) | undefined;
  /** Called with what the input `analyse` found, before the stems are returned. */
  onAnalysis?: ((analysis: Analysis) => void) | undefined;
  /** Seconds between two polls; default 1. */
  pollSeconds?: number | undefined;
}

/** What Replicate and a container of your own do differently. Predictions are returned as their JSON. */
export interface Service {
  /** Makes a prediction and returns its id. */
  start(song: Song, input: ApiInput, options: StartOptions): Promise<string>;
  /** Makes a prediction, calls `onStart` with its id while it runs, and returns it when it has ended. */
  run(song: Song, input: ApiInput, options: StartOptions & Watch & { onStart: (id: string) => void }): Promise<unknown>;
  /** Returns a prediction when it has ended. */
  wait(id: string, options: { signal?: AbortSignal | undefined } & Watch): Promise<unknown>;
  get(id: string, signal: AbortSignal | undefined): Promise<unknown>;
  cancel(id: string): Promise<void>;
}

export interface Watch {
  /** Called with the prediction's JSON after each poll; returns whether the prediction has ended. */
  onPoll: (prediction: unknown) => boolean;
  pollSeconds: number;
}
