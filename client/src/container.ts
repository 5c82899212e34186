import { AbortError, RequestError, SeparationError } from "./errors.js";
import type { ApiInput } from "./inputs.js";
import type { Service, StartOptions, Watch } from "./service.js";
import { dataUri, urlOrFile, type Song } from "./song.js";
import { httpUrl, pause, refusal, type Answer, type Call, type Transport } from "./transport.js";

const CANCEL_SECONDS = 30;
const CANCEL_PAUSE_SECONDS = 2;
const BUSY_SECONDS = 2;

/**
 * A container outside Replicate. It keeps no predictions: the answer to a request is the prediction's end, or goes to a
 * webhook. The ids are made here, so that they are known from the start.
 */
export class Container implements Service {
  readonly #transport: Transport;
  readonly #url: string;

  constructor(transport: Transport, url: string) {
    this.#transport = transport;
    this.#url = httpUrl(url, "container");
  }

  async start(song: Song, input: ApiInput, { webhook, signal }: StartOptions): Promise<string> {
    if (webhook === undefined) {
      throw new SeparationError("a container outside Replicate keeps no stems: use separate, or give a webhook", "options");
    }
    const body = await requestBody(song, input, webhook);
    if (signal?.aborted) throw new AbortError(signal, null);
    const id = crypto.randomUUID();
    const call = this.#creation(id, body, { prefer: "respond-async" });
    try {
      await this.#jsonOrCancel(call, signal);
    } catch (error) {
      if (!(error instanceof RequestError && error.kind === "connection")) throw error;
      const text = `${error.message}: the prediction may be running, so cancel it before you start another`;
      throw new RequestError(text, "connection", { predictionId: id, cause: error });
    }
    if (signal?.aborted) {
      await this.#cancelUntilOver(id, never);
      throw new AbortError(signal, id);
    }
    return id;
  }

  async run(
    song: Song,
    input: ApiInput,
    { webhook, signal, onStart }: StartOptions & Watch & { onStart: (id: string) => void },
  ): Promise<unknown> {
    const body = await requestBody(song, input, webhook);
    if (signal?.aborted) throw new AbortError(signal, null);
    const id = crypto.randomUUID();
    onStart(id);
    return this.#jsonOrCancel(this.#creation(id, body, {}), signal);
  }

  wait(id: string): Promise<never> {
    return this.#keepsNone(id);
  }

  get(id: string): Promise<never> {
    return this.#keepsNone(id);
  }

  async cancel(id: string): Promise<void> {
    await this.#cancel(id);
  }

  /** Cancels a prediction once. Returns whether there is nothing to cancel: it has ended, or never was. */
  async #cancel(id: string): Promise<boolean> {
    const url = `${this.#url}/predictions/${encodeURIComponent(id)}/cancel`;
    const call = { method: "POST", url, seconds: CANCEL_SECONDS, predictionId: id } as const;
    const answer = await this.#transport.send(call);
    if (answer.status >= 300 && answer.status !== 404) throw refusal(call, answer);
    return answer.status === 404;
  }

  /**
   * Cancels a prediction until it has ended, because Cog's server can lose a cancel that arrives just after the start. The
   * pause between two is long: one that arrives while the first takes effect would interrupt the container's clearing up.
   */
  async #cancelUntilOver(id: string, over: Promise<true>): Promise<void> {
    for (const end = Date.now() + CANCEL_SECONDS * 1000; Date.now() < end; ) {
      if (await this.#cancel(id)) return;
      if (await Promise.race([over, pause(CANCEL_PAUSE_SECONDS, undefined)])) return;
    }
  }

  #creation(id: string, body: string, headers: Record<string, string>): Call & { predictionId: string } {
    return { method: "PUT", url: `${this.#url}/predictions/${id}`, body, headers, predictionId: id };
  }

  /**
   * Sends a request that makes a prediction, and returns the answer's JSON. An aborted signal cancels the prediction
   * before the connection is closed. If the connection drops, the server cancels it.
   */
  async #jsonOrCancel(call: Call & { predictionId: string }, signal: AbortSignal | undefined): Promise<unknown> {
    const connection = new AbortController();
    const answer = this.#sendWhenFree({ ...call, signal: connection.signal }, signal);
    const over = answer.then<true, true>(() => true, () => true);
    if (signal && (await Promise.race([over, aborted(signal, over)])) === signal) {
      try {
        await this.#cancelUntilOver(call.predictionId, over);
      } finally {
        connection.abort();
      }
      throw new AbortError(signal, call.predictionId);
    }
    const { status, text } = await answer;
    if (status >= 300) throw refusal(call, await answer);
    return JSON.parse(text);
  }

  /** For some milliseconds after a prediction has ended, Cog's server says that it is busy (409). */
  async #sendWhenFree(call: Call, signal: AbortSignal | undefined): Promise<Answer> {
    const end = Date.now() + BUSY_SECONDS * 1000;
    for (;;) {
      const answer = await this.#transport.send(call);
      if (answer.status !== 409 || Date.now() > end) return answer;
      await pause(0.05, signal);
      if (signal?.aborted) return answer;
    }
  }

  async #keepsNone(id: string): Promise<never> {
    const text = "a container outside Replicate keeps no predictions: use separate, or start with a webhook";
    throw new SeparationError(text, "options", id);
  }
}

async function requestBody(song: Song, input: ApiInput, webhook: string | undefined): Promise<string> {
  const file = urlOrFile(song);
  const audio = typeof file === "string" ? file : await dataUri(file);
  const hook = webhook === undefined ? {} : { webhook, webhook_events_filter: ["completed"] };
  return JSON.stringify({ input: { audio, ...input }, ...hook });
}

const never = new Promise<true>(() => undefined);

/** Resolves to the signal when it is aborted, and stops listening when something else is over. */
function aborted(signal: AbortSignal, over: Promise<true>): Promise<AbortSignal> {
  return new Promise((resolve) => {
    const listening = new AbortController();
    if (signal.aborted) resolve(signal);
    signal.addEventListener("abort", () => resolve(signal), { signal: listening.signal });
    void over.then(() => listening.abort());
  });
}
