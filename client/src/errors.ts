/**
 * What went wrong, for code that must decide.
 *
 * The container reports `input` (an option cannot be used), `audio` (the song is not audio, or too damaged), `recipe`,
 * `checkpoint` and `download` (weights), `estimate` (a model failed), `output` (stems cannot be written or sent) and
 * `server` (anything else). The client adds `canceled` (somebody canceled the prediction), `aborted` (your signal did),
 * `stems` (they are not the requested ones), `options` (a call of this package is wrong), `webhook` (it is refused),
 * `connection` (no complete answer came), `busy` (the container has no place for another song) and `refused` (any other
 * answer between 400 and 499).
 */
export type ErrorKind =
  | "input"
  | "audio"
  | "recipe"
  | "checkpoint"
  | "download"
  | "estimate"
  | "output"
  | "server"
  | "canceled"
  | "aborted"
  | "stems"
  | "options"
  | "webhook"
  | "connection"
  | "busy"
  | "refused";

/** The base of all errors of this package. */
export class SeparationError extends Error {
  override readonly name: string = "SeparationError";
  readonly kind: ErrorKind;
  /** Null only if no prediction was made, or if the connection dropped before its id was known. */
  readonly predictionId: string | null;

  constructor(message: string, kind: ErrorKind, predictionId: string | null = null, options?: { cause?: unknown }) {
    super(message, options);
    this.kind = kind;
    this.predictionId = predictionId;
  }
}

/** The prediction failed or was canceled. The message is the container's sentence, if there is one. */
export class PredictionError extends SeparationError {
  override readonly name = "PredictionError";
  declare readonly predictionId: string;
}

/** The prediction succeeded, but its stems are not the requested ones, or are no longer there. */
export class StemsError extends SeparationError {
  override readonly name = "StemsError";

  constructor(message: string, predictionId: string | null = null) {
    super(message, "stems", predictionId);
  }
}

/** A request was refused, or got no complete answer. */
export class RequestError extends SeparationError {
  override readonly name = "RequestError";
  /** The HTTP status, or null without an answer. */
  readonly httpStatus: number | null;

  constructor(
    message: string,
    kind: ErrorKind,
    { httpStatus = null, predictionId = null, cause }: RequestErrorDetails,
  ) {
    super(message, kind, predictionId, cause === undefined ? undefined : { cause });
    this.httpStatus = httpStatus;
  }
}

export interface RequestErrorDetails {
  httpStatus?: number | null;
  predictionId?: string | null;
  cause?: unknown;
}

/** Your signal was aborted; `cause` is its reason. The prediction, if there was one, has been canceled. */
export class AbortError extends SeparationError {
  override readonly name = "AbortError";

  constructor(signal: AbortSignal, predictionId: string | null) {
    const text = predictionId === null ? "aborted before there was a prediction" : `prediction ${predictionId} was aborted`;
    super(text, "aborted", predictionId, { cause: signal.reason });
  }
}
