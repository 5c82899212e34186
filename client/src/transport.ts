import type { IncomingMessage } from "node:http";
import { AbortError, RequestError, SeparationError, type ErrorKind } from "./errors.js";

/** Your own `fetch`, for example one that knows your proxy. */
export type Fetch = (url: string, init: RequestInit) => Promise<Response>;

export interface Call {
  method: "GET" | "POST" | "PUT";
  url: string;
  headers?: Record<string, string>;
  /** A string is JSON. */
  body?: string | Uint8Array;
  signal?: AbortSignal | undefined;
  /** Seconds until the call counts as failed. The default is forever. */
  seconds?: number;
  /** The prediction that the call is about, for its errors. */
  predictionId?: string | null;
}

export interface Answer {
  status: number;
  retryAfter: string | null;
  text: string;
}

const ATTEMPTS = 5;

/** Sends requests. Only those that are safe to repeat are repeated after a lost connection or an error of the server. */
export class Transport {
  readonly #headers: Record<string, string>;
  readonly #fetch: Fetch | undefined;

  constructor(auth: string | undefined, fetch: Fetch | undefined) {
    this.#headers = auth ? { authorization: `Bearer ${auth}` } : {};
    this.#fetch = fetch;
  }

  /**
   * Sends a request that may arrive twice, and repeats it until it is answered. Returns the answer's JSON.
   *
   * @throws RequestError if it is refused, or if no attempt succeeds.
   * @throws AbortError if the signal is aborted.
   */
  repeat(call: Call): Promise<unknown> {
    return this.#attempt(call, true);
  }

  /**
   * Sends a request that must not take effect twice. It is repeated only if the server asks for that (429). Returns the
   * answer's JSON.
   *
   * @throws RequestError if it is refused or gets no answer.
   * @throws AbortError if the signal is aborted.
   */
  once(call: Call): Promise<unknown> {
    return this.#attempt(call, false);
  }

  async #attempt(call: Call, repeatable: boolean): Promise<unknown> {
    for (let attempt = 1; ; attempt++) {
      const isLast = attempt === ATTEMPTS;
      let wait = (0.5 + Math.random() * 0.1) * 2 ** (attempt - 1);
      try {
        const answer = await this.send(call);
        if (answer.status < 300) return JSON.parse(answer.text || "null");
        if (isLast || !(answer.status === 429 || (repeatable && answer.status >= 500))) throw refusal(call, answer);
        if (/^\d+$/.test(answer.retryAfter ?? "")) wait = Math.min(Number(answer.retryAfter), 60);
      } catch (error) {
        if (!repeatable || isLast || !(error instanceof RequestError) || error.kind !== "connection") throw error;
      }
      await pause(wait, call.signal);
      if (call.signal?.aborted) throw new AbortError(call.signal, call.predictionId ?? null);
    }
  }

  /** Sends a request once and returns whatever answer comes. */
  async send(call: Call): Promise<Answer> {
    const { signal, seconds, predictionId = null } = call;
    if (signal?.aborted) throw new AbortError(signal, predictionId);
    const headers = { ...this.#headers, ...call.headers };
    if (typeof call.body === "string") headers["content-type"] = "application/json";
    const timeout = seconds === undefined ? [] : [AbortSignal.timeout(seconds * 1000)];
    const signals = signal ? [signal, ...timeout] : timeout;
    const request: PreparedCall = { ...call, headers, signal: signals.length > 0 ? AbortSignal.any(signals) : undefined };
    try {
      const http = this.#fetch ? undefined : nodeHttp(call.url);
      return await (http ? sendByNode(http, request) : sendByFetch(this.#fetch ?? fetch, request));
    } catch (cause) {
      if (signal?.aborted) throw new AbortError(signal, predictionId);
      const reason = cause instanceof Error ? rootOf(cause).message : String(cause);
      const text = `no complete answer from ${new URL(call.url).host} (${reason})`;
      throw new RequestError(text, "connection", { predictionId, cause });
    }
  }
}

/** The error for an answer that is no success. */
export function refusal(call: Call, { status, text }: Answer): RequestError {
  const kinds: Record<number, ErrorKind> = { 400: "input", 409: "busy", 413: "input", 422: "input" };
  const kind = kinds[status] ?? (status >= 500 ? "server" : "refused");
  const message = `${new URL(call.url).host} answered ${status}: ${detail(text)}`;
  return new RequestError(message, kind, { httpStatus: status, predictionId: call.predictionId ?? null });
}

/** The sentence in the body of an answer: Replicate's `detail`, or the list of wrong inputs of Cog's server. */
function detail(text: string): string {
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch {
    return text.slice(0, 500).trim() || "(no text)"; // not JSON: the text is all there is
  }
  const { detail, title, error } = (body ?? {}) as { detail?: unknown; title?: unknown; error?: unknown };
  if (!Array.isArray(detail)) return String(detail ?? title ?? error ?? text.slice(0, 500)).trim();
  return detail.map(({ loc, msg }) => `${Array.isArray(loc) ? loc.at(-1) : "input"}: ${msg}`).join("; ");
}

/**
 * An http or https URL without slashes at its end.
 *
 * @param name what it is, for the error: "container".
 * @throws SeparationError for anything else.
 */
export function httpUrl(url: unknown, name: string): string {
  if (typeof url !== "string" || !/^https?:\/\//.test(url) || !URL.canParse(url)) {
    const text = `the ${name} is ${JSON.stringify(url)}: give a URL that begins with http:// or https://`;
    throw new SeparationError(text, "options");
  }
  return url.replace(/\/+$/, "");
}

/** Waits for some seconds, or until the signal is aborted. */
export function pause(seconds: number, signal: AbortSignal | undefined): Promise<void> {
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

type PreparedCall = Call & { headers: Record<string, string> };
type NodeHttp = Pick<typeof import("node:http"), "request">;

/**
 * Node's own HTTP client, or undefined elsewhere. Node's `fetch` gives up when an answer takes more than 300 s, which a
 * container needs for a long song. This way of asking for the module leaves nothing to resolve for bundlers.
 */
function nodeHttp(url: string): NodeHttp | undefined {
  const { navigator } = globalThis as { navigator?: { userAgent?: string } };
  const isWorker = navigator?.userAgent === "Cloudflare-Workers";
  if (typeof process === "undefined" || isWorker || !process.getBuiltinModule) return undefined;
  return process.getBuiltinModule(url.startsWith("https:") ? "node:https" : "node:http");
}

/**
 * A request that must not arrive twice gets a new connection: the server may have closed one from the pool, and that
 * error looks like any other.
 */
function sendByNode(http: NodeHttp, { url, method, headers, body, signal }: PreparedCall): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const options = { method, headers, ...(method !== "GET" && { agent: false as const }), ...(signal && { signal }) };
    const request = http.request(url, options, (response) => resolve(readAnswer(response)));
    // Finds out within minutes that a server is gone, however long its answer may take.
    request.on("socket", (socket) => socket.setKeepAlive(true, 30_000));
    request.on("error", reject);
    request.end(body);
  });
}

async function readAnswer(response: IncomingMessage): Promise<Answer> {
  const chunks: Uint8Array[] = [];
  for await (const chunk of response) chunks.push(chunk as Uint8Array);
  const text = Buffer.concat(chunks).toString();
  return { status: response.statusCode ?? 0, retryAfter: response.headers["retry-after"] ?? null, text };
}

async function sendByFetch(fetch: Fetch, { url, method, headers, body, signal }: PreparedCall): Promise<Answer> {
  const init = { method, headers, ...(body !== undefined && { body: body as string | Uint8Array<ArrayBuffer> }), ...(signal && { signal }) };
  const response = await fetch(url, init);
  return { status: response.status, retryAfter: response.headers.get("retry-after"), text: await response.text() };
}

/** The first of a chain of causes, which names what happened: "fetch failed" does not. */
function rootOf(error: Error): Error {
  return error.cause instanceof Error ? rootOf(error.cause) : error;
}
